// Pages that the first view does not need: each is loaded when its path is opened.
import type { ComponentType, VNode } from "preact";
import { useEffect, useState } from "preact/hooks";
import { RequestError } from "./api";
import { shortened } from "./format";
import { Link, Loading, Progress, StateWord } from "./parts";
import type { RunHead, State } from "./types";
import { decoded, search } from "./view";

export interface PageProps {
  /** What the path names: an experiment or a run. */
  id: string;
}

type Page = ComponentType<PageProps>;

const PAGES: [path: RegExp, load: () => Promise<Page>][] = [
  [/^\/e\/([^/]+)\/runs\/?$/, async () => (await import("./runs")).RunsPage],
  [/^\/e\/([^/]+)\/evals\/?$/, async () => (await import("./evals")).EvalsPage],
  [/^\/e\/([^/]+)\/checkpoints\/?$/, async () => (await import("./checkpoints")).CheckpointsPage],
  [/^\/c\/?$/, async () => (await import("./compare")).ComparePage],
  [/^\/r\/([^/]+)\/events\/?$/, async () => (await import("./events")).RunEventsPage],
  [/^\/r\/([^/]+)\/?$/, async () => (await import("./run")).RunPage],
  [/^\/health\/?$/, async () => (await import("./health")).HealthPage],
];

const loadedPages = new Map<RegExp, Page>();

/** The page of a path, if it is one of these. */
export function furtherPage(path: string): VNode | null {
  for (const [pattern, load] of PAGES) {
    const found = pattern.exec(path);
    if (found) return <Further key={path} pattern={pattern} load={load} id={decoded(found[1] ?? "")} />;
  }
  return null;
}

function Further({ pattern, load, id }: { pattern: RegExp; load: () => Promise<Page>; id: string }) {
  const [error, setError] = useState<unknown>(null);
  const [, setLoaded] = useState(false);
  useEffect(() => {
    if (loadedPages.has(pattern)) return;
    load().then(
      (page) => {
        loadedPages.set(pattern, page);
        setLoaded(true);
      },
      () => setError(new RequestError(0, "This page could not be loaded.", "The dashboard may have been updated: load the page again.")),
    );
  }, []);
  const Page = loadedPages.get(pattern);
  if (Page) return <Page id={id} />;
  return <Loading error={error} />;
}

const EXPERIMENT_PAGES = [
  ["", "overview"],
  ["metrics", "metrics"],
  ["runs", "runs"],
  ["evals", "evals"],
  ["checkpoints", "checkpoints"],
] as const;

/** Whether the settings of one page, such as the zoom, make sense on the other. */
const haveOneView = (...pages: (string | null)[]) => pages.every((page) => page === "" || page === "metrics");

interface HeadProps {
  experiment: { id: string; name: string; state: State };
  current: (typeof EXPERIMENT_PAGES)[number][0];
}

/** The head of a page of an experiment. */
export function ExperimentHead({ experiment, current }: HeadProps) {
  return (
    <section class="head">
      <div class="title">
        <h1>{shortened(experiment.name, 300)}</h1>
        <StateWord state={experiment.state} />
        <ExperimentNav id={experiment.id} current={current} />
      </div>
    </section>
  );
}

/** Links to the pages of an experiment. */
export function ExperimentNav({ id, current }: { id: string; current: (typeof EXPERIMENT_PAGES)[number][0] | null }) {
  const base = `/e/${encodeURIComponent(id)}`;
  return (
    <nav aria-label="pages of the experiment">
      {EXPERIMENT_PAGES.map(([path, label]) => (
        <Link key={path} to={(path ? `${base}/${path}` : base) + (haveOneView(path, current) ? search.value : "")} class={path === current ? "current" : ""}>
          {label}
        </Link>
      ))}
    </nav>
  );
}

const RUN_PAGES = [
  ["", "run"],
  ["events", "events"],
] as const;

interface TitleProps {
  run: RunHead;
  current: (typeof RUN_PAGES)[number][0];
}

/** The head of a page of a run, with links to its pages and those of its experiment. */
export function RunTitle({ run, current }: TitleProps) {
  const { experiment } = run;
  const base = `/r/${encodeURIComponent(run.id)}`;
  const done = run.num_steps && run.step !== null ? (run.step + 1) / run.num_steps : null;
  return (
    <div class="title">
      <p class="trail">
        <Link to={`/e/${encodeURIComponent(experiment.id)}`}>{shortened(experiment.name, 80)}</Link>
        <span class="muted"> / </span>
      </p>
      <h1>{shortened(run.name, 300)}</h1>
      <StateWord state={run.state} />
      {run.state === "running" && <Progress value={done} state={run.state} />}
      <nav aria-label="pages of the run">
        {RUN_PAGES.map(([path, label]) => (
          <Link key={path} to={path ? `${base}/${path}` : base} class={path === current ? "current" : ""}>
            {label}
          </Link>
        ))}
      </nav>
      <ExperimentNav id={experiment.id} current={null} />
    </div>
  );
}
