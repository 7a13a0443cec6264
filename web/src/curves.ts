// Arithmetic on curves: live updates, smoothing, ranges. Nothing here touches the page.
import type { Chart, Line } from "./types";

type Column = "mean" | "min" | "max" | "sd";
const COLUMNS: readonly Column[] = ["mean", "min", "max", "sd"];

const keyOf = (line: Line) => `${line.kind}\0${line.arm}\0${line.run ?? ""}`;

/** The first index whose value is at least `value`. */
export function lowerBound(sorted: ArrayLike<number>, value: number): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Replace the buckets that a live frame brings; those out of the range in view are left out. */
export function merged(chart: Chart, update: Chart, from: number | null, to: number | null): Chart {
  const lines = new Map(chart.lines.map((line) => [keyOf(line), line]));
  for (const change of update.lines) {
    const old = lines.get(keyOf(change));
    lines.set(keyOf(change), old ? mergedLine(old, cut(change, from, to)) : cut(change, from, to));
  }
  return { ...chart, total: update.total, lines: [...lines.values()] };
}

function cut(line: Line, from: number | null, to: number | null): Line {
  const start = from === null ? 0 : lowerBound(line.x, from);
  const end = to === null ? line.x.length : lowerBound(line.x, to + 1e-9);
  if (start === 0 && end === line.x.length) return line;
  const part = { ...line, x: line.x.subarray(start, end) };
  for (const name of COLUMNS) part[name] = line[name]?.subarray(start, end) as Float64Array;
  part.badAt = line.badAt.filter((x) => (from === null || x >= from) && (to === null || x <= to));
  return part;
}

function mergedLine(old: Line, change: Line): Line {
  if (!change.x.length) return { ...change, ...columnsOf(old) };
  const start = lowerBound(old.x, change.x[0]!);
  const end = lowerBound(old.x, change.x[change.x.length - 1]! + 1e-9);
  const spliced = (a: Float64Array, b: Float64Array) => {
    const all = new Float64Array(start + b.length + a.length - end);
    all.set(a.subarray(0, start));
    all.set(b, start);
    all.set(a.subarray(end), start + b.length);
    return all;
  };
  const next = { ...change, x: spliced(old.x, change.x) };
  for (const name of COLUMNS) {
    const [a, b] = [old[name], change[name]];
    next[name] = (a && b ? spliced(a, b) : null) as Float64Array;
  }
  next.badAt = Float64Array.from(new Set([...old.badAt, ...change.badAt])).sort();
  return next;
}

/** The steps of a range of x, from the first to the last bucket in it; null if none is. */
export function stepsIn(lines: Line[], from: number, to: number): [number, number] | null {
  let [first, last] = [Infinity, -Infinity];
  for (const { x, steps } of lines) {
    const [start, end] = [lowerBound(x, from), lowerBound(x, to) - 1];
    if (start > end) continue;
    first = Math.min(first, (steps ?? x)[start]!);
    last = Math.max(last, (steps ?? x)[end]!);
  }
  return first < last ? [first, last] : null;
}

const columnsOf = ({ x, mean, min, max, sd, badAt }: Line) => ({ x, mean, min, max, sd, badAt });

/** Moving average whose weights halve every `halfLife` of x, without the pull towards zero at its start. */
export function smoothed(x: Float64Array, values: Float64Array, halfLife: number): Float64Array {
  const result = new Float64Array(values.length).fill(NaN);
  let sum = 0;
  let weight = 0;
  let last = NaN;
  for (let i = 0; i < values.length; i++) {
    const value = values[i]!;
    if (!Number.isFinite(value)) continue;
    const decay = Number.isNaN(last) ? 0 : 2 ** ((last - x[i]!) / halfLife);
    sum = sum * decay + value * (1 - decay);
    weight = weight * decay + (1 - decay);
    result[i] = sum / weight;
    last = x[i]!;
  }
  return result;
}

const FEWEST_TO_SMOOTH = 30;
const ROUGH = 0.04;

/** Whether a curve jumps so much from point to point that its course is hard to see. */
export function isRough(lines: Line[]): boolean {
  const roughness = lines.flatMap(({ mean }) => {
    const values = mean.filter(Number.isFinite);
    if (values.length < FEWEST_TO_SMOOTH) return [];
    const bends = new Float64Array(values.length - 2).map((_, i) => Math.abs(values[i]! - 2 * values[i + 1]! + values[i + 2]!));
    const sorted = values.sort();
    const range = sorted[Math.floor(0.98 * sorted.length)]! - sorted[Math.floor(0.02 * sorted.length)]!;
    return range > 0 ? [bends.sort()[bends.length >> 1]! / range] : [];
  });
  return roughness.length > 0 && roughness.sort((a, b) => a - b)[roughness.length >> 1]! > ROUGH;
}

/** 1, 2 or 5 times a power of ten, near the value. */
export function rounded(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return ([1, 2, 5, 10].find((each) => each * power >= value * 0.75) ?? 10) * power;
}

/** A logarithmic axis of fewer powers of ten has ticks at round numbers of equal distance. */
export const NARROW = 0.8;

/** Positions of ticks on a logarithmic axis, as logarithms: at round numbers, however narrow the range. */
export function logTicks(low: number, high: number, most: number): number[] {
  if (high - low >= NARROW) {
    const every = Math.max(1, Math.ceil((high - low) / most));
    const factors = high - low < most / 3 ? [1, 2, 5] : [1];
    const found: number[] = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
      if (power % every) continue;
      for (const factor of factors) {
        const at = power + Math.log10(factor);
        if (at >= low && at <= high) found.push(at);
      }
    }
    return found;
  }
  const [from, to] = [10 ** low, 10 ** high];
  const step = rounded((to - from) / most);
  const found: number[] = [];
  for (let i = Math.ceil(from / step); i * step <= to && found.length < 50; i++) if (i > 0) found.push(Math.log10(i * step));
  return found;
}

/** A range around values, with room; of its own for a constant, and for no value at all. */
export function paddedRange(low: number, high: number): [number, number] {
  if (!(low <= high)) return [0, 1];
  const room = high > low ? (high - low) * 0.06 : Math.abs(low) * 0.1 || 1;
  return [low - room, high + room];
}
