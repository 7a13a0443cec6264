// Is everything delivered? Each journal with its adapters, errors first; and the figures of the database.
import { useEffect, useRef, useState } from "preact/hooks";
import { getJson } from "./api";
import { Deliveries, type JournalRows } from "./deliveries";
import { bytes, count, counted, number, shortened } from "./format";
import { subscribe } from "./live";
import { Age, Failure, Link, StateWord, useLoaded } from "./parts";
import type { State } from "./types";
import { filter, paused } from "./view";

interface Journal extends JournalRows {
  journal: string;
  run: { id: string; name: string } | null;
  experiment: { id: string; name: string } | null;
  state: State | null;
  time: number;
}

interface Health {
  now: number;
  database: { path: string; bytes: number; events: number; streams: number; series: number; unreadable: number };
  journals: Journal[];
}

const AGAIN_MS = 5_000;
const MOST_SHOWN = 40;

const isBroken = ({ deliveries }: Journal) => deliveries.some(({ last_error, dead }) => last_error !== null || dead > 0);

export function HealthPage() {
  const [health, setHealth] = useState<Health | null>(null);
  const [rate, setRate] = useState<number | null>(null);
  const [loads, setLoads] = useState(0);
  const isPaused = paused.value;
  const last = useRef<Health | null>(null);
  const error = useLoaded(async (abort) => {
    const answer = await getJson<Health>("/api/health", abort);
    const before = last.current;
    if (before && answer.now > before.now) setRate(Math.max(0, (answer.database.events - before.database.events) / (answer.now - before.now)));
    last.current = answer;
    setHealth(answer);
  }, `${loads} ${isPaused}`);
  useEffect(() => {
    document.title = "health \u00b7 evsys-bus";
  }, []);
  useEffect(() => {
    if (isPaused) return;
    const end = subscribe("home", null, () => {}); // shows whether the dashboard is there
    const timer = setInterval(() => setLoads((count) => count + 1), AGAIN_MS);
    return () => {
      end();
      clearInterval(timer);
    };
  }, [isPaused]);
  if (!health) return error ? <Failure error={error} /> : <main class="loading" aria-busy="true" />;
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = health.journals.filter((journal) => matches(journal, words));
  const broken = health.journals.filter(isBroken).length;
  const lag = sum(health.journals, "pending");
  const owed = sum(health.journals, "owed");
  const { database } = health;
  return (
    <main>
      <div class="tools">
        <h1>Health</h1>
        <input
          type="search"
          placeholder="filter: run, adapter, error  ( / )"
          aria-label="filter"
          value={filter.value}
          onInput={(event) => (filter.value = event.currentTarget.value)}
        />
        <span class="muted">{words.length ? `${found.length} of ${health.journals.length}` : counted(health.journals.length, "journal")}</span>
      </div>
      {error ? <Failure error={error} /> : null}
      <p class="summary">
        {broken ? (
          <span class="state failed">
            {"\u2715"} {counted(broken, "journal")} with a delivery that fails.{" "}
          </span>
        ) : (
          <span class="state completed">{"\u2713"} No delivery fails. </span>
        )}
        <span class="muted">
          {lag ? `${counted(lag, "event")} still to be delivered` : "nothing is late"}
          {owed ? `, ${count(owed)} not confirmed yet` : ""}.
        </span>
      </p>
      <p class="facts">
        <Fact label="database" value={bytes(database.bytes)} title={database.path} />
        <Fact label="events" value={count(database.events)} />
        <Fact label="arriving" value={rate === null ? "\u2026" : `${number(Number(rate.toPrecision(3)))} / s`} />
        <Fact label="streams" value={count(database.streams)} />
        <Fact label="series" value={count(database.series)} />
        {database.unreadable > 0 && <Fact label="unreadable events" value={count(database.unreadable)} />}
      </p>
      {health.journals.length === 0 && (
        <p class="empty">No courier has reported yet. A run that sends here with evsys_logger reports how far each of its adapters is.</p>
      )}
      {found.slice(0, MOST_SHOWN).map((journal) => (
        <section class={`journal${isBroken(journal) ? " bad" : ""}`} key={journal.journal}>
          <div class="title">
            {journal.experiment && <Link to={`/e/${encodeURIComponent(journal.experiment.id)}`}>{shortened(journal.experiment.name, 80)}</Link>}
            {journal.run ? (
              <Link to={`/r/${encodeURIComponent(journal.run.id)}`} class="strong">
                {shortened(journal.run.name, 120)}
              </Link>
            ) : null}
            {journal.state && <StateWord state={journal.state} />}
            <span class="hint path">{shortened(journal.journal, 200)}</span>
            <span class="muted">
              reported <Age since={journal.time} suffix=" ago" />
            </span>
          </div>
          <Deliveries journal={journal} />
        </section>
      ))}
      {found.length > MOST_SHOWN && <p class="muted">and {counted(found.length - MOST_SHOWN, "other journal")}: filter to see them</p>}
    </main>
  );
}

function Fact({ label, value, title }: { label: string; value: string; title?: string }) {
  return (
    <span class="fact" title={title}>
      <span class="label">{label}</span> {value}
    </span>
  );
}

function sum(journals: Journal[], field: "pending" | "owed"): number {
  return journals.reduce((total, { deliveries }) => total + deliveries.reduce((all, row) => all + row[field], 0), 0);
}

function matches(journal: Journal, words: string[]): boolean {
  const { deliveries, run, experiment } = journal;
  const texts = [journal.journal, run?.name, experiment?.name, journal.state, ...deliveries.flatMap((row) => [row.adapter, row.state, row.last_error])];
  const text = texts.filter(Boolean).join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}
