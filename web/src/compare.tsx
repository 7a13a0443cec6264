// Several runs side by side: what differs in their configs, their last and best values, and their curves overlaid.
import type { ComponentChildren } from "preact";
import { useMemo } from "preact/hooks";
import { Swatch } from "./arms";
import { Charts } from "./charts";
import { slotsOf } from "./colours";
import { Exports } from "./exports";
import { type Answer, useFollowed } from "./followed";
import { count, counted, duration, number, setting as settingText, shortened, stepsDone } from "./format";
import { Age, Failure, Link, Loading, Scroll, StateWord, useTitle } from "./parts";
import { PairedAnswers } from "./paired";
import type { Metric, RunHead } from "./types";
import { names } from "./view";

interface Compared extends Answer {
  unknown: string[];
  runs: RunHead[];
  /** The arms of their experiment, if they are of one. */
  arms: string[];
  config: { key: string; values: unknown[] }[];
  /** How many keys all of them have alike. */
  same: number;
  metrics: (Metric & { last: (number | null)[]; best: (number | null)[] })[];
}

const ids = names("r");
const MOST_METRICS = 12;

export function ComparePage() {
  const query = new URLSearchParams([...ids.value].map((id) => ["r", id]));
  const [compared, error] = useFollowed<Compared>(`/api/compare?${query}`, ({ runs }) => (runs[0] ? `e/${runs[0].experiment.id}` : null));
  useTitle("compare");
  if (!compared) return <Loading error={error} />;
  const experiments = [...new Map(compared.runs.map(({ experiment }) => [experiment.id, experiment])).values()];
  return (
    <main>
      <div class="tools">
        <h1>Compare</h1>
        {experiments.map(({ id, name }) => (
          <Link key={id} to={`/e/${encodeURIComponent(id)}`}>
            {shortened(name, 80)}
          </Link>
        ))}
        <span class="muted">{counted(compared.runs.length, "run")}</span>
        {compared.unknown.length > 0 && <StateWord state="failed">{counted(compared.unknown.length, "run")} not found</StateWord>}
      </div>
      <Failure error={error} />
      {compared.runs.length ? <Shown compared={compared} /> : <p class="empty">Select runs in the list of an experiment's runs.</p>}
    </main>
  );
}

/** What to call each run: its name, with that of its experiment where several are compared. */
function labelsOf(runs: RunHead[]): Map<string, string> {
  const isOne = new Set(runs.map(({ experiment }) => experiment.id)).size < 2;
  const labels = new Map<string, string>();
  for (const run of runs) {
    const label = isOne ? run.name : `${shortened(run.experiment.name, 60)} \u00b7 ${run.name}`;
    const isTaken = [...labels.values()].includes(label);
    labels.set(run.id, isTaken ? `${label} ${run.id.slice(0, 4)}` : label);
  }
  return labels;
}

/** Colours as on the page of the experiment, where each run is of another arm. */
function slotsOfRuns(runs: RunHead[], arms: string[], labels: Map<string, string>): Map<string, number> {
  const isOfArms = arms.length > 0 && new Set(runs.map(({ arm }) => arm)).size === runs.length;
  if (!isOfArms) return slotsOf([...labels.values()]);
  const ofArms = slotsOf(arms);
  return new Map([...ofArms, ...runs.map(({ id, arm }) => [labels.get(id)!, ofArms.get(arm) ?? 0] as const)]);
}

function Shown({ compared }: { compared: Compared }) {
  const { runs, arms, config, same, metrics } = compared;
  const key = runs.map(({ id }) => id).join(" ");
  const labels = useMemo(() => labelsOf(runs), [key]);
  const slots = useMemo(() => slotsOfRuns(runs, arms, labels), [labels, arms.join("\0")]);
  const sources = useMemo(() => {
    const experiments = [...new Set(runs.map(({ experiment }) => experiment.id))];
    return experiments.map((experiment) => ({ experiment, runs: runs.filter((run) => run.experiment.id === experiment).map(({ id }) => id) }));
  }, [key]);
  const charted = { id: sources[0]!.experiment, arms: [...labels.values()].map((name) => ({ name })), headlines: [], metrics: metrics.filter(({ points }) => points > 0), sources, labels };
  const rows = () => [
    ["", ...labels.values()],
    ...config.map(({ key, values }) => [key, ...values.map((value) => (value === null ? null : settingText(value)))]),
    ...metrics.map(({ name, last }) => [name, ...last]),
  ];
  return (
    <>
      <Scroll label="compared runs">
        <table class="plain compared">
          <thead>
            <tr>
              <td />
              {runs.map((run) => (
                <th key={run.id} class="num" scope="col">
                  {sources.length > 1 && <div class="hint">{shortened(run.experiment.name, 80)}</div>}
                  <Swatch slot={slots.get(labels.get(run.id)!) ?? 0} /> <Link to={`/r/${encodeURIComponent(run.id)}`}>{shortened(run.name, 80)}</Link>
                  <button
                    class="drop"
                    disabled={runs.length < 2}
                    aria-label={`leave out ${shortened(labels.get(run.id)!, 80)}`}
                    title="leave out"
                    onClick={() => (ids.value = new Set(runs.map(({ id }) => id).filter((id) => id !== run.id)))}
                  >
                    {"\u2715"}
                  </button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            <Line label="state" cells={runs.map((run) => <StateWord state={run.state} />)} />
            <Line label="arm" cells={runs.map((run) => shortened(run.arm, 60))} />
            <Line label="seed" cells={runs.map((run) => run.seed ?? "")} />
            <Line label="steps" cells={runs.map(stepsDone)} />
            <Line label="started" cells={runs.map((run) => <Age since={run.started} suffix=" ago" />)} />
            <Line label="took" cells={runs.map((run) => (run.seconds === null ? "" : duration(run.seconds)))} />
            <Divider columns={runs.length + 1} text={config.length ? `config: ${counted(config.length, "difference")}, ${count(same)} the same` : `config: no difference, ${count(same)} the same`} />
            {config.map(({ key, values }) => (
              <Line key={key} label={key} cells={values.map((value) => (value === null ? <span class="faint">{"\u2013"}</span> : settingText(value)))} />
            ))}
            <Divider columns={runs.length + 1} text="last values, and the best" />
            {metrics.slice(0, MOST_METRICS).map((metric) => (
              <MetricLine key={metric.name} metric={metric} />
            ))}
          </tbody>
        </table>
        <Exports name="compared-runs" rows={rows} />
      </Scroll>
      {runs.map(({ id, error }) => error && <p key={id} class="prose"><span class="label">{shortened(labels.get(id)!, 80)}</span> <span class="error">{shortened(error, 300)}</span></p>)}
      <Charts experiment={charted} slots={slots} isGrouped={metrics.length > 24} />
      {runs.length > 1 && <PairedAnswers runs={runs} labels={labels} slots={slots} />}
    </>
  );
}

function Line({ label, cells }: { label: string; cells: ComponentChildren[] }) {
  return (
    <tr>
      <th scope="row">{shortened(label, 120)}</th>
      {cells.map((cell, i) => (
        <td key={i} class="num">
          {cell}
        </td>
      ))}
    </tr>
  );
}

function Divider({ columns, text }: { columns: number; text: string }) {
  return (
    <tr class="divider">
      <th colSpan={columns} scope="colgroup">
        {text}
      </th>
    </tr>
  );
}

function MetricLine({ metric }: { metric: Compared["metrics"][number] }) {
  const { name, direction, last, best } = metric;
  const known = last.filter((value): value is number => value !== null);
  const leading = direction === null || known.length < 2 ? null : direction === "min" ? Math.min(...known) : Math.max(...known);
  const isShared = known.filter((value) => value === leading).length > 1;
  return (
    <tr>
      <th scope="row">
        {shortened(name, 120)} {direction && <span class="muted">{direction === "max" ? "\u2191" : "\u2193"}</span>}
      </th>
      {last.map((value, i) => (
        <td key={i} class={`num${value !== null && value === leading && !isShared ? " best" : ""}`}>
          {value !== null && value === leading && !isShared && <span class="mark best">{"\u2605"}</span>} {number(value)}
          {best[i] !== null && best[i] !== value && <span class="muted" title="the best value"> ({number(best[i])})</span>}
        </td>
      ))}
    </tr>
  );
}
