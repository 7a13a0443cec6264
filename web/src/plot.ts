// One chart on a canvas, by uPlot: lines with gaps, bands, marks where values are not finite.
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { canvasColours, dashOf, hueOf } from "./colours";
import { isRough, logTicks, lowerBound, NARROW, paddedRange, rounded, smoothed, stepsIn } from "./curves";
import { count, elapsed, number, roundTickText, tickTexts, withDeviation } from "./format";
import type { Chart, Line, XAxis } from "./types";
import type { Smoothing } from "./view";

export interface PlotView {
  log: boolean;
  smoothing: Smoothing;
  x: XAxis;
  zoom: [number, number] | null;
  slots: Map<string, number>;
  /** Arms in the order of the table; a line of a later arm lies above. */
  order: string[];
  hidden: ReadonlySet<string>;
}

export interface PlotActions {
  zoomTo: (range: [number, number] | null) => void;
  hover: (isOver: boolean) => void;
}

interface Curve {
  line: Line;
  colour: string;
  dash: number[];
  /** What is drawn: smoothed, or the means themselves; as logarithms on a logarithmic axis. */
  y: Float64Array;
  /** The means behind a smoothed curve. */
  raw: Float64Array | null;
  low: Float64Array | null;
  high: Float64Array | null;
}

const HEIGHT = 188;
const HALF_LIVES: Partial<Record<Smoothing, number>> = { light: 0.005, medium: 0.02, strong: 0.06 };
const MOST_IN_TOOLTIP = 10;
const TICK_SPACE = 34;
const TIME_DISTANCES = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 18_000, 36_000, 86_400, 172_800, 432_000];
const SYNC = uPlot.sync("steps");

/** Draws a chart into an element; what it could not draw, and how it drew, is in `label`. */
export class Plot {
  label = "";
  private plot: uPlot | null = null;
  private shape = "";
  private curves: Curve[] = [];
  private bandsOver = 1;
  private view!: PlotView;
  private chart!: Chart;
  private highlighted: string | null = null;
  private xRange: [number, number] = [0, 1];
  private yRange: [number, number] = [0, 1];
  private readonly tooltip = document.createElement("div");

  constructor(
    private readonly element: HTMLElement,
    private readonly actions: PlotActions,
  ) {
    this.tooltip.className = "tooltip";
    this.tooltip.hidden = true;
  }

  draw(chart: Chart, view: PlotView): void {
    this.chart = chart;
    this.view = view;
    this.curves = this.curvesOf();
    this.measure();
    const { hues, grid, text, axis } = canvasColours.value;
    const shape = [view.x, view.log, grid, ...this.curves.map(({ line, raw }) => `${line.kind} ${line.arm} ${line.run} ${!!raw}`)];
    const data = this.table();
    if (this.plot && this.shape === shape.join("\n")) {
      this.plot.setData(data, true);
      return;
    }
    this.shape = shape.join("\n");
    this.plot?.destroy();
    this.plot = new uPlot(this.options(hues, grid, text, axis), data, this.element);
    this.plot.over.append(this.tooltip);
    this.highlight(this.highlighted);
  }

  /** The first and the last step in view. */
  get steps(): [number, number] | null {
    if (!this.plot || this.chart.metric.startsWith("epoch/")) return null;
    return this.view.x === "step" ? this.xRange : stepsIn(this.chart.lines, ...this.xRange);
  }

  resize(): void {
    const width = Math.floor(this.element.clientWidth);
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  /** Put an arm's lines in front of the others. */
  highlight(arm: string | null): void {
    this.highlighted = arm;
    if (!this.plot) return;
    const known = arm !== null && this.curves.some(({ line }) => line.arm === arm);
    let index = 1;
    for (const { line, raw } of this.curves) {
      const faint = known && line.arm !== arm;
      if (raw) this.plot.series[index++]!.alpha = faint ? 0.06 : 0.28;
      this.plot.series[index++]!.alpha = faint ? 0.18 : line.kind === "member" && this.hasBands() ? 0.45 : 1;
    }
    this.plot.redraw(false, false);
  }

  /** The chart as a file. */
  async image(kind: "png" | "svg"): Promise<Blob | null> {
    const { plot } = this;
    if (!plot) return null;
    const { pngOf, svgOf } = await import("./plot_image");
    const curves = this.curves.map(({ line, ...curve }) => ({
      ...curve,
      name: line.kind === "member" ? memberName(line) : line.arm,
      x: line.x,
      badAt: line.badAt,
      bandOpacity: this.bandOpacity(line),
    }));
    const { text, grid, card } = canvasColours.value;
    const picture = { title: this.chart.metric, plot, curves, text, grid, card, font: getComputedStyle(this.element).fontFamily };
    return kind === "png" ? pngOf(picture) : svgOf(picture);
  }

  destroy(): void {
    this.plot?.destroy();
    this.plot = null;
  }

  private hasBands(): boolean {
    return this.curves.some(({ line }) => line.kind === "band");
  }

  private curvesOf(): Curve[] {
    const { view, chart } = this;
    const colours = canvasColours.value;
    const places = new Map(view.order.map((arm, i) => [arm, i]));
    const shown = chart.lines
      .filter((line) => !view.hidden.has(line.arm) && line.x.length + line.badAt.length > 0)
      .sort((a, b) => Number(a.kind === "band") - Number(b.kind === "band") || (places.get(a.arm) ?? 0) - (places.get(b.arm) ?? 0));
    this.bandsOver = Math.max(1, ...shown.map((line) => (line.kind === "band" ? line.n : 1)));
    const halfLife = this.halfLife(shown);
    const onAxis = view.log ? (value: number) => (value > 0 ? Math.log10(value) : NaN) : (value: number) => value;
    const column = (values: Float64Array | null) => (values && view.log ? values.map(onAxis) : values);
    const bad = shown.reduce((sum, line) => sum + line.bad, 0);
    const points = shown.reduce((sum, line) => sum + line.mean.filter(Number.isFinite).length, 0);
    const below = view.log && shown.some((line) => line.mean.some((value) => value <= 0));
    this.label = [
      `${count(points)} of ${count(chart.total)} points`,
      halfLife && `smoothed: half-life ${view.x === "step" ? `${count(halfLife)} steps` : elapsed(halfLife)}`,
      bad && `${count(bad)} not finite`,
      below && "not positive: left out",
    ].filter(Boolean).join(" \u00b7 ");
    return shown.map((line) => {
      const slot = view.slots.get(line.arm) ?? 0;
      const spread = line.kind === "band" && line.sd && line.n > 1 ? line.sd : null;
      return {
        line,
        colour: colours.hues[hueOf(slot)]!,
        dash: dashOf(slot),
        y: column(halfLife ? smoothed(line.x, line.mean, halfLife) : line.mean)!,
        raw: halfLife ? column(line.mean) : null,
        low: column(spread ? line.mean.map((mean, i) => mean - spread[i]!) : line.min),
        high: column(spread ? line.mean.map((mean, i) => mean + spread[i]!) : line.max),
      };
    });
  }

  /** In units of x; 0: not smoothed. */
  private halfLife(shown: Line[]): number {
    const { smoothing } = this.view;
    if (smoothing === "off" || (smoothing === "auto" && !isRough(shown))) return 0;
    const ends = shown.filter((line) => line.x.length).map((line) => [line.x[0]!, line.x[line.x.length - 1]!] as const);
    const span = Math.max(0, ...ends.map(([first, last]) => (this.view.x === "wall" ? last - first : last)));
    return span > 0 ? rounded(span * (HALF_LIVES[smoothing] ?? HALF_LIVES.medium!)) : 0;
  }

  /** Ranges of both axes, from what is in view. */
  private measure(): void {
    const { log } = this.view;
    const zoom = this.view.x === "step" ? this.view.zoom : null; // a range of steps; on other axes, what came is in view
    let [left, right] = [Infinity, -Infinity];
    let [low, high] = [Infinity, -Infinity];
    const outer: number[] = [];
    for (const { line, y, raw, low: lows, high: highs } of this.curves) {
      const values = raw ?? y;
      for (let i = 0; i < values.length; i++) {
        const x = line.x[i]!;
        if (x < left) left = x;
        if (x > right) right = x;
        if (zoom && (x < zoom[0] || x > zoom[1])) continue;
        const value = values[i]!;
        if (value < low) low = value;
        if (value > high) high = value;
        if (lows && Number.isFinite(lows[i]!)) outer.push(lows[i]!);
        if (highs && Number.isFinite(highs[i]!)) outer.push(highs[i]!);
      }
      for (const x of line.badAt) [left, right] = [Math.min(left, x), Math.max(right, x)];
    }
    // Bands may leave the range where a few buckets would flatten all the curves.
    outer.sort((a, b) => a - b);
    if (outer.length) {
      low = Math.min(low, outer[Math.floor(0.01 * outer.length)]!);
      high = Math.max(high, outer[Math.ceil(0.99 * outer.length) - 1]!);
    }
    this.xRange = zoom ?? (left < right ? [left, right] : Number.isFinite(left) ? [left - 1, left + 1] : [0, 1]);
    this.yRange = log && low === high ? [low - 0.5, high + 0.5] : paddedRange(low, high);
  }

  /** uPlot's columns: one x for all; null is a gap, undefined a place where only another line has a point. */
  private table(): uPlot.AlignedData {
    const column = (values: Float64Array) => Array.from(values, (value) => (Number.isFinite(value) ? value : null));
    const [first] = this.curves;
    if (!first) return [[], []];
    const isShared = this.curves.every(
      ({ line }) => line.x.length === first.line.x.length && line.x.every((x, i) => x === first.line.x[i]),
    );
    const tables = this.curves.map(({ line, y, raw }) => [Array.from(line.x), ...(raw ? [column(raw)] : []), column(y)]);
    if (isShared) return [tables[0]![0], ...tables.flatMap((table) => table.slice(1))] as uPlot.AlignedData;
    return uPlot.join(tables as uPlot.AlignedData[]);
  }

  private options(hues: string[], grid: string, text: string, axis: string): uPlot.Options {
    const font = `11px ${getComputedStyle(this.element).fontFamily}`;
    const common = { font, stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: axis, width: 1, size: 4 } };
    const { x, log } = this.view;
    const series: uPlot.Series[] = [{}];
    for (const { colour, dash, raw } of this.curves) {
      const points: uPlot.Series.Points = { filter: isolatedPoints, size: 5, fill: colour, stroke: colour, width: 0 };
      if (raw) series.push({ stroke: colour, width: 1, points: { show: false }, spanGaps: false });
      series.push({ stroke: colour, width: 1.6, dash, points, spanGaps: false });
    }
    if (series.length === 1) series.push({ stroke: hues[0] });
    const isOfEpochs = this.chart.metric.startsWith("epoch/");
    return {
      width: Math.floor(this.element.clientWidth) || 300,
      height: HEIGHT,
      padding: [6, 14, 0, 0],
      legend: { show: false },
      series,
      scales: {
        x: { time: x === "wall", range: () => this.xRange },
        y: { range: () => this.yRange },
      },
      axes: [
        {
          ...common,
          size: 24,
          gap: 3,
          space: 58,
          ...(x === "wall" ? {} : { values: (_, splits, __, ___, distance) => (x === "relative" ? splits.map(elapsed) : tickTexts(splits, distance)) }),
          ...(x === "relative" ? { incrs: TIME_DISTANCES } : {}),
        },
        {
          ...common,
          size: (_, values) => Math.max(36, 10 + 6.4 * Math.max(0, ...(values ?? []).map((value) => value.length))),
          gap: 3,
          space: TICK_SPACE,
          ...(log
            ? {
                splits: (plot, _, low, high) => logTicks(low, high, Math.max(2, plot.bbox.height / devicePixelRatio / TICK_SPACE)),
                values: (plot, splits) => {
                  const values = splits.map((each) => 10 ** each);
                  const { min, max } = plot.scales.y!;
                  return max! - min! < NARROW && values.length > 1 ? tickTexts(values, values[1]! - values[0]!) : values.map(roundTickText);
                },
              }
            : { values: (_, splits, __, ___, distance) => tickTexts(splits, distance) }),
        },
      ],
      cursor: {
        drag: { x: !isOfEpochs, y: false, setScale: false, dist: 5 }, // a zoom is one of steps, in all charts
        points: { size: 6 },
        bind: { dblclick: () => () => (this.actions.zoomTo(null), null) },
        ...(x === "step" && !isOfEpochs ? { sync: { key: SYNC.key, setSeries: false } } : {}),
      },
      hooks: {
        ready: [
          (plot) => {
            plot.over.addEventListener("mouseenter", () => this.actions.hover(true));
            plot.over.addEventListener("mouseleave", () => (this.actions.hover(false), (this.tooltip.hidden = true)));
          },
        ],
        drawAxes: [(plot) => this.drawBands(plot)],
        draw: [(plot) => this.drawBad(plot)],
        setCursor: [(plot) => this.showTooltip(plot)],
        setSelect: [
          (plot) => {
            if (plot.select.width < 5) return;
            const [from, to] = [plot.select.left, plot.select.left + plot.select.width].map((at) => plot.posToVal(at, "x"));
            plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
            const range = x === "step" ? ([Math.round(from!), Math.round(to!)] as const) : stepsIn(this.chart.lines, from!, to!);
            if (range && range[0] < range[1]) this.actions.zoomTo([...range]);
          },
        ],
      },
    };
  }

  private drawBands(plot: uPlot): void {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const { line, colour, low, high } of this.curves) {
      if (!low || !high) continue;
      ctx.fillStyle = colour;
      ctx.globalAlpha = this.bandOpacity(line);
      let start = 0;
      for (let i = 0; i <= low.length; i++) {
        if (i < low.length && Number.isFinite(low[i]!) && Number.isFinite(high[i]!)) continue;
        if (i > start) this.fillBand(plot, line.x, low, high, start, i);
        start = i + 1;
      }
    }
    ctx.restore();
  }

  private bandOpacity(line: Line): number {
    return (line.kind === "band" ? 0.17 : 0.1) * (this.highlighted === null || this.highlighted === line.arm ? 1 : 0.3);
  }

  private fillBand(plot: uPlot, x: Float64Array, low: Float64Array, high: Float64Array, start: number, end: number): void {
    const { ctx } = plot;
    const left = (i: number) => plot.valToPos(x[i]!, "x", true);
    if (end - start === 1) {
      const [top, bottom] = [plot.valToPos(high[start]!, "y", true), plot.valToPos(low[start]!, "y", true)];
      ctx.fillRect(left(start) - 2, top, 4, bottom - top);
      return;
    }
    ctx.beginPath();
    for (let i = start; i < end; i++) ctx.lineTo(left(i), plot.valToPos(high[i]!, "y", true));
    for (let i = end - 1; i >= start; i--) ctx.lineTo(left(i), plot.valToPos(low[i]!, "y", true));
    ctx.fill();
  }

  /** A mark on the axis of steps for each value that is not finite. */
  private drawBad(plot: uPlot): void {
    const { ctx, bbox } = plot;
    const size = 5 * devicePixelRatio;
    ctx.save();
    for (const { line, colour } of this.curves) {
      ctx.fillStyle = colour;
      for (const x of line.badAt) {
        if (x < this.xRange[0] || x > this.xRange[1]) continue;
        const at = plot.valToPos(x, "x", true);
        ctx.beginPath();
        ctx.moveTo(at, bbox.top + bbox.height - 1.6 * size);
        ctx.lineTo(at - 0.7 * size, bbox.top + bbox.height);
        ctx.lineTo(at + 0.7 * size, bbox.top + bbox.height);
        ctx.fill();
      }
    }
    ctx.restore();
  }

  private showTooltip(plot: uPlot): void {
    const { left, top, event } = plot.cursor;
    // A synchronised cursor has no event of its own.
    if (!event || left === undefined || top === undefined || left < 0 || !plot.over.matches(":hover")) {
      this.tooltip.hidden = true;
      return;
    }
    const at = plot.posToVal(left, "x");
    const found = this.curves.flatMap((curve) => {
      const i = nearest(curve.line.x, at);
      return i < 0 ? [] : [{ ...curve, i, distance: Math.abs(plot.valToPos(curve.y[i]!, "y") - top) }];
    });
    if (!found.length) return;
    const near = found.length <= MOST_IN_TOOLTIP ? found : [...found].sort((a, b) => a.distance - b.distance).slice(0, MOST_IN_TOOLTIP);
    const x = near[0]!.line.x[near[0]!.i]!;
    const rows = [element("b", this.xText(x))];
    for (const { line, colour, i } of near) {
      const name = line.kind === "member" ? memberName(line) : line.arm;
      const row = element("div", "");
      const swatch = element("i", "");
      swatch.style.background = colour;
      const spread = line.kind === "band" && line.n > 1 ? (line.sd?.[i] ?? null) : null;
      row.append(swatch, element("span", name), element("span", withDeviation(line.mean[i]!, spread)));
      rows.push(row);
    }
    if (found.length > near.length) rows.push(element("em", `and ${found.length - near.length} more`));
    const what = this.chart.width > 1 ? `${count(this.chart.width)}-step means` : "values";
    if (this.bandsOver > 1 && this.hasBands()) rows.push(element("em", `\u00b1: sd over ${this.bandsOver} seeds of ${what}`));
    else if (this.chart.width > 1) rows.push(element("em", what));
    this.tooltip.replaceChildren(...rows);
    this.tooltip.hidden = false;
    const isRight = left > plot.over.clientWidth / 2;
    this.tooltip.style.left = isRight ? "" : `${left + 14}px`;
    this.tooltip.style.right = isRight ? `${plot.over.clientWidth - left + 14}px` : "";
  }

  private xText(x: number): string {
    if (this.view.x === "relative") return elapsed(x);
    if (this.view.x === "wall") return new Date(x * 1000).toLocaleString();
    return this.chart.metric.startsWith("epoch/") ? `epoch ${number(x)}` : `step ${count(x)}`;
  }
}

const memberName = (line: Line) => `${line.arm} seed ${line.seed ?? "\u2013"}`;

function element(tag: string, text: string): HTMLElement {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function nearest(sorted: Float64Array, value: number): number {
  const i = lowerBound(sorted, value);
  if (i === 0) return sorted.length ? 0 : -1;
  return i === sorted.length || value - sorted[i - 1]! < sorted[i]! - value ? i - 1 : i;
}

/** uPlot draws no line through a point between two gaps: such a point is drawn as a dot. */
function isolatedPoints(plot: uPlot, index: number, areShown: boolean): number[] | null {
  if (areShown) return null;
  const values = plot.data[index] as (number | null | undefined)[];
  const lone: number[] = [];
  let before: number | null = null;
  let lastAt = -1;
  let isLone = false;
  values.forEach((value, i) => {
    if (value === undefined) return;
    if (isLone && value === null) lone.push(lastAt);
    isLone = value !== null && before === null;
    before = value;
    lastAt = i;
  });
  if (isLone) lone.push(lastAt);
  return lone;
}
