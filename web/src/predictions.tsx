// A prediction with all its texts, beside those of the other runs for the same task.
import { useEffect, useRef, useState } from "preact/hooks";
import { getJson } from "./api";
import { Swatch } from "./arms";
import { number, shortened, valueText } from "./format";
import { Failure, Link, StateWord } from "./parts";
import { text } from "./view";

export type Prediction = Record<string, unknown> & { id: string; lengths?: Record<string, number> };

interface Origin {
  eval: string;
  step: number | null;
  run: string;
  run_name: string;
  arm: string;
  seed: number | null;
}

type Whole = Prediction & { of: Origin };

/** The id of the open prediction. */
export const openRow = text("row");
/** The reward from which on an answer is right. */
export const RIGHT = 0.5;

export const TASKS = ["instruction", "question", "prompt", "input", "item", "task_id"];
export const OUTPUTS = ["prediction", "output", "completion", "response", "text"];
export const ANSWERS = ["answer", "expected", "target", "ground_truth", "reference"];

export function shown(value: unknown): string {
  if (value === undefined || value === null) return "";
  return typeof value === "string" ? value : typeof value === "number" ? number(value) : (JSON.stringify(value) ?? "");
}

export function Reward({ value }: { value: unknown }) {
  if (typeof value !== "number") return <span class="muted">open</span>;
  return <StateWord state={value >= RIGHT ? "completed" : "failed"}>{number(value)}</StateWord>;
}

/** The open prediction, over the page. */
export function Drawer({ id, slots }: { id: string; slots: Map<string, number> }) {
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
