// Is everything delivered? Each journal with its adapters, errors first; and the figures of the database.
import { useRef } from "preact/hooks";
import { Deliveries, type JournalRows } from "./deliveries";
import { type Answer, useFollowed } from "./followed";
import { bytes, count, counted, number, shortened } from "./format";
import { Age, Fact, Failure, Link, Loading, Search, StateWord, useTitle } from "./parts";
import type { State } from "./types";
import { filter, hasFilterWords } from "./view";

interface Journal extends JournalRows {
  journal: string;
  run: { id: string; name: string } | null;
  experiment: { id: string; name: string } | null;
  state: State | null;
  time: number;
}

interface Health extends Answer {
  now: number;
  database: { path: string; bytes: number; events: number; streams: number; series: number; unreadable: number; refused_points: number };
  journals: Journal[];
}

const AGAIN_MS = 5_000;
const RATE_SECONDS = 60;
const MOST_SHOWN = 40;

const isBroken = ({ deliveries }: Journal) => deliveries.some(({ last_error, dead }) => last_error !== null || dead > 0);

/** How many events arrive in a second: the mean of the last minute, or of the time since the page was opened. */
function useRate(health: Health | null): { rate: number; seconds: number } | null {
  const looks = useRef<{ now: number; events: number }[]>([]);
  const now = health?.now;
  if (health && now !== looks.current.at(-1)?.now) {
    looks.current = [...looks.current.filter((look) => look.now > health.now - RATE_SECONDS), { now: health.now, events: health.database.events }];
  }
  const [first, last] = [looks.current[0], looks.current.at(-1)];
  if (!first || !last || last.now <= first.now) return null;
  const seconds = last.now - first.now;
  return { rate: Math.max(0, (last.events - first.events) / seconds), seconds };
}

export function HealthPage() {
  // What is delivered is no change of an experiment; the topic shows whether the dashboard is there.
  const [health, error] = useFollowed<Health>("/api/health", () => "home", { everyMs: AGAIN_MS });
  const arriving = useRate(health);
  useTitle("health");
  if (!health) return <Loading error={error} />;
  const found = health.journals.filter(matches);
  const broken = health.journals.filter(isBroken).length;
  const lag = sum(health.journals, "pending");
  const owed = sum(health.journals, "owed");
  const { database } = health;
  return (
    <main>
      <div class="tools">
        <h1>Health</h1>
        <Search label="filter" hint="filter: run, adapter, error  ( / )" />
        <span class="muted">{filter.value ? `${found.length} of ${health.journals.length}` : counted(health.journals.length, "journal")}</span>
      </div>
      <Failure error={error} />
      <p class="summary">
        {broken ? (
          <StateWord state="failed">{counted(broken, "journal")} with a delivery that fails.</StateWord>
        ) : (
          <StateWord state="completed">No delivery fails.</StateWord>
        )}{" "}
        <span class="muted">
          {lag ? `${counted(lag, "event")} still to be delivered` : "nothing is late"}
          {owed ? `, ${count(owed)} not confirmed yet` : ""}.
        </span>
      </p>
      <p class="facts">
        <Fact label="database" title={database.path}>
          {bytes(database.bytes)}
        </Fact>
        <Fact label="events">{count(database.events)}</Fact>
        <Fact label="arriving">{arriving ? `${number(Number(arriving.rate.toPrecision(3)))} / s, over ${count(Math.round(arriving.seconds))} s` : "\u2026"}</Fact>
        <Fact label="streams">{count(database.streams)}</Fact>
        <Fact label="series">{count(database.series)}</Fact>
        {database.unreadable > 0 && <Fact label="unreadable events">{count(database.unreadable)}</Fact>}
        {database.refused_points > 0 && (
          <Fact label="refused points" title="Their steps are too large, or too far from all others of their series.">
            {count(database.refused_points)}
          </Fact>
        )}
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

function sum(journals: Journal[], field: "pending" | "owed"): number {
  return journals.reduce((total, { deliveries }) => total + deliveries.reduce((all, row) => all + row[field], 0), 0);
}

function matches({ journal, run, experiment, state, deliveries }: Journal): boolean {
  return hasFilterWords(journal, run?.name, experiment?.name, state, ...deliveries.flatMap((row) => [row.adapter, row.state, row.last_error]));
}
