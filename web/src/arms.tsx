// The table of arms: values of the headlines, each with a strip; an arm opens to its runs.
import { Fragment } from "preact";
import { useState } from "preact/hooks";
import { dashOf, hueOf } from "./colours";
import { count, number, shortened, stepsDone, valueText, withDeviation } from "./format";
import { Age, Link, Scroll, StateWord } from "./parts";
import type { Arm, ArmValue, Direction, Experiment, Run } from "./types";
import { openArms, highlightedArm, text, toggled } from "./view";

const MOST_ARMS = 60;
const STRIP = { width: 100, height: 18 };

export function ArmTable({ experiment, slots }: { experiment: Experiment; slots: Map<string, number> }) {
  const [isWhole, setWhole] = useState(false);
  const { arms, headlines } = experiment;
  if (!arms.length) return null;
  const ranges = headlines.map((_, i) => rangeOf(arms.map((arm) => arm.values[i] ?? null)));
  const runs = new Map(experiment.runs.map((run) => [run.id, run]));
  const sorted = sortedArms(arms, headlines.length);
  const shown = isWhole ? sorted : sorted.slice(0, MOST_ARMS);
  const varying = [...new Set(experiment.runs.flatMap((run) => Object.keys(run.config ?? {})))].slice(0, 8);
  return (
    <Scroll label="arms">
      <table class="arms">
        <thead>
          <tr>
            <th>arm</th>
            <th>seeds</th>
            {headlines.map(({ name, direction, rule }, i) => (
              <th key={name} colSpan={2} aria-sort={orderOf(i)}>
                <button class="quiet" title={`${shortened(name, 300)}: ${rule}; sort by it`} onClick={() => (order.value = nextOrder(i))}>
                  <span class="metric">{shortened(name, 300)}</span> <ArrowOf direction={direction} />
                  {orderOf(i) !== "none" && <span aria-hidden="true">{orderOf(i) === "ascending" ? " \u2191" : " \u2193"}</span>}
                </button>
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {shown.map((arm) => (
            <Fragment key={arm.name}>
              <ArmRow arm={arm} experiment={experiment} slot={slots.get(arm.name) ?? 0} ranges={ranges} runs={runs} />
              {openArms.value.has(arm.name) &&
                arm.runs.flatMap((id) => runs.get(id) ?? []).map((run) => (
                  <RunRow key={run.id} run={run} varying={varying} headlines={headlines.map((headline) => headline.name)} />
                ))}
            </Fragment>
          ))}
        </tbody>
      </table>
      {arms.length > shown.length && (
        <button class="more" onClick={() => setWhole(true)}>
          {count(arms.length - shown.length)} more arms
        </button>
      )}
    </Scroll>
  );
}

/** By which headline arms are sorted, "1" or "-1"; by default they are in the order of the plan. */
const order = text("arms");
const orderOf = (place: number) => (order.value === String(place + 1) ? "ascending" : order.value === `-${place + 1}` ? "descending" : "none");
const nextOrder = (place: number) => ({ none: `-${place + 1}`, descending: `${place + 1}`, ascending: "" })[orderOf(place)];

function sortedArms(arms: Arm[], headlines: number): Arm[] {
  const by = Number(order.value);
  const place = Math.abs(by) - 1;
  if (!Number.isInteger(by) || place < 0 || place >= headlines) return arms;
  const mean = ({ values }: Arm) => values[place]?.mean ?? null;
  return [...arms].sort((a, b) => {
    const [x, y] = [mean(a), mean(b)];
    return x === null || y === null ? Number(x === null) - Number(y === null) : Math.sign(by) * (x - y);
  });
}

function ArrowOf({ direction }: { direction: Direction }) {
  if (direction === null) return null;
  return <span class="muted">{direction === "max" ? "\u2191 higher" : "\u2193 lower"}</span>;
}

interface RowProps {
  arm: Arm;
  experiment: Experiment;
  slot: number;
  ranges: [number, number][];
  runs: Map<string, Run>;
}

function ArmRow({ arm, experiment, slot, ranges, runs }: RowProps) {
  const isOpen = openArms.value.has(arm.name);
  const own = arm.runs.flatMap((id) => runs.get(id) ?? []);
  const done = own.filter((run) => run.state === "completed" || run.state === "stopped").length;
  const broken = own.filter((run) => run.state === "failed" || run.state === "stalled").length;
  const isCompared = experiment.arms.length > 1;
  const isWinner = isCompared && arm.winner;
  const isBaseline = isCompared && experiment.baseline === arm.name;
  const { lead } = experiment;
  return (
    <tr
      class={`arm${isWinner ? " winner" : ""}`}
      onMouseEnter={() => (highlightedArm.value = arm.name)}
      onMouseLeave={() => (highlightedArm.value = null)}
    >
      <td class="name">
        <button
          class="open"
          aria-expanded={isOpen}
          onClick={() => (openArms.value = toggled(openArms.value, arm.name))}
        >
          <span class="caret" aria-hidden="true">
            {isOpen ? "\u25be" : "\u25b8"}
          </span>
          <Swatch slot={slot} />
          <span class="text">{shortened(arm.name, 200) || "(no name)"}</span>
        </button>
        {isWinner && <span class="mark best">{"\u2605 best"}</span>}
        {isBaseline && <span class="mark">baseline</span>}
      </td>
      <td class="seeds">
        <StateWord state={arm.state} />{" "}
        <span class="muted">
          {done} of {own.length} done
        </span>
        {broken > 0 && arm.state !== "failed" && arm.state !== "stalled" && <StateWord state="failed">{broken} broken</StateWord>}
      </td>
      {experiment.headlines.map(({ name, direction }, i) => {
        const value = arm.values[i];
        return (
          <Fragment key={name}>
            <td class="value" data-label={name}>
              {value && (
                <>
                  <b>{withDeviation(value.mean, value.sd)}</b>
                  {!isBaseline && value.delta !== null && (
                    <span class="delta" title="difference to the baseline, and its standard error">
                      {withDeviation(value.delta, value.delta_sd, true)}
                    </span>
                  )}
                  {isWinner && isBaseline && lead?.metric === name && lead.delta !== null && lead.delta > 0 === (direction === "max") && (
                    <span class="delta" title={`difference to the second, ${shortened(lead.second, 80)}, and its standard error`}>
                      {withDeviation(lead.delta, lead.delta_sd, true)} to the second
                    </span>
                  )}
                </>
              )}
            </td>
            <td class="points">{value && <Strip value={value} range={ranges[i]!} slot={slot} />}</td>
          </Fragment>
        );
      })}
    </tr>
  );
}

function RunRow({ run, varying, headlines }: { run: Run; varying: string[]; headlines: string[] }) {
  const config = varying.flatMap((key) => (key in (run.config ?? {}) ? [`${key}=${valueText(run.config[key])}`] : []));
  return (
    <tr class="run">
      <td class="name">
        <Link to={`/r/${encodeURIComponent(run.id)}`}>
          seed {run.seed ?? "\u2013"}
          {run.rank ? `, rank ${run.rank}` : ""}
        </Link>{" "}
        <span class="hint">{[run.name && shortened(run.name, 80), ...config].filter(Boolean).join(" \u00b7 ")}</span>
      </td>
      <td class="seeds">
        <StateWord state={run.state} />{" "}
        <span class="muted">
          {run.step !== null && `${stepsDone(run)} ${run.unit ?? "steps"}`}
          {run.state === "running" && (
            <>
              {", "}
              <Age since={run.last_event} suffix=" ago" />
            </>
          )}
        </span>
        {run.error && <div class="hint error">{shortened(run.error.trim().split("\n").pop() ?? "", 200)}</div>}
      </td>
      {headlines.map((name, i) => (
        <td class="value" key={name} colSpan={2} data-label={name}>
          {number(run.values[i])}
        </td>
      ))}
    </tr>
  );
}

export function Swatch({ slot }: { slot: number }) {
  return (
    <svg class="swatch" width="18" height="8" aria-hidden="true">
      <line x1="0" y1="4" x2="18" y2="4" class={`hue-${hueOf(slot)}`} stroke-dasharray={dashOf(slot).join(" ")} />
    </svg>
  );
}

function rangeOf(values: (ArmValue | null)[]): [number, number] {
  const all = values.flatMap((value) =>
    value === null ? [] : [...value.points, ...(value.mean === null ? [] : [value.mean - (value.sd ?? 0), value.mean + (value.sd ?? 0)])],
  );
  const known = all.filter((each): each is number => each !== null && Number.isFinite(each));
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return low < high ? [low, high] : [low - 1, low + 1];
}

/** A dot for each seed, a bar for mean ± sd; all arms of a column on one scale. */
function Strip({ value, range, slot }: { value: ArmValue; range: [number, number]; slot: number }) {
  const { width, height } = STRIP;
  const at = (each: number) => 5 + ((width - 10) * (each - range[0])) / (range[1] - range[0]);
  const middle = height / 2;
  const { mean, sd } = value;
  const text = value.points.map(number).join(", ");
  return (
    <svg class={`strip hue-${hueOf(slot)}`} width={width} height={height} role="img" aria-label={`seeds: ${text}`}>
      <title>{`seeds: ${text}\nscale: ${number(range[0])} to ${number(range[1])}`}</title>
      <line class="axis" x1="0" x2={width} y1={middle} y2={middle} />
      {mean !== null && sd ? (
        <rect class="spread" x={at(mean - sd)} width={Math.max(1, at(mean + sd) - at(mean - sd))} y={middle - 5} height="10" rx="2" />
      ) : null}
      {value.points.map((point, i) =>
        point !== null && Number.isFinite(point) ? <circle key={i} cx={at(point)} cy={middle} r="2.6" /> : null,
      )}
      {mean !== null && <line class="mean" x1={at(mean)} x2={at(mean)} y1={middle - 7} y2={middle + 7} />}
    </svg>
  );
}
