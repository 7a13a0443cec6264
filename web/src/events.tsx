// The events of a run as they come, newest first: filter, pause, older ones page by page, and all fields of each.
import { Fragment } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { getJson } from "./api";
import { type Answer, useSettled } from "./followed";
import { count, counted, number, shortened } from "./format";
import { type PageProps, RunTitle } from "./further";
import { subscribe } from "./live";
import { Failure, Loading, Scroll, Search, useLoaded, useTitle } from "./parts";
import type { RunHead } from "./types";
import { filter, names, paused, toggled } from "./view";

interface EventRow {
  stream: string;
  sequence: number;
  time: number;
  rank: number;
  type: string;
  step: number | null;
  facts: string[];
  metrics: Record<string, number | string | null>;
  fields: Record<string, unknown>;
}

/** The sequence of one event of each stream. */
type Position = Record<string, number>;

interface EventsPage extends Answer {
  run: RunHead;
  source: "journal" | "database";
  journal: string | null;
  problem: string | null;
  rows: EventRow[];
  searched: number;
  /** Of a page: from where the older ones are read; null at the end. */
  next: Position | null;
  newest: Position;
  /** Of what has come since: whether there is more of it. */
  more?: boolean;
}

const AGAIN_MS = 500;
/** What is held in the page; older ones are loaded again where they are wanted. */
const MOST_ROWS = 2_000;
/** A reader who has scrolled so far reads older events: what comes is shown on request. */
const NEAR_TOP = 60;
const EXAMPLES = "free text   /regex/   type:step_end   loss<0.5   step>=100   rank:1   -type:run.metrics   age<10m";

const SHOWN_ELSEWHERE: ReadonlySet<string> = new Set(["step", "step_idx", "digest"]);

const opened = names("open");
const idOf = ({ stream, sequence }: EventRow) => `${stream}.${sequence}`;

export function RunEventsPage({ id }: PageProps) {
  const text = useSettled(filter.value);
  const [events, error, more] = useEvents(id, text);
  useTitle(events && "events", events?.run.name);
  if (!events) return <Loading error={error} />;
  const { run, source, journal, problem, rows, next } = events;
  const hasRanks = rows.some(({ rank }) => rank > 0);
  return (
    <main>
      <section class="head">
        <RunTitle run={run} current="events" />
        <p class="hint">
          {source === "journal" ? (
            <>
              all events, from the journal <span class="path">{shortened(journal ?? "", 300)}</span>
            </>
          ) : (
            "The journal is not on this machine. From the dashboard's database: evals, checkpoints, contents, alerts and other events, without single steps."
          )}
        </p>
      </section>
      <div class="tools">
        <Search label="filter events" hint="filter:  type:step_end  loss<0.5  step>=100  /regex/   ( / )" title={EXAMPLES} isWide isInvalid={problem !== null} />
        <button title="pause or continue ( . )" aria-pressed={paused.value} onClick={() => (paused.value = !paused.value)}>
          {paused.value ? "continue" : "pause"}
        </button>
        <span class="muted" role="status">
          {counted(rows.length, "event")}
          {text && `, searched ${count(events.searched)}`}
        </span>
        {more.newer > 0 && (
          <button class="main" onClick={more.showNewer}>
            show {counted(more.newer, "newer event")}
          </button>
        )}
      </div>
      {problem && (
        <p class="problem" role="alert">
          {problem}
        </p>
      )}
      <Failure error={error} />
      {rows.length > 0 && (
        <Scroll label="events">
          <table class="events">
            <thead>
              <tr>
                <th>time</th>
                {hasRanks && <th class="num">rank</th>}
                <th>event</th>
                <th class="num">step</th>
                <th>what</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <Row key={idOf(row)} row={row} hasRanks={hasRanks} />
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
      <p class="muted more">
        {next ? (
          <button disabled={more.isLoading} onClick={more.loadOlder}>
            {more.isLoading ? "searching" : rows.length ? "older events" : "search on"}
          </button>
        ) : rows.length ? (
          "no older events"
        ) : (
          "No event matches."
        )}
      </p>
    </main>
  );
}

function Row({ row, hasRanks }: { row: EventRow; hasRanks: boolean }) {
  const id = idOf(row);
  const isOpen = opened.value.has(id);
  const date = new Date(row.time * 1000);
  const numbers = Object.entries(row.metrics).map(([name, value]) => `${name} ${typeof value === "number" ? number(value) : value}`);
  return (
    <Fragment>
      <tr>
        <td class="num">
          <time dateTime={date.toISOString()} title={date.toLocaleString()}>
            {date.toLocaleTimeString("en-GB")}
            <span class="faint">.{String(date.getMilliseconds()).padStart(3, "0")}</span>
          </time>
        </td>
        {hasRanks && <td class="num">{row.rank}</td>}
        <td>
          <button class="open" aria-expanded={isOpen} title="all fields" onClick={() => (opened.value = toggled(opened.value, id))}>
            <span class="caret" aria-hidden="true">
              {isOpen ? "\u25be" : "\u25b8"}
            </span>
            <span class="text">{shortened(row.type, 80)}</span>
          </button>
        </td>
        <td class="num">{row.step === null ? "" : count(row.step)}</td>
        <td class="what">{shortened([...numbers, ...row.facts].join(" \u00b7 ") || scalarsOf(row.fields), 400)}</td>
      </tr>
      {isOpen && (
        <tr class="fields">
          <td colSpan={hasRanks ? 5 : 4}>
            <p class="hint">
              {date.toLocaleString()} {row.stream !== "stored" && `\u00b7 ${row.stream} ${count(row.sequence)}`}
            </p>
            <pre>{JSON.stringify(row.fields, null, 1)}</pre>
          </td>
        </tr>
      )}
    </Fragment>
  );
}

/** What the fields have that is short, for events of which nothing else is known. */
function scalarsOf(fields: Record<string, unknown>): string {
  const entries = Object.entries(fields).flatMap(([name, value]) => (value !== null && typeof value === "object" && !Array.isArray(value) ? Object.entries(value) : [[name, value] as const]));
  const shown = entries.filter(([name, value]) => value !== null && typeof value !== "object" && !SHOWN_ELSEWHERE.has(name));
  return shortened(shown.map(([name, value]) => `${name} ${shortened(String(value), 60)}`).join(" \u00b7 "), 200);
}

/** The sequences from which all that comes after these rows is read. */
function positionAfter(rows: EventRow[], next: Position | null): Position {
  const position = { ...next };
  for (const { stream, sequence } of rows) position[stream] = sequence; // each row is older than those before it
  return position;
}

interface More {
  isLoading: boolean;
  loadOlder: () => void;
  /** How many have come that are not shown, because the reader is looking at older ones. */
  newer: number;
  showNewer: () => void;
}

/** The events that match a filter, those that come since, and what loads more. */
function useEvents(id: string, text: string): [EventsPage | null, unknown, More] {
  const [events, setEvents] = useState<EventsPage | null>(null);
  const [newer, setNewer] = useState<EventRow[]>([]);
  const [failed, setFailed] = useState<unknown>(null);
  const [isLoading, setLoading] = useState(false);
  const abort = useRef(new AbortController());
  const newest = useRef<Position>({});
  const isPaused = paused.value;
  const base = `/api/runs/${encodeURIComponent(id)}/events?q=${encodeURIComponent(text)}`;

  const error = useLoaded(async (signal) => {
    abort.current.abort();
    abort.current = new AbortController();
    const page = await getJson<EventsPage>(base, signal);
    newest.current = page.newest;
    setNewer([]);
    setEvents(page);
  }, base);
  const experiment = events?.run.experiment.id;

  useEffect(() => {
    if (!experiment || isPaused) return;
    let timer = 0;
    let isOver = false;
    const { signal } = abort.current;
    const load = async () => {
      timer = 0;
      try {
        const since = await getJson<EventsPage>(`${base}&after=${encodeURIComponent(JSON.stringify(newest.current))}`, signal);
        if (isOver) return;
        newest.current = since.newest;
        setNewer((waiting) => [...since.rows, ...waiting].slice(0, MOST_ROWS));
        setEvents((shown) => shown && { ...shown, run: since.run, searched: shown.searched + since.searched });
        setFailed(null);
        if (since.more) loadSoon();
      } catch (failure) {
        if (!isOver && !signal.aborted) setFailed(failure);
      }
    };
    const loadSoon = () => {
      if (!isOver) timer ||= window.setTimeout(load, AGAIN_MS);
    };
    loadSoon(); // what has come while it was paused
    const end = subscribe(`e/${experiment}`, events.frame ?? null, loadSoon);
    return () => {
      isOver = true;
      end();
      clearTimeout(timer);
    };
  }, [experiment, isPaused, base]);

  const showNewer = () => {
    setEvents((shown) => {
      if (!shown) return shown;
      const rows = [...newer, ...shown.rows].slice(0, MOST_ROWS);
      const isCut = rows.length < newer.length + shown.rows.length;
      return { ...shown, rows, next: isCut ? positionAfter(rows, null) : shown.next };
    });
    setNewer([]);
  };
  useEffect(() => {
    if (newer.length && scrollY < NEAR_TOP) showNewer();
  }, [newer]);

  const loadOlder = async () => {
    if (!events?.next) return;
    const { signal } = abort.current;
    setLoading(true);
    try {
      const page = await getJson<EventsPage>(`${base}&before=${encodeURIComponent(JSON.stringify(events.next))}`, signal);
      setEvents((shown) => shown && { ...shown, rows: [...shown.rows, ...page.rows], next: page.next, searched: shown.searched + page.searched });
      setFailed(null);
    } catch (failure) {
      if (!signal.aborted) setFailed(failure);
    }
    setLoading(false);
  };
  const more = {
    isLoading,
    loadOlder,
    newer: newer.length,
    showNewer: () => {
      scrollTo(0, 0);
      showNewer();
    },
  };
  return [events, error ?? failed, more];
}
