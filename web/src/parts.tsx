// Small parts that several pages show.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { signal } from "@preact/signals";
import { clockAhead, RequestError } from "./api";
import { counted, duration, percent, shortened } from "./format";
import type { Alert, State } from "./types";
import { filter, navigate } from "./view";

const SIGNS: Record<State, string> = {
  pending: "\u25cb",
  running: "\u25b6",
  completed: "\u2713",
  failed: "\u2715",
  cancelled: "\u2298",
  stopped: "\u25a0",
  stalled: "!",
};

/** A state is a word and a sign, never colour alone. Other words have the sign and the colour of the state that is like them. */
export function StateWord({ state, children = state }: { state: State; children?: ComponentChildren }) {
  return (
    <span class={`state ${state}`}>
      <span class="sign" aria-hidden="true">
        {SIGNS[state] ?? "?"}
      </span>
      {children}
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

/** Texts longer than this may be higher than their box; then they are reached by Tab, and scrolled by keys. */
const MAY_SCROLL = 120;
const MOST_SHOWN = 20_000;

export function Fact({ label, title, children }: { label: string; title?: string; children: ComponentChildren }) {
  return (
    <span class="fact" title={title}>
      <span class="label">{label}</span> {children}
    </span>
  );
}

/** A text that somebody wrote, with what it is. */
export function Prose({ label, text }: { label: string; text: string | null }) {
  if (!text) return null;
  return (
    <p class="prose" tabIndex={text.length > MAY_SCROLL || text.includes("\n") ? 0 : undefined}>
      <span class="label">{label}</span> {shortened(text)}
    </p>
  );
}

/** A text as it is, which scrolls if it is long. */
export function Verbatim({ text, class: name }: { text: string; class?: string }) {
  return (
    <pre class={name} tabIndex={0}>
      {shortened(text, MOST_SHOWN)}
    </pre>
  );
}

/** A table that may be wider than the page; where it is, it is reached by Tab, and scrolled by keys. */
export function Scroll({ label, children }: { label: string; children: ComponentChildren }) {
  const box = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const element = box.current!;
    const measure = () => {
      if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
      else element.removeAttribute("tabindex");
    };
    const resized = new ResizeObserver(measure);
    for (const each of [element, ...element.children]) resized.observe(each);
    return () => resized.disconnect();
  }, []);
  return (
    <div class="scroll" ref={box} role="group" aria-label={label}>
      {children}
    </div>
  );
}

/** A part of a page that opens and closes. */
export function Section({ title, isOpen = false, children }: { title: string; isOpen?: boolean; children: ComponentChildren }) {
  return (
    <details class="section" open={isOpen}>
      <summary>
        <h2>{title}</h2>
      </summary>
      {children}
    </details>
  );
}

const ALERT_STATES: Record<string, State> = { error: "failed", info: "pending" };

/** The newest alerts first, as many as `most`. */
export function Alerts({ alerts, most }: { alerts: Omit<Alert, "run">[]; most: number }) {
  const newest = [...alerts].sort((a, b) => (b.time ?? 0) - (a.time ?? 0));
  return (
    <>
      {newest.slice(0, most).map(({ level, title, text, time }, i) => (
        <p class="alert" key={i}>
          <StateWord state={ALERT_STATES[level ?? ""] ?? "stalled"}>{shortened(level ?? "alert", 40)}</StateWord> <b>{shortened(title, 200)}</b> {text && shortened(text, 300)}{" "}
          <span class="muted">
            <Age since={time} suffix=" ago" />
          </span>
        </p>
      ))}
      {newest.length > most && <p class="muted">and {counted(newest.length - most, "earlier alert")}</p>}
    </>
  );
}

interface SearchProps {
  /** What it is for: the label that is read aloud. */
  label: string;
  hint: string;
  title?: string;
  isWide?: boolean;
  isInvalid?: boolean;
  /** By default the filter of the page. */
  value?: { value: string };
}

/** A text in the URL by which a list is searched; the key / goes to the first one of a page. */
export function Search({ label, hint, title, isWide, isInvalid, value = filter }: SearchProps) {
  return (
    <input
      type="search"
      class={isWide ? "wide" : ""}
      placeholder={hint}
      title={title}
      aria-label={label}
      aria-invalid={isInvalid}
      value={value.value}
      onInput={(event) => (value.value = event.currentTarget.value)}
    />
  );
}

/** The name of the tab; none before the page is loaded. */
export function useTitle(...names: (string | null | undefined)[]): void {
  const title = [...names.map((name) => name && shortened(name, 80)), "evsys-bus"].filter(Boolean).join(" \u00b7 ");
  const isLoaded = names.every((name) => name !== undefined);
  useEffect(() => {
    if (isLoaded) document.title = title;
  }, [isLoaded, title]);
}

/** In place of a page that is not loaded yet, or cannot be. */
export function Loading({ error }: { error: unknown }) {
  return error ? <Failure error={error} /> : <main class="loading" aria-busy="true" />;
}

/** Why something failed; nothing if there is no error. */
export function Failure({ error }: { error: unknown }) {
  if (!error) return null;
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
