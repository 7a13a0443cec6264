// One run: its state and error, curves, evals, checkpoints, alerts, texts, config, deliveries.
import { useMemo } from "preact/hooks";
import { Charts } from "./charts";
import { slotsOf } from "./colours";
import { type Content, Contents } from "./contents";
import { Deliveries, type JournalRows } from "./deliveries";
import { type Answer, useFollowed } from "./followed";
import { bytes, count, duration, number, setting, shortened, stepsDone } from "./format";
import { type PageProps, RunTitle } from "./further";
import { Age, Alerts, Fact, Failure, Link, Loading, Prose, Scroll, Section, StateWord, useTitle, Verbatim } from "./parts";
import { type Alert, type Metric, type RunHead, UPLOADS } from "./types";

interface EvalRow {
  id: number;
  kind: string;
  name: string;
  step: number | null;
  time: number;
  predictions: number;
  seconds: number | null;
  values: Record<string, number | null>;
}

interface RunAnswer extends RunHead, JournalRows, Answer {
  /** All arms of the experiment. */
  arms: string[];
  rank: number;
  stop_reason: string | null;
  path: string | null;
  tags: string[];
  notes: string | null;
  config: Record<string, unknown>;
  environment: Record<string, unknown>;
  summary: Record<string, unknown>;
  extras: Record<string, unknown>;
  metrics: (Metric & { last: number | null; min: number | null; max: number | null; last_step: number | null })[];
  evals: EvalRow[];
  eval_count: number;
  checkpoints: { name: string; step: number; time: number; stopped?: string | null; state_path?: string | null; sampler_path?: string | null; upload: keyof typeof UPLOADS | null; url: string | null; bytes: number | null }[];
  alerts: Omit<Alert, "run">[];
  texts: { name: string; step: number; text: string }[];
  contents: { name: string; kind: string; step: number | null; time: number; path: string | null; size: number | null; caption: string | null }[];
  shown_contents: Content[];
  events: Record<string, number>;
}

export function RunPage({ id }: PageProps) {
  const [run, error] = useFollowed<RunAnswer>(`/api/runs/${encodeURIComponent(id)}`, ({ experiment }) => `e/${experiment.id}`);
  useTitle(run?.name);
  if (!run) return <Loading error={error} />;
  return (
    <main>
      <Failure error={error} />
      <Head run={run} />
      <Problems run={run} />
      <Curves run={run} />
      <div class="sections">
        <Evals run={run} />
        <Checkpoints run={run} />
        <Texts run={run} />
        {run.shown_contents.length > 0 && (
          <Section title={`media, tables, histograms and texts (${count(run.shown_contents.length)})`} isOpen>
            <Contents run={run.id} contents={run.shown_contents} />
          </Section>
        )}
        <Files run={run} />
        <Values title="config" values={run.config} isOpen />
        <Values title="summary" values={run.summary} isOpen />
        <Values title="facts from adapters" values={run.extras} />
        <Values title="environment" values={run.environment} />
        <Values title="other events" values={run.events} />
        {(run.deliveries.length > 0 || run.hooks.length > 0) && (
          <Section title="deliveries" isOpen>
            <Deliveries journal={run} />
          </Section>
        )}
      </div>
    </main>
  );
}

function Head({ run }: { run: RunAnswer }) {
  return (
    <section class="head">
      <RunTitle run={run} current="" />
      <p class="facts">
        {run.arm !== run.name && <Fact label="arm">{shortened(run.arm, 120)}</Fact>}
        {run.seed !== null && <Fact label="seed">{run.seed}</Fact>}
        {run.rank > 0 && <Fact label="rank">{run.rank}</Fact>}
        {run.step !== null && <Fact label={run.unit ?? "steps"}>{stepsDone(run)}</Fact>}
        <Fact label="started">
          <Age since={run.started} suffix=" ago" />
        </Fact>
        {run.seconds !== null && <Fact label={run.ended !== null ? "took" : "for"}>{duration(run.seconds)}</Fact>}
        <Fact label={run.ended === null ? "last event" : "ended"}>
          <Age since={run.ended ?? run.last_event} suffix=" ago" />
        </Fact>
        {run.stop_reason && <Fact label="stopped">{shortened(run.stop_reason, 200)}</Fact>}
        {run.tags.slice(0, 30).map((tag) => (
          <span class="tag" key={tag}>
            {tag}
          </span>
        ))}
      </p>
      <Prose label="notes" text={run.notes} />
      {run.path && <p class="hint path">{shortened(run.path, 400)}</p>}
    </section>
  );
}

const MOST_ALERTS = 20;

function Problems({ run }: { run: RunAnswer }) {
  if (!run.error && !run.alerts.length) return null;
  return (
    <section class="problems" aria-label="what is broken">
      {run.error && <Verbatim class="whole" text={run.error} />}
      <Alerts alerts={run.alerts} most={MOST_ALERTS} />
    </section>
  );
}

function Curves({ run }: { run: RunAnswer }) {
  const { id, arm, experiment } = run;
  const slots = useMemo(() => slotsOf(run.arms), [run.arms.join("\0")]); // as on the experiment's page
  const labels = useMemo(() => new Map([[id, arm]]), [id, arm]);
  const sources = useMemo(() => [{ experiment: experiment.id, runs: [id] }], [id, experiment.id]);
  if (!run.metrics.length) return <p class="empty">No metric yet.</p>;
  const charted = { id: experiment.id, arms: [{ name: arm }], headlines: [], metrics: run.metrics, sources, labels };
  return <Charts experiment={charted} slots={slots} isGrouped={run.metrics.length > 12} />;
}

const MOST_EVALS = 12;

function Evals({ run }: { run: RunAnswer }) {
  if (!run.evals.length) return null;
  return (
    <Section title={`evals (${count(run.eval_count)})`} isOpen>
      <Scroll label="evals">
        <table class="plain">
          <thead>
            <tr>
              <th>eval</th>
              <th class="num">step</th>
              <th>metrics</th>
              <th class="num">predictions</th>
              <th class="num">when</th>
            </tr>
          </thead>
          <tbody>
            {run.evals.slice(0, MOST_EVALS).map((row) => (
              <tr key={row.id}>
                <td class="name">{shortened(row.name, 100)}</td>
                <td class="num">{row.step === null ? "end" : count(row.step)}</td>
                <td class="values">
                  {Object.entries(row.values).slice(0, 12).map(([name, value]) => (
                    <span key={name} class="fact">
                      <span class="label">{shortened(name.startsWith(`${row.name}/`) ? name.slice(row.name.length + 1) : name, 60)}</span> {number(value)}
                    </span>
                  ))}
                </td>
                <td class="num">
                  {row.predictions ? (
                    <Link to={`/e/${encodeURIComponent(run.experiment.id)}/evals?a=${row.id}`}>{count(row.predictions)}</Link>
                  ) : (
                    ""
                  )}
                </td>
                <td class="num">
                  <Age since={row.time} suffix=" ago" />
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
      {run.eval_count > MOST_EVALS && <p class="muted">the latest {MOST_EVALS}; the curves above show all</p>}
    </Section>
  );
}

function Checkpoints({ run }: { run: RunAnswer }) {
  if (!run.checkpoints.length) return null;
  const latest = run.checkpoints.slice(-20).reverse();
  const hasUploads = latest.some(({ upload }) => upload);
  return (
    <Section title={`checkpoints (${count(run.checkpoints.length)})`} isOpen>
      <Scroll label="checkpoints">
        <table class="plain">
          <thead>
            <tr>
              <th>checkpoint</th>
              <th class="num">step</th>
              <th>where</th>
              {hasUploads && <th>upload</th>}
              {hasUploads && <th class="num">size</th>}
              <th class="num">when</th>
            </tr>
          </thead>
          <tbody>
            {latest.map((row) => (
              <tr key={row.name}>
                <td class="name">{shortened(row.name, 100)}</td>
                <td class="num">{count(row.step)}</td>
                <td class="path">{shortened(row.url ?? row.state_path ?? row.sampler_path ?? "", 300)}</td>
                {hasUploads && <td>{row.upload && <StateWord state={UPLOADS[row.upload]}>{row.upload}</StateWord>}</td>}
                {hasUploads && <td class="num">{row.bytes ? bytes(row.bytes) : ""}</td>}
                <td class="num">
                  <Age since={row.time} suffix=" ago" />
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
    </Section>
  );
}

function Texts({ run }: { run: RunAnswer }) {
  if (!run.texts.length) return null;
  return (
    <Section title={`texts of steps (${count(run.texts.length)})`} isOpen>
      {run.texts.slice(0, 30).map(({ name, step, text }) => (
        <details class="text" key={name}>
          <summary>
            <b class="name">{shortened(name, 120)}</b> <span class="muted">step {count(step)}</span>{" "}
            <span class="hint">{shortened(text.trim().split("\n")[0] ?? "", 160)}</span>
          </summary>
          <Verbatim text={text} />
        </details>
      ))}
    </Section>
  );
}

function Files({ run }: { run: RunAnswer }) {
  if (!run.contents.length) return null;
  return (
    <Section title={`files (${count(run.contents.length)})`}>
      <Scroll label="files and media">
        <table class="plain">
          <tbody>
            {run.contents.slice(-60).reverse().map((item, i) => (
              <tr key={i}>
                <td class="name">{shortened(item.name, 120)}</td>
                <td>{item.kind}</td>
                <td class="num">{item.step === null ? "" : `step ${count(item.step)}`}</td>
                <td class="num">{item.size ? bytes(item.size) : ""}</td>
                <td class="path">{shortened(item.path ?? item.caption ?? "", 200)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
    </Section>
  );
}

function Values({ title, values, isOpen = false }: { title: string; values: Record<string, unknown>; isOpen?: boolean }) {
  const entries = Object.entries(values);
  if (!entries.length) return null;
  return (
    <Section title={`${title} (${count(entries.length)})`} isOpen={isOpen && entries.length <= 60}>
      <dl class="columns">
        {entries.slice(0, 500).map(([key, value]) => (
          <div key={key}>
            <dt>{shortened(key, 120)}</dt>
            <dd>{typeof value === "string" ? shortened(value, 400) : setting(value)}</dd>
          </div>
        ))}
      </dl>
    </Section>
  );
}
