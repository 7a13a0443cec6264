// Small parts that both pages show.
import { useEffect, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { signal } from "@preact/signals";
import { clockAhead, RequestError } from "./api";
import { duration, percent } from "./format";
import type { State } from "./types";
import { navigate } from "./view";

const SIGNS: Record<State, string> = {
  pending: "\u25cb",
  running: "\u25b6",
  completed: "\u2713",
  failed: "\u2715",
  cancelled: "\u2298",
  stopped: "\u25a0",
  stalled: "!",
};

/** A state is a word and a sign, never colour alone. */
export function StateWord({ state }: { state: State }) {
  return (
    <span class={`state ${state}`}>
      <span class="sign" aria-hidden="true">
        {SIGNS[state] ?? "?"}
      </span>
      {state}
    </span>
  );
}

const clock = signal(Date.now());
setInterval(() => (clock.value = Date.now()), 5_000);

export function Age({ since, suffix = "" }: { since: number | null; suffix?: string }) {
  if (since === null) return <span class="faint">{"\u2013"}</span>;
  const seconds = Math.max(0, clock.value / 1000 + clockAhead.value - since);
  const date = new Date(since * 1000);
  return (
    <time class="age" dateTime={date.toISOString()} title={date.toLocaleString()}>
      {seconds < 5 ? "now" : duration(seconds) + suffix}
    </time>
  );
}

export function Progress({ value, state }: { value: number | null; state: State }) {
  if (value === null) return null;
  return (
    <span class={`progress ${state}`}>
      <span class="bar">
        <span style={{ width: `${100 * Math.min(1, Math.max(0, value))}%` }} />
      </span>
      {percent(value)}
    </span>
  );
}

/** A link within the page; with a modifier key it is the browser's. */
export function Link({ to, class: name, children }: { to: string; class?: string; children: ComponentChildren }) {
  const go = (event: MouseEvent) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey || event.button) return;
    event.preventDefault();
    navigate(to);
  };
  return (
    <a href={to} class={name} onClick={go}>
      {children}
    </a>
  );
}

export function Failure({ error }: { error: unknown }) {
  const known = error instanceof RequestError ? error : null;
  const isToken = known?.status === 401 || known?.status === 403;
  return (
    <div class="failure" role="alert">
      <p>{isToken ? "This page has no valid token." : known?.message ?? String(error)}</p>
      <p class="muted">
        {isToken ? "Open the address that `evsys-bus dash` prints: the token is in it." : known?.fix}
      </p>
    </div>
  );
}

/** What a request answers, asked again when `key` changes, and after a failure every few seconds. */
export function useLoaded(load: (abort: AbortSignal) => Promise<void>, key: unknown): unknown {
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    const abort = new AbortController();
    let timer = 0;
    const run = async () => {
      try {
        await load(abort.signal);
        setError(null);
      } catch (failed) {
        if (abort.signal.aborted) return;
        setError(failed);
        const status = failed instanceof RequestError ? failed.status : 0;
        if (status === 0 || status >= 500) timer = window.setTimeout(run, 3_000);
      }
    };
    void run();
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, [key]);
  return error;
}
