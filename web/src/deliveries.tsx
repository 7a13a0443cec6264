// What couriers have reported of a journal: how far each adapter is, its error with the fix, and the time of hooks.
import { count, counted, share, shortened, shortTime } from "./format";
import { Age, Scroll, StateWord } from "./parts";

export interface Delivery {
  adapter: string;
  time: number;
  state: string | null;
  recorded: number;
  delivered: number;
  pending: number;
  /** Accepted without being sent, since the destination is not there. */
  waiting: number;
  dead: number;
  owed: number;
  attempts: number;
  failing_since: number | null;
  last_error: string | null;
  suggested_fix: string | null;
  log: string | null;
}

export interface Hook {
  rank: string;
  callback: string;
  hook: string;
  calls: number;
  failures: number;
  blocked: number;
  mean_seconds: number;
  max_seconds: number;
  per_step: number | null;
}

export interface JournalRows {
  deliveries: Delivery[];
  hooks: Hook[];
  /** How long a step takes; null if that is not known. */
  step_seconds: number | null;
  /** Of a run that has ended. */
  receipt: { complete: boolean; recorded: number; delivered: number; dead: number; pending: number; owed: number } | null;
}

const MOST_HOOKS = 8;

export function Deliveries({ journal }: { journal: JournalRows }) {
  const { deliveries, hooks, receipt } = journal;
  return (
    <>
      {receipt && (
        <p class="receipt">
          <StateWord state={receipt.complete ? "completed" : "stalled"}>receipt: {deliveries.map(arrivedText).join("; ")}</StateWord>
        </p>
      )}
      {deliveries.length > 0 && (
        <Scroll label="deliveries">
          <table class="plain deliveries">
            <thead>
              <tr>
                <th>adapter</th>
                <th>state</th>
                <th class="num">recorded</th>
                <th class="num">delivered</th>
                <th class="num" title="in the journal, still to be delivered, or waiting for a destination">not delivered</th>
                <th class="num" title="delivered, not confirmed by the destination yet">not confirmed</th>
                <th class="num" title="rejected for good: they are in the dead-letter file">rejected</th>
                <th class="num">reported</th>
              </tr>
            </thead>
            <tbody>
              {deliveries.map((row) => (
                <DeliveryRow key={row.adapter} row={row} />
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
      {hooks.length > 0 && <Hooks hooks={hooks} stepSeconds={journal.step_seconds} />}
    </>
  );
}

/** What has become of the events for an adapter. */
function arrivedText(row: Delivery): string {
  const missing = [
    row.pending && `${count(row.pending)} not delivered`,
    row.waiting && `${count(row.waiting)} waiting`,
    row.owed && `${count(row.owed)} not confirmed`,
    row.dead && `${count(row.dead)} rejected`,
  ].filter(Boolean);
  const all = counted(row.recorded, "event");
  return `${shortened(row.adapter, 80)} ${missing.length ? `lacks some of ${all}: ${missing.join(", ")}` : `has all ${all}`}`;
}

function DeliveryRow({ row }: { row: Delivery }) {
  const isBroken = row.last_error !== null || row.dead > 0;
  return (
    <>
      <tr>
        <td class="name">
          <b>{shortened(row.adapter, 80)}</b>
        </td>
        <td>
          <StateWord state={isBroken ? "failed" : !row.state ? "pending" : row.pending ? "running" : "completed"}>{(row.state ?? "unknown").replaceAll("_", " ")}</StateWord>
        </td>
        <td class="num">{count(row.recorded)}</td>
        <td class="num">{count(row.delivered)}</td>
        <td class="num">{row.pending + row.waiting ? <b>{count(row.pending + row.waiting)}</b> : "0"}</td>
        <td class="num">{count(row.owed)}</td>
        <td class="num">{row.dead ? <b class="state failed">{count(row.dead)}</b> : "0"}</td>
        <td class="num">
          <Age since={row.time} suffix=" ago" />
        </td>
      </tr>
      {(row.last_error || row.suggested_fix) && (
        <tr class="why">
          <td colSpan={8}>
            <div class="wrapped">
              {row.last_error && <span class="error">{shortened(row.last_error, 600)}</span>}
              {row.failing_since !== null && (
                <span class="muted">
                  {" "}
                  since <Age since={row.failing_since} suffix="" />, {count(row.attempts)} attempts
                </span>
              )}
              {row.suggested_fix && (
                <div>
                  <span class="label">fix</span> {shortened(row.suggested_fix, 600)}
                </div>
              )}
              {row.log && row.last_error && (
                <div class="hint path">
                  <span class="label">log</span> {shortened(row.log, 300)}
                </div>
              )}
            </div>
          </td>
        </tr>
      )}
    </>
  );
}

/** Seconds that all hooks together take of a step, in the rank where they take most; null if that is not known. */
function secondsPerStep(hooks: Hook[]): number | null {
  const ofRanks = new Map<string, number>();
  for (const { rank, per_step } of hooks) if (per_step !== null) ofRanks.set(rank, (ofRanks.get(rank) ?? 0) + per_step);
  return ofRanks.size ? Math.max(...ofRanks.values()) : null;
}

function Hooks({ hooks, stepSeconds }: { hooks: Hook[]; stepSeconds: number | null }) {
  const seconds = secondsPerStep(hooks);
  const shown = hooks.slice(0, MOST_HOOKS);
  return (
    <details class="hooks" open={hooks.some(({ failures, blocked }) => failures || blocked)}>
      <summary>
        {seconds === null ? (
          "times of hooks"
        ) : (
          <>
            hooks take <b>{shortTime(seconds)}</b> of each step{stepSeconds !== null && `: ${share(seconds / stepSeconds)} of its time`}
          </>
        )}
      </summary>
      <Scroll label="hooks">
        <table class="plain">
          <thead>
            <tr>
              <th>callback</th>
              <th>hook</th>
              <th class="num">per step</th>
              <th class="num">mean</th>
              <th class="num">longest</th>
              <th class="num">calls</th>
              <th class="num">failed</th>
              <th class="num">blocked</th>
            </tr>
          </thead>
          <tbody>
            {shown.map((hook) => (
              <tr key={`${hook.rank} ${hook.callback} ${hook.hook}`}>
                <td class="name">{shortened(hook.callback, 80)}</td>
                <td>{shortened(hook.hook, 80)}</td>
                <td class="num">{hook.per_step === null ? "" : shortTime(hook.per_step)}</td>
                <td class="num">{shortTime(hook.mean_seconds)}</td>
                <td class="num">{shortTime(hook.max_seconds)}</td>
                <td class="num">{count(hook.calls)}</td>
                <td class="num">{hook.failures ? <b class="state failed">{count(hook.failures)}</b> : "0"}</td>
                <td class="num">{hook.blocked ? <b class="state stalled">{count(hook.blocked)}</b> : "0"}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
      {hooks.length > shown.length && <p class="muted">and {count(hooks.length - shown.length)} quicker ones</p>}
    </details>
  );
}
