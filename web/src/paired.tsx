// What compared runs have answered to the same tasks of an eval.
import { useEffect, useRef, useState } from "preact/hooks";
import { getJson } from "./api";
import { Exports } from "./exports";
import { count, shortened } from "./format";
import { Failure, Scroll } from "./parts";
import { Drawer, openRow, OUTPUTS, type Prediction, Reward, shown, TASKS } from "./predictions";
import type { RunHead } from "./types";
import { oneOf, text } from "./view";

interface Paired {
  names: string[];
  name: string;
  evals: ({ id: number; step: number | null } | null)[];
  rows: (Prediction & { scores: (number | null)[] })[];
  next: string | null;
  searched: number;
  of: number;
  /** Of A and B; null for too many tasks. */
  counts: { tasks: number; both: number; a: number; b: number; none: number } | null;
  now?: number;
}

const PICKS = ["all", "a", "b"] as const;
const PICK_LABELS = { all: "all tasks", a: "A right, B wrong", b: "B right, A wrong" };
const pick = oneOf("pick", PICKS);
const chosenEval = text("eval");

interface Props {
  runs: RunHead[];
  /** What each run is called. */
  labels: Map<string, string>;
  slots: Map<string, number>;
}

/** A row for each task with the score of each run; the first run that has the eval is A, the second one B. */
export function PairedAnswers({ runs, labels, slots }: Props) {
  const query = new URLSearchParams([...runs.map(({ id }) => ["r", id]), ["eval", chosenEval.value], ["pick", pick.value]]);
  const [paired, error, loadMore] = usePages(`/api/compare/predictions?${query}`);
  if (!paired) return <Failure error={error} />;
  if (!paired.names.length) return null;
  const { rows, counts } = paired;
  const task = TASKS.find((name) => rows.some((row) => row[name] !== undefined && row[name] !== null)) ?? OUTPUTS[0]!;
  const letters = lettersOf(paired.evals);
  const headOf = ({ id }: RunHead, i: number) => `${letters[i]} ${labels.get(id)}`.trim();
  return (
    <section class="predictions" aria-label="answers to the same tasks">
      <div class="tools">
        <h2>answers to the same tasks</h2>
        <select aria-label="eval" value={paired.name} onChange={(event) => (chosenEval.value = event.currentTarget.value)}>
          {paired.names.map((name) => (
            <option key={name}>{name}</option>
          ))}
        </select>
        <select aria-label="which tasks" value={pick.value} onChange={(event) => (pick.value = event.currentTarget.value as (typeof PICKS)[number])}>
          {PICKS.map((each) => (
            <option key={each} value={each}>
              {PICK_LABELS[each]}
            </option>
          ))}
        </select>
        {counts && (
          <span class="muted">{`of ${count(counts.tasks)} tasks: A right, B wrong ${count(counts.a)} \u00b7 B right, A wrong ${count(counts.b)} \u00b7 both right ${count(counts.both)} \u00b7 none ${count(counts.none)}`}</span>
        )}
      </div>
      <Failure error={error} />
      {rows.length > 0 && (
        <Scroll label="answers to the same tasks, by run">
          <table class="answers paired">
            <thead>
              <tr>
                <th>{task}</th>
                {runs.map((run, i) => (
                  <th key={run.id} title={headOf(run, i)}>
                    <b>{letters[i]}</b> {shortened(labels.get(run.id)!, 40)}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <tr key={row.id}>
                  <td>
                    <button class="open" title="the whole answers of all runs" onClick={() => (openRow.value = row.id)}>
                      <span class="text">{shortened(shown(row[task]), 200)}</span>
                    </button>
                  </td>
                  {row.scores.map((score, i) => (
                    <td key={i}>{paired.evals[i] ? <Reward value={score} /> : <span class="faint">{"\u2013"}</span>}</td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
      <p class="muted more">
        {rows.length > 0 && <Exports name={`${paired.name}-answers`} rows={() => [[task, ...runs.map(headOf)], ...rows.map((row) => [shown(row[task]), ...row.scores])]} />}{" "}
        {rows.length || paired.next ? `${count(rows.length)} shown, searched ${count(paired.searched)} of ${count(paired.of)} ` : "No such task."}
        {paired.next && <button onClick={loadMore}>more</button>}
      </p>
      {openRow.value && <Drawer key={openRow.value} id={openRow.value} slots={slots} />}
    </section>
  );
}

/** "A" and "B" for the first two runs that have the eval. */
function lettersOf(evals: Paired["evals"]): string[] {
  let next = 0;
  return evals.map((each) => (each && next < 2 ? "AB"[next++]! : ""));
}

/** The pages that were loaded, as one. */
function usePages(url: string): [Paired | null, unknown, () => void] {
  const [paired, setPaired] = useState<Paired | null>(null);
  const [error, setError] = useState<unknown>(null);
  const abort = useRef(new AbortController());
  const load = async (before: Paired | null) => {
    const { signal } = abort.current;
    try {
      const page = await getJson<Paired>(before?.next ? `${url}&after=${before.next}` : url, signal);
      setPaired({ ...page, rows: [...(before?.rows ?? []), ...page.rows] });
      setError(null);
    } catch (failed) {
      if (!signal.aborted) setError(failed);
    }
  };
  useEffect(() => {
    abort.current = new AbortController();
    void load(null);
    return () => abort.current.abort();
  }, [url]);
  return [paired, error, () => void load(paired)];
}
