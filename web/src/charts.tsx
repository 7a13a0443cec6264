// The charts of an experiment: toolbar, legend, and cards that exist while they are in view.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { effect } from "@preact/signals";
import { chartOf, fetchChart } from "./api";
import { Swatch } from "./arms";
import { canvasColours } from "./colours";
import { merged } from "./curves";
import { save } from "./exports";
import { count, csv, number, shortened } from "./format";
import { connection, subscribe } from "./live";
import { Search } from "./parts";
import { Plot } from "./plot";
import type { Chart, Metric } from "./types";
import * as view from "./view";

const BUCKETS = 180;
/** Live updates add points; beyond this a coarser level is fetched. */
const MOST_POINTS = 2 * BUCKETS;
const REFETCH_MS = 2_000;
const RETRY_MS = 3_000;

/** What charts are drawn of: an experiment, or some runs of one or several. */
export interface Charted {
  id: string;
  arms: { name: string }[];
  headlines: { name: string }[];
  metrics: Metric[];
  /** The runs to draw, each as a line that `labels` names; without it, all arms. */
  sources?: { experiment: string; runs: string[] }[];
  labels?: Map<string, string>;
}

interface Props {
  experiment: Charted;
  slots: Map<string, number>;
  isGrouped: boolean;
}

export function Charts({ experiment, slots, isGrouped }: Props) {
  const order = useOrder(experiment);
  const { matches, error } = useMemo(() => matcher(view.filter.value), [view.filter.value]);
  const byName = new Map(experiment.metrics.map((metric) => [metric.name, metric]));
  const found = order.flatMap((name) => byName.get(name) ?? []).filter((metric) => matches(metric.name));
  const drawn = found.filter((metric) => metric.constant === null);
  const constants = found.filter((metric) => metric.constant !== null);
  const grouping = view.grouping.value;
  const sections = (grouping === "auto" ? isGrouped : grouping === "yes") ? sectionsOf(drawn) : [["", drawn] as const];
  if (!experiment.metrics.length) return <p class="empty">No metric yet.</p>;
  return (
    <section class="charts">
      <Toolbar found={drawn.length} of={experiment.metrics.length} error={error} hasArms={!experiment.sources} />
      <Legend experiment={experiment} slots={slots} />
      {sections.map(([section, metrics]) => (
        <div key={section}>
          <h2 class={section ? "" : "unseen"}>{section || "charts"}</h2>
          <div class="cards">
            {metrics.map((metric) => (
              <Card key={metric.name} metric={metric} experiment={experiment} slots={slots} />
            ))}
          </div>
        </div>
      ))}
      {constants.length > 0 && (
        <p class="constants">
          <span class="label">{experiment.sources ? "constant" : "the same in all runs"}</span>{" "}
          {constants.map((metric) => (
            <span key={metric.name} class="constant">
              <span class="name">{metric.name}</span> {number(metric.constant)}
            </span>
          ))}
        </p>
      )}
    </section>
  );
}

/** Names in the order to draw, headlines first; metrics that appear later come last, so that no card moves. */
function useOrder(experiment: Charted): string[] {
  const order = useRef<string[]>([]);
  const known = new Set(order.current);
  const headlines = experiment.headlines.map((headline) => headline.name);
  const names = experiment.metrics.map((metric) => metric.name);
  const sorted = [...headlines.filter((name) => names.includes(name)), ...names.filter((name) => !headlines.includes(name))];
  const added = sorted.filter((name) => !known.has(name));
  if (added.length) order.current = [...order.current, ...added];
  return order.current;
}

function matcher(text: string): { matches: (name: string) => boolean; error: string } {
  try {
    const pattern = new RegExp(text, "i");
    return { matches: (name) => pattern.test(name), error: "" };
  } catch {
    return { matches: (name) => name.toLowerCase().includes(text.toLowerCase()), error: "not a regular expression: searched as text" };
  }
}

function sectionsOf(metrics: Metric[]): (readonly [string, Metric[]])[] {
  const sections = new Map<string, Metric[]>();
  for (const metric of metrics) {
    const name = metric.section ?? metric.name.split("/")[0]!;
    const section = sections.get(name);
    if (section) section.push(metric);
    else sections.set(name, [metric]);
  }
  return [...sections];
}

function Toolbar({ found, of, error, hasArms }: { found: number; of: number; error: string; hasArms: boolean }) {
  const range = view.zoom.value;
  const isLog = view.logCharts.value.has("*");
  const cycles: [label: string, value: string, key: string, next: () => void][] = [
    ["lines", view.lines.value, "m", () => (view.lines.value = view.next(view.LINES, view.lines.value))],
    ["y", isLog ? "log" : "linear", "l", () => (view.logCharts.value = view.toggled(view.logCharts.value, "*"))],
    ["x", view.xAxis.value, "x", view.cycleX],
    ["group", view.grouping.value, "g", () => (view.grouping.value = view.next(view.GROUPINGS, view.grouping.value))],
    ["smooth", view.smoothing.value, "s", () => (view.smoothing.value = view.next(view.SMOOTHINGS, view.smoothing.value))],
  ];
  return (
    <div class="tools">
      <Search label="filter metrics" hint="filter metrics: regex  ( / )" />
      {cycles.slice(hasArms ? 0 : 1).map(([label, value, key, next]) => (
        <button key={label} title={`next choice ( ${key} )`} onClick={next}>
          <span class="muted">{label}</span> {value}
        </button>
      ))}
      {range && (
        <button title="whole range ( 0, or double click )" onClick={() => (view.zoom.value = null)}>
          {`steps ${count(range[0])} \u2013 ${count(range[1])} \u2715`}
        </button>
      )}
      <span class="muted">
        {view.filter.value ? `${found} of ${of} metrics` : ""} {error}
      </span>
    </div>
  );
}

function Legend({ experiment, slots }: { experiment: Charted; slots: Map<string, number> }) {
  if (experiment.arms.length < 2) return null;
  const hidden = view.hiddenArms.value;
  return (
    <div class="legend">
      {experiment.arms.slice(0, 60).map(({ name }) => (
        <button
          key={name}
          aria-pressed={!hidden.has(name)}
          title="show or hide"
          onClick={() => (view.hiddenArms.value = view.toggled(hidden, name))}
          onMouseEnter={() => (view.highlightedArm.value = name)}
          onMouseLeave={() => (view.highlightedArm.value = null)}
          onFocus={() => (view.highlightedArm.value = name)}
          onBlur={() => (view.highlightedArm.value = null)}
        >
          <Swatch slot={slots.get(name) ?? 0} />
          <span class="text">{shortened(name, 60)}</span>
        </button>
      ))}
    </div>
  );
}

const inView = new WeakMap<Element, (isIn: boolean) => void>();
const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) inView.get(entry.target)?.(entry.isIntersecting);
  },
  { rootMargin: "160px 0px" },
);

function Card({ metric, experiment, slots }: { metric: Metric; experiment: Charted; slots: Map<string, number> }) {
  const card = useRef<HTMLElement>(null);
  const [isIn, setIn] = useState(false);
  useLayoutEffect(() => {
    const element = card.current!;
    inView.set(element, setIn);
    observer.observe(element);
    return () => observer.unobserve(element);
  }, []);
  const isLog = view.logCharts.value.has("*") !== view.logCharts.value.has(metric.name);
  const steps = useRef<() => [number, number] | null>(() => null);
  const setActive = (isActive: boolean) => (view.activeChart.value = isActive ? { metric: metric.name, steps: () => steps.current() } : null);
  return (
    <article class="card" ref={card} tabIndex={0} aria-label={metric.name} onFocus={() => setActive(true)} onBlur={() => setActive(false)}>
      <h3 title={shortened(metric.name, 500)}>
        <span class="text">{metric.name}</span>
        {isLog && <span class="mark">log</span>}
      </h3>
      {isIn ? (
        <Curves metric={metric.name} experiment={experiment} slots={slots} isLog={isLog} setActive={setActive} steps={steps} />
      ) : (
        <div class="plot" />
      )}
    </article>
  );
}

interface CurvesProps {
  metric: string;
  experiment: Charted;
  slots: Map<string, number>;
  isLog: boolean;
  setActive: (isActive: boolean) => void;
  /** Is set to what returns the steps in view. */
  steps: { current: () => [number, number] | null };
}

function Curves({ metric, experiment, slots, isLog, setActive, steps }: CurvesProps) {
  const host = useRef<HTMLDivElement>(null);
  const plot = useRef<Plot | null>(null);
  const [chart, error] = useChart(experiment, metric);
  const hidden = view.hiddenArms.value;
  const smoothing = view.smoothing.value;
  const theme = view.theme.value;
  const [label, setLabel] = useState("");
  const order = experiment.arms.map((arm) => arm.name);

  useLayoutEffect(() => {
    steps.current = () => plot.current?.steps ?? null;
    plot.current = new Plot(host.current!, { zoomTo: (range) => (view.zoom.value = range), hover: setActive });
    const resized = new ResizeObserver(() => plot.current?.resize());
    resized.observe(host.current!);
    const stop = effect(() => plot.current?.highlight(view.highlightedArm.value));
    return () => {
      stop();
      resized.disconnect();
      plot.current?.destroy();
      setActive(false);
    };
  }, []);

  useLayoutEffect(() => {
    if (!chart || !plot.current) return;
    canvasColours.value;
    plot.current.draw(chart.chart, { log: isLog, smoothing, x: chart.x, zoom: chart.zoom, slots, order, hidden });
    setLabel(plot.current.label);
  }, [chart, isLog, smoothing, theme, slots, hidden, order.join("\0")]);

  const fileName = metric.slice(0, 100);
  return (
    <>
      <div class="plot" ref={host} />
      <p class="corner" title={label}>
        <span class="files">
          <button onClick={() => chart && save(`${fileName}.csv`, new Blob([tableOf(chart.chart)], { type: "text/csv" }))}>CSV</button>
          {(["png", "svg"] as const).map((kind) => (
            <button key={kind} onClick={async () => save(`${fileName}.${kind}`, (await plot.current?.image(kind)) ?? null)}>
              {kind.toUpperCase()}
            </button>
          ))}
        </span>
        <span class="drawn">{error || label}</span>
      </p>
    </>
  );
}

/** What is drawn, as a table. */
function tableOf({ metric, lines, width }: Chart): string {
  const rows = lines.flatMap((line) =>
    Array.from(line.x, (x, i) => [
      line.kind, line.arm, line.seed, line.steps?.[i] ?? x, width, line.mean[i]!, line.sd?.[i] ?? null, line.min?.[i] ?? null, line.max?.[i] ?? null,
    ]),
  );
  return csv([["line", "arm", "seed", "step", "steps_in_bucket", metric, "sd", "min", "max"], ...rows]);
}

interface Loaded {
  chart: Chart;
  /** What it was loaded for; the URL may be ahead of it. */
  x: (typeof view.X_AXES)[number];
  zoom: [number, number] | null;
}

/** Live updates have the lines of all runs of an experiment. */
function ofRuns(chart: Chart, runs: string[] | null): Chart {
  return runs ? { ...chart, lines: chart.lines.filter((line) => line.run !== null && runs.includes(line.run)) } : chart;
}

/** One chart of those of several experiments; lines of runs have the names of the runs. */
function joined(parts: Chart[], labels: Map<string, string> | undefined): Chart {
  const first = parts[0]!;
  if (!labels) return first;
  const lines = parts.flatMap((part) => part.lines).map((line) => ({ ...line, arm: labels.get(line.run ?? "") ?? line.arm }));
  const total = lines.reduce((sum, { points, bad }) => sum + points + bad, 0);
  return { ...first, width: Math.max(...parts.map(({ width }) => width)), total, lines };
}

/** A chart as the view's settings ask for it, updated live. */
function useChart(experiment: Charted, metric: string): [Loaded | null, string] {
  const [loaded, setLoaded] = useState<Loaded | null>(null);
  const [error, setError] = useState("");
  const { labels } = experiment;
  const lines = experiment.sources ? "members" : view.lines.value;
  const sources = experiment.sources ?? [{ experiment: experiment.id, runs: null }];
  const x = view.xAxis.value;
  const isOfEpochs = metric.startsWith("epoch/");
  const zoom = isOfEpochs ? null : view.zoom.value;
  const isPaused = view.paused.value;
  const isLost = connection.value === "lost";

  useEffect(() => {
    let isOver = false;
    let timer = 0;
    let unsubscribe = () => {};
    let drawing = 0;
    const load = async () => {
      timer = 0;
      unsubscribe();
      const [from, to] = zoom ?? [null, null];
      try {
        const query = { metric, lines, from, to, buckets: BUCKETS, x };
        const answers = await Promise.all(sources.map(({ experiment, runs }) => fetchChart(experiment, { ...query, runs })));
        if (isOver) return;
        const parts = answers.map(({ chart }) => chart);
        const show = () => setLoaded({ chart: joined(parts, labels), x, zoom });
        setError("");
        show();
        if (isPaused) return;
        const ends = answers.map(({ chart, frame }, i) =>
          subscribe(`c/${sources[i]!.experiment}/${lines}/${chart.width}/${metric}`, frame, ({ header, data }) => {
            if (header.kind !== "data") {
              loadAfter(header.kind === "reset" ? 0 : REFETCH_MS / 4);
            } else if (x !== "step") {
              loadAfter(REFETCH_MS); // updates count in steps
            } else {
              const part = merged(parts[i]!, ofRuns(chartOf(header.chart, data), sources[i]!.runs), from, to);
              parts[i] = part;
              if (part.lines.some((line) => line.x.length > MOST_POINTS)) loadAfter(REFETCH_MS);
              drawing ||= requestAnimationFrame(() => {
                drawing = 0;
                show();
              });
            }
          }),
        );
        unsubscribe = () => ends.forEach((end) => end());
      } catch (failed) {
        if (isOver) return;
        setError(failed instanceof Error ? failed.message : String(failed));
        loadAfter(RETRY_MS);
      }
    };
    const loadAfter = (ms: number) => {
      if (!timer && !isOver) timer = window.setTimeout(load, ms);
    };
    void load();
    return () => {
      isOver = true;
      clearTimeout(timer);
      cancelAnimationFrame(drawing);
      unsubscribe();
    };
  }, [JSON.stringify(sources), metric, lines, x, zoom?.[0], zoom?.[1], isPaused]);

  return [loaded, isLost && !loaded ? "connection lost" : error];
}
