// The evals of an experiment: scores by arm, their curves, and the predictions row by row.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { getJson } from "./api";
import { Swatch } from "./arms";
import { Charts } from "./charts";
import { slotsOf } from "./colours";
import { type Answer, useFollowed, useSettled } from "./followed";
import { count, counted, shortened, withDeviation } from "./format";
import { ExperimentHead, type PageProps } from "./further";
import { Failure, Loading, Scroll, Search, Section, useTitle } from "./parts";
import type { Direction, Metric, State } from "./types";
import { Exports } from "./exports";
import { ANSWERS, Drawer, openRow, OUTPUTS, type Prediction, Reward, RIGHT, shown, TASKS } from "./predictions";
import { oneOf, text } from "./view";

interface Cell {
  mean: number | null;
  sd: number | null;
  n: number;
  nonfinite: number;
}

interface PredictionSet {
  id: number;
  name: string;
  kind: string;
  step: number | null;
  predictions: number;
  run: string;
  run_name: string;
  arm: string;
  seed: number | null;
}

interface Evals extends Answer {
  id: string;
  name: string;
  state: State;
  baseline: string | null;
  arms: string[];
  rows: { name: string; direction: Direction; cells: Cell[]; best: number | null }[];
  metrics: Metric[];
  sets: PredictionSet[];
}

interface Page {
  rows: Prediction[];
  next: string | null;
  searched: number;
  now?: number;
}

const chosenA = text("a");
const chosenB = text("b");
const find = text("find");
const PICKS = ["all", "right", "wrong", "only-a", "better"] as const;
const pick = oneOf("pick", PICKS);
const PICK_LABELS: Record<(typeof PICKS)[number], string> = {
  all: "all",
  right: "right (reward \u2265 0.5)",
  wrong: "wrong (reward < 0.5)",
  "only-a": "A right, B wrong",
  better: "A better than B",
};
/** With more curves than these, they are closed at first: predictions come after them. */
const MOST_OPEN = 4;

export function EvalsPage({ id }: PageProps) {
  const [evals, error] = useFollowed<Evals>(`/api/experiments/${encodeURIComponent(id)}/evals`, () => `e/${id}`);
  useTitle("evals", evals?.name);
  const slots = useMemo(() => slotsOf(evals?.arms ?? []), [evals?.arms.join("\0")]);
  if (!evals) return <Loading error={error} />;
  const charted = { id, arms: evals.arms.map((arm) => ({ name: arm })), headlines: [], metrics: evals.metrics };
  return (
    <main>
      <ExperimentHead experiment={evals} current="evals" />
      <Failure error={error} />
      {evals.rows.length ? <Matrix evals={evals} slots={slots} /> : <p class="empty">No eval yet.</p>}
      {evals.metrics.length > 0 && (
        <Section title={`curves (${count(evals.metrics.length)})`} isOpen={evals.metrics.length <= MOST_OPEN}>
          <Charts experiment={charted} slots={slots} isGrouped={false} />
        </Section>
      )}
      {evals.sets.length > 0 && <Predictions sets={evals.sets} slots={slots} />}
    </main>
  );
}

function Matrix({ evals, slots }: { evals: Evals; slots: Map<string, number> }) {
  const rows = () => [
    ["eval", ...evals.arms.flatMap((arm) => [arm, `${arm}: sd`, `${arm}: seeds`])],
    ...evals.rows.map(({ name, cells }) => [name, ...cells.flatMap(({ mean, sd, n }) => [mean, sd, n])]),
  ];
  return (
    <Scroll label="scores">
      <table class="plain matrix">
        <thead>
          <tr>
            <th>eval</th>
            {evals.arms.map((arm) => (
              <th key={arm} class="num" title={shortened(arm, 300)}>
                <Swatch slot={slots.get(arm) ?? 0} /> <span class="text">{shortened(arm, 60)}</span>
                {evals.arms.length > 1 && arm === evals.baseline && <span class="mark">baseline</span>}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {evals.rows.map(({ name, direction, cells, best }) => (
            <tr key={name}>
              <th scope="row" class="name">
                {shortened(name, 120)} {direction && <span class="muted">{direction === "max" ? "\u2191" : "\u2193"}</span>}
              </th>
              {cells.map((cell, i) => (
                <td key={i} class={`num${best === i ? " best" : ""}`} title={`${counted(cell.n, "seed")}${cell.nonfinite ? `, ${cell.nonfinite} not finite` : ""}`}>
                  {best === i && <span class="mark best">{"\u2605"}</span>} {withDeviation(cell.mean, cell.sd)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      <Exports name={`${evals.name}-evals`} rows={rows} />
    </Scroll>
  );
}

function nameOf({ name, run_name, step }: PredictionSet): string {
  return `${shortened(name, 40)} \u00b7 ${shortened(run_name, 60)}${step === null ? "" : ` \u00b7 step ${count(step)}`}`;
}

function Predictions({ sets, slots }: { sets: PredictionSet[]; slots: Map<string, number> }) {
  const a = sets.find(({ id }) => String(id) === chosenA.value) ?? sets[0]!;
  const others = sets.filter((set) => set.id !== a.id && set.name === a.name);
  const b = others.find(({ id }) => String(id) === chosenB.value) ?? others.find(({ arm, step }) => arm !== a.arm && step === a.step) ?? others[0] ?? null;
  const isPaired = pick.value === "only-a" || pick.value === "better";
  const query = useSettled(find.value.trim(), 250);
  const filter: Record<string, unknown> = query ? { text: query } : {};
  if (pick.value === "right" || pick.value === "only-a") filter.min_reward = RIGHT;
  if (pick.value === "wrong") filter.below_reward = RIGHT;
  if (isPaired && b) filter.worse_in = b.id;
  return (
    <section class="predictions" aria-label="predictions">
      <div class="tools">
        <h2>predictions</h2>
        <label>
          <span class="muted">A</span> <Choice label="A" sets={sets} value={a} choose={(set) => (chosenA.value = set)} />
        </label>
        {b && (
          <>
            <button title="exchange A and B" aria-label="exchange A and B" onClick={() => ((chosenA.value = String(b.id)), (chosenB.value = String(a.id)))}>
              {"\u21c4"}
            </button>
            <label>
              <span class="muted">B</span> <Choice label="B" sets={others} value={b} choose={(set) => (chosenB.value = set)} />
            </label>
          </>
        )}
        <select aria-label="which" value={pick.value} onChange={(event) => (pick.value = event.currentTarget.value as (typeof PICKS)[number])}>
          {PICKS.map((each) => (
            <option key={each} value={each} disabled={!b && (each === "only-a" || each === "better")}>
              {PICK_LABELS[each]}
            </option>
          ))}
        </select>
        <Search label="text in a prediction" hint="text in a prediction" value={find} />
      </div>
      <Rows key={`${a.id} ${JSON.stringify(filter)}`} of={a} filter={filter} />
      {openRow.value && <Drawer key={openRow.value} id={openRow.value} slots={slots} />}
    </section>
  );
}

function Choice({ label, sets, value, choose }: { label: string; sets: PredictionSet[]; value: PredictionSet; choose: (id: string) => void }) {
  return (
    <select aria-label={label} value={String(value.id)} onChange={(event) => choose(event.currentTarget.value)}>
      {sets.map((set) => (
        <option key={set.id} value={String(set.id)}>
          {nameOf(set)}
        </option>
      ))}
    </select>
  );
}

function Rows({ of, filter }: { of: PredictionSet; filter: Record<string, unknown> }) {
  const [page, setPage] = useState<Page | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [isLoading, setLoading] = useState(false);
  const abort = useRef(new AbortController());
  const load = async (before: Page | null) => {
    setLoading(true);
    const query = new URLSearchParams({ eval: String(of.id), filter: JSON.stringify(filter), ...(before?.next ? { after: before.next } : {}) });
    try {
      const found = await getJson<Page>(`/api/predictions?${query}`, abort.current.signal);
      setPage({ ...found, rows: [...(before?.rows ?? []), ...found.rows] });
      setError(null);
    } catch (failed) {
      if (!abort.current.signal.aborted) setError(failed);
    }
    setLoading(false);
  };
  useEffect(() => {
    void load(null);
    return () => abort.current.abort();
  }, []);
  if (error) return <Failure error={error} />;
  if (!page) return <p class="empty">searching</p>;
  const [task, output, expected] = [TASKS, OUTPUTS, ANSWERS].map((names) => names.find((name) => page.rows.some((row) => row[name] !== undefined && row[name] !== null)));
  const id = task !== "task_id" && page.rows.some((row) => typeof row.task_id === "string" || typeof row.task_id === "number") ? "task_id" : undefined;
  const columns = [id, task, output, expected].filter((name) => name !== undefined);
  return (
    <>
      {page.rows.length > 0 && (
        <Scroll label="predictions">
          <table class="answers">
            <thead>
              <tr>
                <th>reward</th>
                {columns.map((name) => (
                  <th key={name} class={name === id || name === expected ? "short" : ""}>
                    {name}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {page.rows.map((row) => (
                <tr key={row.id}>
                  <td>
                    <button class="open" title="the whole prediction, and those of the other runs" onClick={() => (openRow.value = row.id)}>
                      <Reward value={row.reward} />
                    </button>
                  </td>
                  {columns.map((name) => (
                    <td key={name}>{shortened(shown(row[name]), 240)}</td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
      <p class="muted more">
        {page.rows.length > 0 && <Exports name={`${of.name}-${of.run_name}`} rows={() => [["reward", ...columns], ...page.rows.map((row) => [Number(row.reward ?? NaN), ...columns.map((name) => shown(row[name]))])]} />}{" "}
        {page.rows.length === 0 && page.next === null
          ? "No prediction matches."
          : `${count(page.rows.length)} shown, searched ${count(page.searched)} of ${count(of.predictions)} `}
        {page.next !== null && (
          <button disabled={isLoading} onClick={() => load(page)}>
            {isLoading ? "searching" : "more"}
          </button>
        )}
      </p>
    </>
  );
}
