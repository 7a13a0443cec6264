// One experiment: which arm wins, is anything broken, and the curves.
import { Fragment } from "preact";
import { useMemo } from "preact/hooks";
import { ArmTable } from "./arms";
import { Charts } from "./charts";
import { slotsOf } from "./colours";
import { count, counted, duration, shortened, valueText, withDeviation } from "./format";
import { useFollowed } from "./followed";
import { ExperimentNav } from "./further";
import { Age, Alerts, Failure, Link, Loading, Progress, Prose, StateWord, useTitle, Verbatim } from "./parts";
import type { ArmValue, Experiment, Headline, Run } from "./types";

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
          {ended !== null ? (
            <>
              ended <Age since={ended} suffix=" ago" />
              {started !== null && `, took ${duration(ended - started)}`}
            </>
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
  const { runs } = experiment;
  const broken = (["failed", "stalled"] as const).map((state) => [state, runs.filter((run) => run.state === state).length] as const).filter(([, count]) => count);
  return (
    <p class="summary">
      <Leader experiment={experiment} />
      {broken.length ? (
        <>
          {broken.map(([state, count], i) => (
            <Fragment key={state}>
              {i > 0 && ", "}
              <StateWord state={state}>
                {counted(count, "run")} {state}
              </StateWord>
            </Fragment>
          ))}
          {` of ${runs.length}.`}
        </>
      ) : (
        <span class="muted">{runs.length ? `${counted(runs.length, "run")}, none failed.` : "No run has started."}</span>
      )}
    </p>
  );
}

/** Which arm is the best by the metric that decides, and how far it is ahead of the baseline and of the second one. */
function Leader({ experiment }: { experiment: Experiment }) {
  const { arms, headlines, baseline, lead } = experiment;
  const leader = arms.length > 1 ? arms.find((arm) => arm.winner) : arms[0];
  const isDeciding = ({ name }: Headline, i: number) => (lead ? name === lead.metric : hasMean(leader?.values[i]));
  const place = Math.max(0, headlines.findIndex(isDeciding));
  const headline = headlines[place];
  const value = leader?.values[place];
  if (!headline || (arms.length < 2 && !hasMean(value))) return null;
  const metric = <span class="name">{shortened(headline.name, 80)}</span>;
  if (!leader || !hasMean(value)) {
    return (
      <>
        No arm leads yet by {metric}
        {headline.direction === null && ", of which nothing says whether higher or lower is better"}.{" "}
      </>
    );
  }
  const shown = <b>{withDeviation(value.mean, value.sd)}</b>;
  if (arms.length === 1) {
    return (
      <>
        {metric}: {shown}.{" "}
      </>
    );
  }
  const second = lead && arms.find(({ name }) => name === lead.second);
  const isBehind = lead?.delta != null && (headline.direction === "min" ? lead.delta > 0 : lead.delta < 0); // of an arm that is incomplete
  const isClear = isBehind || lead?.delta == null || (lead.delta !== 0 && Math.abs(lead.delta) >= 2 * (lead.delta_sd ?? 0));
  return (
    <>
      <b class="name">{shortened(leader.name, 80)}</b> leads{!isClear && ", but not clearly,"} by {metric}
      {headline.direction !== null && ` (${headline.direction === "min" ? "lower" : "higher"} is better)`}: {shown}
      {baseline !== null && value.delta !== null && lead?.second !== baseline && <Ahead delta={value.delta} error={value.delta_sd} of={baseline} />}
      {lead?.delta != null && !isBehind && <Ahead delta={lead.delta} error={lead.delta_sd} of={lead.second} what={lead.second === baseline ? "" : "the second, "} />}
      {second && isBehind && (
        <>
          {"; "}
          <span class="name">{shortened(second.name, 80)}</span> has {withDeviation(second.values[place]!.mean, second.values[place]!.sd)}, but not of all its runs
        </>
      )}
      {". "}
    </>
  );
}

function Ahead({ delta, error, of, what = "" }: { delta: number; error: number | null; of: string; what?: string }) {
  return (
    <>
      {`, ${withDeviation(delta, error, true)} to ${what}`}
      <span class="name">{shortened(of, 80)}</span>
    </>
  );
}

const hasMean = (value: ArmValue | null | undefined): value is ArmValue & { mean: number } => value?.mean !== null && value?.mean !== undefined;

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
  const broken = experiment.deliveries.filter(({ error, dead }) => error || dead);
  if (!groups.length && !experiment.alerts.length && !experiment.error && !broken.length) return null;
  return (
    <section class="problems" aria-label="what is broken">
      {experiment.error && !groups.some(([run]) => run!.error === experiment.error) && (
        <details>
          <summary>
            <StateWord state="failed">experiment</StateWord> <span class="first">{shortened(lastLine(experiment.error), 300)}</span>
          </summary>
          <Verbatim text={experiment.error} />
        </details>
      )}
      {groups.slice(0, MOST_PROBLEMS).map((runs) => (
        <ProblemRuns key={runs[0]!.id} runs={runs} />
      ))}
      {groups.length > MOST_PROBLEMS && <p class="muted">and {groups.length - MOST_PROBLEMS} other errors</p>}
      {broken.slice(0, MOST_PROBLEMS).map(({ adapter, journal, pending, dead, error, fix }) => (
        <p class="alert" key={`${journal} ${adapter}`}>
          <StateWord state="failed">delivery</StateWord> <b class="name">{shortened(adapter, 80)}</b>{" "}
          {[pending && `${counted(pending, "event")} not delivered`, dead && `${counted(dead, "event")} rejected`].filter(Boolean).join(", ")}{" "}
          {error && <span class="first">{shortened(error, 300)}</span>} {fix && <span>fix: {shortened(fix, 300)} </span>}
          <Link to={`/health?q=${encodeURIComponent(adapter)}`}>health</Link>
        </p>
      ))}
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
            after {count(run.step + 1)} {run.unit ?? "steps"}
          </span>
        )}{" "}
        {run.error ? (
          <span class="first">{shortened(lastLine(run.error), 300)}</span>
        ) : (
          run.state === "stalled" && <Age since={run.last_event} suffix=" without an event" />
        )}
      </summary>
      {runs.length > 1 && <p class="prose">{shortened(runs.map(runName).join(", "))}</p>}
      {run.error && <Verbatim text={run.error} />}
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
