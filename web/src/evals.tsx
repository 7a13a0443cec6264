// The evals of an experiment: scores by arm, their curves, and the predictions row by row.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { getJson } from "./api";
import { Swatch } from "./arms";
import { Charts } from "./charts";
import { slotsOf } from "./colours";
import { type Answer, useFollowed, useSettled } from "./followed";
import { count, counted, withDeviation, number, valueText, shortened } from "./format";
import { ExperimentHead, type PageProps } from "./further";
import { Failure, Link, Loading, Search, Section, StateWord, useTitle } from "./parts";
import type { Direction, Metric, State } from "./types";
import { oneOf, setting } from "./view";

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

type Prediction = Record<string, unknown> & { id: string; lengths?: Record<string, number> };

interface Page {
  rows: Prediction[];
  next: string | null;
  searched: number;
  now?: number;
}

interface Origin {
  eval: string;
  step: number | null;
  run: string;
  run_name: string;
  arm: string;
  seed: number | null;
}

type Whole = Prediction & { of: Origin };

const text = (name: string) => setting<string>(name, (value) => value ?? "", (value) => value || null);
const chosenA = text("a");
const chosenB = text("b");
const find = text("find");
const openRow = text("row");
const PICKS = ["all", "right", "wrong", "only-a", "better"] as const;
const pick = oneOf("pick", PICKS);
const PICK_LABELS: Record<(typeof PICKS)[number], string> = {
  all: "all",
  right: "right (reward \u2265 0.5)",
  wrong: "wrong (reward < 0.5)",
  "only-a": "A right, B wrong",
  better: "A better than B",
};
const RIGHT = 0.5;
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
  return (
    <div class="scroll">
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
    </div>
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
        <select aria-label="which" value={pick.value} onChange={(event) => (pick.value = event.currentTarget.value as (typeof PICKS)[number])}>
          {PICKS.map((each) => (
            <option key={each} value={each} disabled={!b && (each === "only-a" || each === "better")}>
              {PICK_LABELS[each]}
            </option>
          ))}
        </select>
        {isPaired && b && (
          <label>
            <span class="muted">B</span> <Choice label="B" sets={others} value={b} choose={(set) => (chosenB.value = set)} />
          </label>
        )}
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
  return (
    <>
      {page.rows.length > 0 && (
        <div class="scroll">
          <table class="answers">
            <thead>
              <tr>
                <th>reward</th>
                {task && <th>{task}</th>}
                {output && <th>{output}</th>}
                {expected && <th>{expected}</th>}
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
                  {[task, output, expected].map((name) => name && <td key={name}>{shortened(shown(row[name]), 240)}</td>)}
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      <p class="muted more">
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

const TASKS = ["instruction", "question", "prompt", "input", "item", "task_id"];
const OUTPUTS = ["prediction", "output", "completion", "response", "text"];
const ANSWERS = ["answer", "expected", "target", "ground_truth", "reference"];

function shown(value: unknown): string {
  if (value === undefined || value === null) return "";
  return typeof value === "string" ? value : typeof value === "number" ? number(value) : (JSON.stringify(value) ?? "");
}

function Reward({ value }: { value: unknown }) {
  if (typeof value !== "number") return <span class="muted">open</span>;
  return <StateWord state={value >= RIGHT ? "completed" : "failed"}>{number(value)}</StateWord>;
}

/** A prediction with all its texts, beside those for the same task of other runs. */
function Drawer({ id, slots }: { id: string; slots: Map<string, number> }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [found, setFound] = useState<{ prediction: Whole; others: Whole[]; now?: number } | null>(null);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    dialog.current!.showModal();
    const abort = new AbortController();
    getJson<{ prediction: Whole; others: Whole[]; now?: number }>(`/api/predictions/${encodeURIComponent(id)}`, abort.signal).then(setFound, (failed) => {
      if (!abort.signal.aborted) setError(failed);
    });
    return () => abort.abort();
  }, []);
  const output = found && OUTPUTS.find((name) => found.prediction[name] !== undefined);
  return (
    <dialog class="drawer" ref={dialog} aria-label="prediction" onClose={() => (openRow.value = "")}>
      <form method="dialog">
        <button>close ( Esc )</button>
      </form>
      <Failure error={error} />
      {!error && !found && <p class="muted">loading</p>}
      {found && (
        <>
          <dl>
            {Object.entries(found.prediction)
              .filter(([name, value]) => !["id", "of", "reward", output].includes(name) && value !== null && value !== "")
              .map(([name, value]) => (
                <div key={name}>
                  <dt>{shortened(name, 80)}</dt>
                  <dd>
                    {typeof value === "string" ? <pre>{shortened(value, 50_000)}</pre> : <pre>{typeof value === "number" ? valueText(value) : shortened(JSON.stringify(value, null, 1) ?? "", 50_000)}</pre>}
                  </dd>
                </div>
              ))}
          </dl>
          {[found.prediction, ...found.others].map((each) => (
            <article key={each.id}>
              <h3>
                <Swatch slot={slots.get(each.of.arm) ?? 0} /> <Link to={`/r/${encodeURIComponent(each.of.run)}`}>{shortened(each.of.run_name, 80)}</Link> <Reward value={each.reward} />
              </h3>
              {output && <pre>{marked(shown(each[output]), each === found.prediction ? null : shown(found.prediction[output]))}</pre>}
            </article>
          ))}
        </>
      )}
    </dialog>
  );
}

/** A text with the part marked in which it differs from another one. */
function marked(text: string, other: string | null) {
  const short = shortened(text, 50_000);
  if (other === null || short === other) return short;
  let start = 0;
  while (start < short.length && short[start] === other[start]) start++;
  let end = 0;
  while (end < Math.min(short.length, other.length) - start && short[short.length - 1 - end] === other[other.length - 1 - end]) end++;
  return [short.slice(0, start), <mark>{short.slice(start, short.length - end)}</mark>, short.slice(short.length - end)];
}
