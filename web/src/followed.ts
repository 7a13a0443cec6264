// JSON of the server that is read again when something it shows has changed.
import { useEffect, useState } from "preact/hooks";
import { getJson } from "./api";
import { subscribe } from "./live";
import { useLoaded } from "./parts";
import { paused } from "./view";

const AGAIN_MS = 2_000;

export interface Answer {
  now?: number;
  frame?: number;
}

interface Following<T> {
  /** What an answer becomes by a frame with this header; without it, the answer is loaded again after each frame. */
  update?: (answer: T, header: any) => T; // eslint-disable-line -- each topic has its own
  /** Load again so often, and not after frames. */
  everyMs?: number;
}

/** The answer of a URL; while another one is loaded, the last answer stays. `topicOf` names what announces changes. */
export function useFollowed<T extends Answer>(url: string, topicOf: (answer: T) => string | null, { update, everyMs }: Following<T> = {}): [T | null, unknown] {
  const [answer, setAnswer] = useState<T | null>(null);
  const [loads, setLoads] = useState(0);
  const isPaused = paused.value;
  const error = useLoaded(async (abort) => setAnswer(await getJson<T>(url, abort)), `${url} ${loads} ${isPaused}`);
  const topic = answer && topicOf(answer);
  useEffect(() => {
    if (!topic || isPaused) return;
    let timer = 0;
    const loadAgain = () => {
      timer = 0;
      setLoads((count) => count + 1);
    };
    const end = subscribe(topic, answer.frame ?? null, ({ header }) => {
      if (update && header.kind === "data") setAnswer((last) => last && update(last, header));
      else if (!everyMs) timer ||= window.setTimeout(loadAgain, update ? 0 : AGAIN_MS);
    });
    const interval = everyMs && window.setInterval(loadAgain, everyMs);
    return () => {
      end();
      clearTimeout(timer);
      clearInterval(interval);
    };
  }, [topic, isPaused]);
  return [answer, error];
}

/** A value once it has stayed the same for a moment: what a reader types is not asked for letter by letter. */
export function useSettled<T>(value: T, ms = 150): T {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), ms);
    return () => clearTimeout(timer);
  }, [value]);
  return settled;
}
