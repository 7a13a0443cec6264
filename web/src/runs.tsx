// The runs of an experiment: what differs in their configs, their metrics; filter, sort, columns, CSV, compare.
import { useMemo, useRef } from "preact/hooks";
import { Swatch } from "./arms";
import { slotsOf } from "./colours";
import { Exports } from "./exports";
import { type Answer, useFollowed, useSettled } from "./followed";
import { count, counted, duration, number, setting as settingText, shortened, stepsDone } from "./format";
import { ExperimentHead, type PageProps } from "./further";
import { Age, Failure, Link, Loading, Search, StateWord, useTitle } from "./parts";
import { type Column, sort, sorted, Table } from "./table";
import type { Direction, Run, State } from "./types";
import { filter, names, navigate, toggled } from "./view";

interface RunRow extends Omit<Run, "values"> {
  seconds: number | null;
  last: (number | null)[];
  best: (number | null)[];
  at: (number | null)[];
}

interface Runs extends Answer {
  id: string;
  name: string;
  state: State;
  total: number;
  /** Why the filter cannot be applied. */
  problem: string | null;
  config: string[];
  metrics: string[];
  shown: { name: string; direction: Direction }[];
  /** Steps at which values of metrics were asked for. */
  at: { step: number; name: string }[];
  arms: string[];
  rows: RunRow[];
}

const MOST_COMPARED = 24;
const MOST_CHOICES = 300;
const EXAMPLES = "free text   /regex/   lr>1e-4   arm:baseline   state:failed   -tag:old   \"best loss\"<0.5";

/** The id of a column that has a metric at a step. */
const AT_STEP = /^a:\d+:./s;

const chosenColumns = names("cols");
const selected = names("r");

export function RunsPage({ id }: PageProps) {
  const text = useSettled(filter.value);
  const columnsInUrl = chosenColumns.value;
  const metrics = [...columnsInUrl].flatMap((column) => /^[mb]:(.+)$/s.exec(column)?.[1] ?? []);
  const at = [...columnsInUrl].filter((column) => AT_STEP.test(column)).map((column) => ["at", column.slice(2)]);
  const query = new URLSearchParams([...(text ? [["q", text]] : []), ...[...new Set(metrics)].map((name) => ["metric", name]), ...at]);
  const url = `/api/experiments/${encodeURIComponent(id)}/runs?${query}`;
  const [runs, error] = useFollowed<Runs>(url, () => `e/${id}`);
  useTitle("runs", runs?.name);
  const slots = useMemo(() => slotsOf(runs?.arms ?? []), [runs?.arms.join("\0")]);
  if (!runs) return <Loading error={error} />;
  const all = columnsOf(runs, slots);
  const isShown = ({ id }: Column<RunRow>) => (columnsInUrl.size ? columnsInUrl.has(id) : isDefault(id, runs));
  const shown = [selectColumn, ...all.filter((column) => column.id === "run" || isShown(column))];
  const rows = sorted(runs.rows, shown, sort.value);
  const chosen = [...selected.value].slice(0, MOST_COMPARED);
  const written = shown.filter(({ label }) => label);
  const table = () => [written.map(({ label }) => label), ...rows.map((row) => written.map(({ value }) => value(row)))];
  return (
    <main>
      <ExperimentHead experiment={runs} current="runs" />
      <div class="tools">
        <Search label="filter runs" hint="filter:  lr>1e-4  arm:baseline  state:failed  /regex/   ( / )" title={EXAMPLES} isWide isInvalid={runs.problem !== null} />
        <span class="muted" role="status">
          {runs.rows.length === runs.total ? counted(runs.total, "run") : `${count(runs.rows.length)} of ${counted(runs.total, "run")}`}
        </span>
        <span class="right">
          <button
            class={chosen.length > 1 ? "main" : ""}
            disabled={chosen.length < 2}
            title="select runs in the table"
            onClick={() => navigate(`/c?r=${chosen.map(encodeURIComponent).join(",")}`)}
          >
            {chosen.length > 1 ? `compare ${chosen.length} runs` : "compare"}
          </button>
          {selected.value.size > 0 && <button onClick={() => (selected.value = new Set())}>clear</button>}
          <ColumnChoice all={all} metrics={runs.metrics} isShown={isShown} />
          <Exports name={`${runs.name}-runs`} rows={table} />
        </span>
      </div>
      {runs.problem && <p class="problem" role="alert">{runs.problem}</p>}
      <Failure error={error} />
      {rows.length ? (
        <Table label="runs" rows={rows} columns={shown} keyOf={(row) => row.id} classOf={(row) => (selected.value.has(row.id) ? "selected" : "")} />
      ) : (
        <p class="empty">{runs.total ? "No run matches the filter." : "No run yet."}</p>
      )}
    </main>
  );
}

const selectColumn: Column<RunRow> = {
  id: "select",
  label: "",
  value: () => null,
  text: () => "",
  width: 2,
  cell: (row) => (
    <input
      type="checkbox"
      aria-label={`select ${shortened(row.name ?? row.id, 80)}`}
      checked={selected.value.has(row.id)}
      onChange={() => (selected.value = toggled(selected.value, row.id))}
    />
  ),
};

function isDefault(id: string, runs: Runs): boolean {
  if (id.startsWith("b:")) return id === `b:${runs.shown[0]?.name}`;
  return !id.startsWith("a:") && !["started", "arm", "seed", "checkpoints", "error"].includes(id);
}

function columnsOf(runs: Runs, slots: Map<string, number>): Column<RunRow>[] {
  return [
    {
      id: "run",
      label: "run",
      value: (row) => row.name ?? row.id,
      text: (row) => `${row.name ?? row.id}${" ".repeat(6)}`,
      cell: (row) => (
        <span class="run-name">
          <Swatch slot={slots.get(row.arm ?? "") ?? 0} />
          <Link to={`/r/${encodeURIComponent(row.id)}`}>{shortened(row.name ?? row.id, 200)}</Link>
        </span>
      ),
    },
    { id: "state", label: "state", width: 13, value: (row) => row.state, text: (row) => row.state, cell: ({ state, error }) => <span title={error ?? undefined}><StateWord state={state} /></span> },
    { id: "arm", label: "arm", value: (row) => row.arm, text: (row) => row.arm ?? "" },
    { id: "seed", label: "seed", isNumber: true, value: (row) => row.seed, text: (row) => (row.seed === null ? "" : String(row.seed)) },
    {
      id: "step",
      label: "steps",
      isNumber: true,
      value: (row) => row.step === null ? null : row.step + 1,
      text: stepsDone,
    },
    ...runs.config.map(
      (key): Column<RunRow> => ({
        id: `c:${key}`,
        label: key,
        isNumber: runs.rows.every(({ config }) => !(key in config) || typeof config[key] === "number"),
        value: (row) => plainValue(row.config[key]),
        text: (row) => (key in row.config ? settingText(row.config[key]) : ""),
      }),
    ),
    ...runs.shown.flatMap(({ name, direction }, i): Column<RunRow>[] => [
      { id: `m:${name}`, label: name, title: `last value of ${name}`, isNumber: true, value: (row) => row.last[i] ?? null, text: (row) => number(row.last[i]) },
      ...(direction === null
        ? []
        : [
            {
              id: `b:${name}`,
              label: `best ${name}`,
              title: `the ${direction === "min" ? "smallest" : "largest"} value of ${name}`,
              isNumber: true,
              value: (row: RunRow) => row.best[i] ?? null,
              text: (row: RunRow) => number(row.best[i]),
            },
          ]),
    ]),
    ...runs.at.map(
      ({ step, name }, i): Column<RunRow> => ({
        id: `a:${step}:${name}`,
        label: `${name} at ${count(step)}`,
        title: `${name} at step ${count(step)}, or the last value before it, of runs that have come so far`,
        isNumber: true,
        value: (row) => row.at[i] ?? null,
        text: (row) => number(row.at[i]),
      }),
    ),
    {
      id: "duration",
      label: "took",
      isNumber: true,
      value: (row) => row.seconds,
      text: (row) => (row.seconds === null ? "" : duration(row.seconds)),
    },
    { id: "started", label: "started", isNumber: true, width: 9, value: (row) => row.started, text: () => "", cell: (row) => <Age since={row.started} suffix=" ago" /> },
    { id: "checkpoints", label: "checkpoints", isNumber: true, value: (row) => row.checkpoints, text: (row) => count(row.checkpoints) },
    { id: "error", label: "error", width: 60, value: (row) => row.error, text: (row) => row.error ?? "" },
  ];
}

function plainValue(value: unknown): string | number | null {
  if (value === undefined || value === null) return null;
  return typeof value === "number" || typeof value === "string" ? value : JSON.stringify(value);
}

interface ChoiceProps {
  all: Column<RunRow>[];
  metrics: string[];
  isShown: (column: Column<RunRow>) => boolean;
}

/** A list of all columns, to tick; metrics that are not loaded yet too. */
function ColumnChoice({ all, metrics, isShown }: ChoiceProps) {
  const shown = all.filter((column) => column.id !== "run" && isShown(column)).map(({ id }) => id);
  const known = new Set(all.map(({ id }) => id));
  const more = metrics.filter((name) => !known.has(`m:${name}`)).slice(0, MOST_CHOICES);
  const toggle = (id: string) => {
    const next = toggled(new Set(shown), id);
    chosenColumns.value = next.size ? next : new Set(["run"]);
  };
  const Choice = ({ id, label }: { id: string; label: string }) => (
    <label>
      <input type="checkbox" checked={shown.includes(id)} onChange={() => toggle(id)} /> <span class="text">{shortened(label, 80)}</span>
    </label>
  );
  return (
    <details class="choice">
      <summary>columns</summary>
      <div>
        {chosenColumns.value.size > 0 && <button onClick={() => (chosenColumns.value = new Set())}>as at first</button>}
        <AtStep metrics={metrics} add={toggle} />
        {all.filter(({ id }) => id !== "run").map(({ id, label }) => (
          <Choice key={id} id={id} label={label} />
        ))}
        {more.length > 0 && <p class="muted">further metrics</p>}
        {more.map((name) => (
          <Choice key={name} id={`m:${name}`} label={name} />
        ))}
      </div>
    </details>
  );
}

/** Adds a column with a metric at a step. */
function AtStep({ metrics, add }: { metrics: string[]; add: (id: string) => void }) {
  const metric = useRef<HTMLSelectElement>(null);
  const step = useRef<HTMLInputElement>(null);
  if (!metrics.length) return null;
  const submit = (event: Event) => {
    event.preventDefault();
    const at = Number(step.current!.value);
    if (Number.isInteger(at) && at >= 0) add(`a:${at}:${metric.current!.value}`);
  };
  return (
    <form class="at-step" onSubmit={submit}>
      <select ref={metric} aria-label="metric">
        {metrics.slice(0, MOST_CHOICES).map((name) => (
          <option key={name} value={name}>
            {shortened(name, 60)}
          </option>
        ))}
      </select>
      <label>
        at step <input ref={step} type="number" min="0" required />
      </label>
      <button>add</button>
    </form>
  );
}
