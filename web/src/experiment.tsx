// One experiment: which arm wins, is anything broken, and the curves.
import { useMemo } from "preact/hooks";
import { ArmTable } from "./arms";
import { Charts } from "./charts";
import { slotsOf } from "./colours";
import { count, counted, duration, shortened, valueText, withDeviation } from "./format";
import { useFollowed } from "./followed";
import { ExperimentNav } from "./further";
import { Age, Alerts, Failure, Loading, Progress, Prose, StateWord, useTitle } from "./parts";
import type { Experiment, Run } from "./types";

export function ExperimentPage({ id, onlyMetrics }: { id: string; onlyMetrics: boolean }) {
  const [experiment, error] = useFollowed<Experiment>(`/api/experiments/${encodeURIComponent(id)}`, () => `e/${id}`, {
    update: (shown, { experiment }) => ({ ...shown, ...experiment }),
  });
  useTitle(experiment?.name);
  if (!experiment) return <Loading error={error} />;
  return (
    <main>
      <Failure error={error} />
      <Shown experiment={experiment} onlyMetrics={onlyMetrics} />
    </main>
  );
}

function Shown({ experiment: shown, onlyMetrics }: { experiment: Experiment; onlyMetrics: boolean }) {
  const names = shown.arms.map((arm) => arm.name).join("\0");
  const slots = useMemo(() => slotsOf(names.split("\0")), [names]);
  return (
    <>
      <Header experiment={shown} onlyMetrics={onlyMetrics} />
      {!onlyMetrics && (
        <>
          <Problems experiment={shown} />
          <ArmTable experiment={shown} slots={slots} />
        </>
      )}
      <Charts experiment={shown} slots={slots} isGrouped={onlyMetrics} />
      <Same same={shown.same} />
    </>
  );
}

function Header({ experiment, onlyMetrics }: { experiment: Experiment; onlyMetrics: boolean }) {
  const { started, ended, last_event } = experiment;
  return (
    <section class="head">
      <div class="title">
        <h1>{shortened(experiment.name, 300)}</h1>
        <StateWord state={experiment.state} />
        <Progress value={experiment.progress} state={experiment.state} />
        <span class="muted">
          {started !== null && ended !== null ? (
            `took ${duration(ended - started)}`
          ) : (
            <>
              last event <Age since={last_event} suffix=" ago" />
            </>
          )}
        </span>
        {experiment.tags.map((tag) => (
          <span class="tag" key={tag}>
            {tag}
          </span>
        ))}
        <ExperimentNav id={experiment.id} current={onlyMetrics ? "metrics" : ""} />
      </div>
      {!onlyMetrics && (
        <>
          <Summary experiment={experiment} />
          <Prose label="hypothesis" text={experiment.hypothesis} />
          <Prose label="conclusion" text={experiment.conclusion} />
          <Prose label="notes" text={experiment.notes} />
        </>
      )}
    </section>
  );
}

/** The two questions that bring a reader here, answered in a line. */
function Summary({ experiment }: { experiment: Experiment }) {
  const { arms, runs, headlines, baseline } = experiment;
  const [first] = headlines;
  const winner = arms.find((arm) => arm.winner);
  const value = winner?.values[0];
  const failed = runs.filter((run) => run.state === "failed").length;
  const stalled = runs.filter((run) => run.state === "stalled").length;
  return (
    <p class="summary">
      {winner && value && first ? (
        <>
          <b class="name">{shortened(winner.name, 80)}</b> leads by <span class="name">{shortened(first.name, 80)}</span>
          {` (${first.direction === "min" ? "lower" : "higher"} is better): `}
          <b>{withDeviation(value.mean, value.sd)}</b>
          {baseline !== null && baseline !== winner.name && value.delta !== null && (
            <>
              {`, ${withDeviation(value.delta, value.delta_sd, true)} to `}
              <span class="name">{shortened(baseline, 80)}</span>
            </>
          )}
          {". "}
        </>
      ) : first && arms.length > 1 ? (
        <>
          No arm leads yet by <span class="name">{shortened(first.name, 80)}</span>
          {first.direction === null && ", of which nothing says whether higher or lower is better"}.{" "}
        </>
      ) : null}
      {failed || stalled ? (
        <span class={failed ? "state failed" : "state stalled"}>
          {[failed && `${counted(failed, "run")} failed`, stalled && `${counted(stalled, "run")} stalled`].filter(Boolean).join(", ")}
          {` of ${runs.length}.`}
        </span>
      ) : (
        <span class="muted">{counted(runs.length, "run")}, none failed.</span>
      )}
    </p>
  );
}

const MOST_PROBLEMS = 5;
const MOST_ALERTS = 3;

function runName(run: Run): string {
  const name = run.name ?? run.id;
  return run.arm && run.arm !== name && !name.includes(run.arm) ? `${run.arm} \u00b7 ${name}` : name;
}

/** Runs that broke in the same way are one line: of a hundred that hit one error, a reader needs the error once. */
function groupedByError(runs: Run[]): Run[][] {
  const groups = new Map<string, Run[]>();
  for (const run of runs) {
    if (run.state !== "failed" && run.state !== "stalled") continue;
    const key = `${run.state} ${lastLine(run.error ?? "").replace(/\d+/g, "#")}`;
    const group = groups.get(key);
    if (group) group.push(run);
    else groups.set(key, [run]);
  }
  return [...groups.values()].sort((a, b) => Number(a[0]!.state === "stalled") - Number(b[0]!.state === "stalled"));
}

function Problems({ experiment }: { experiment: Experiment }) {
  const groups = groupedByError(experiment.runs);
  if (!groups.length && !experiment.alerts.length && !experiment.error) return null;
  return (
    <section class="problems" aria-label="what is broken">
      {experiment.error && !groups.some(([run]) => run!.error === experiment.error) && (
        <details>
          <summary>
            <StateWord state="failed">experiment</StateWord> <span class="first">{shortened(lastLine(experiment.error), 300)}</span>
          </summary>
          <pre>{shortened(experiment.error, 20_000)}</pre>
        </details>
      )}
      {groups.slice(0, MOST_PROBLEMS).map((runs) => (
        <ProblemRuns key={runs[0]!.id} runs={runs} />
      ))}
      {groups.length > MOST_PROBLEMS && <p class="muted">and {groups.length - MOST_PROBLEMS} other errors</p>}
      <Alerts alerts={experiment.alerts} most={MOST_ALERTS} />
    </section>
  );
}

function ProblemRuns({ runs }: { runs: Run[] }) {
  const run = runs[0]!;
  return (
    <details>
      <summary>
        <StateWord state={run.state} /> <b class="name">{shortened(runName(run), 80)}</b>{" "}
        {runs.length > 1 && <b>and {counted(runs.length - 1, "more run")} </b>}
        {run.step !== null && (
          <span class="muted">
            at {count(run.step)} {run.unit ?? "steps"}
          </span>
        )}{" "}
        {run.error ? (
          <span class="first">{shortened(lastLine(run.error), 300)}</span>
        ) : (
          run.state === "stalled" && <Age since={run.last_event} suffix=" without an event" />
        )}
      </summary>
      {runs.length > 1 && <p class="prose">{shortened(runs.map(runName).join(", "))}</p>}
      {run.error && <pre>{shortened(run.error, 20_000)}</pre>}
    </details>
  );
}

/** Of a traceback, the line that names the error. */
function lastLine(text: string): string {
  const lines = shortened(text, 100_000).trim().split("\n");
  return text.startsWith("Traceback") ? lines[lines.length - 1]! : lines[0]!;
}

function Same({ same }: { same: Record<string, unknown> }) {
  const entries = Object.entries(same);
  if (!entries.length) return null;
  return (
    <details class="same">
      <summary>config that all runs share ({entries.length})</summary>
      <dl>
        {entries.map(([key, value]) => (
          <div key={key}>
            <dt>{key}</dt>
            <dd>{valueText(value)}</dd>
          </div>
        ))}
      </dl>
    </details>
  );
}
