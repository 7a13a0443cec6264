// All experiments.
import { useEffect } from "preact/hooks";
import { signal } from "@preact/signals";
import { getJson } from "./api";
import { number, shortened } from "./format";
import { subscribe } from "./live";
import { Age, Failure, Link, Progress, StateWord, useLoaded } from "./parts";
import type { ExperimentRow, Home } from "./types";
import { filter, paused } from "./view";

const home = signal<Home | null>(null);
const loads = signal(0);

/** Running ones first, then the latest; decided when the page loads, so that no live update moves a row. */
function ordered(rows: ExperimentRow[]): ExperimentRow[] {
  const active = (row: ExperimentRow) => Number(row.state === "running" || row.state === "stalled");
  return [...rows].sort((a, b) => active(b) - active(a) || (b.last_event ?? 0) - (a.last_event ?? 0));
}

async function load(abort: AbortSignal): Promise<void> {
  const loaded = await getJson<Home>("/api/home", abort);
  home.value = { ...loaded, experiments: ordered(loaded.experiments) };
}

function update(change: { experiments?: ExperimentRow[]; removed?: string[] }): void {
  const now = home.peek();
  if (!now) return;
  const changed = new Map((change.experiments ?? []).map((row) => [row.id, row]));
  const removed = new Set(change.removed ?? []);
  const known = new Set(now.experiments.map((row) => row.id));
  home.value = {
    ...now,
    experiments: [
      ...ordered([...changed.values()].filter((row) => !known.has(row.id))),
      ...now.experiments.filter((row) => !removed.has(row.id)).map((row) => changed.get(row.id) ?? row),
    ],
  };
}

function matches(row: ExperimentRow, words: string[]): boolean {
  const text = [row.name, row.state, row.hypothesis ?? "", row.headline?.name ?? "", ...row.tags].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

export function HomePage() {
  const isPaused = paused.value;
  const error = useLoaded(load, `${isPaused} ${loads.value}`);
  const isLoaded = home.value !== null;
  useEffect(() => {
    document.title = "evsys-bus";
    if (!isLoaded || isPaused) return;
    return subscribe("home", home.peek()!.frame ?? null, ({ header }) => {
      if (header.kind === "data") update(header.home);
      else loads.value++;
    });
  }, [isLoaded, isPaused]);

  if (!home.value) return error ? <Failure error={error} /> : <main class="loading" aria-busy="true" />;
  const all = home.value.experiments;
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all.filter((row) => matches(row, words));
  return (
    <main>
      <div class="tools">
        <h1>Experiments</h1>
        <input
          type="search"
          placeholder="filter: name, state, tag  ( / )"
          aria-label="filter"
          value={filter.value}
          onInput={(event) => (filter.value = event.currentTarget.value)}
        />
        <span class="muted">{words.length ? `${rows.length} of ${all.length}` : all.length}</span>
      </div>
      {error ? <Failure error={error} /> : null}
      {all.length === 0 ? (
        <p class="empty">No experiment yet. A run appears here as soon as it starts with --dash, or with evsys_logger.</p>
      ) : rows.length === 0 ? (
        <p class="empty">No experiment matches the filter.</p>
      ) : (
        <div class="scroll">
          <table class="experiments">
            <thead>
              <tr>
                <th>experiment</th>
                <th>state</th>
                <th>progress</th>
                <th class="num">arms</th>
                <th>runs</th>
                <th>headline</th>
                <th class="num">last event</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((row) => (
                <Row key={row.id} row={row} />
              ))}
            </tbody>
          </table>
        </div>
      )}
    </main>
  );
}

const MOST_TAGS = 4;

function Row({ row }: { row: ExperimentRow }) {
  const { runs, headline } = row;
  const total = Math.max(runs.total ?? 0, runs.planned ?? 0);
  return (
    <tr class={row.state}>
      <td class="name">
        <Link to={`/e/${encodeURIComponent(row.id)}`}>{shortened(row.name, 200)}</Link>
        {row.tags.slice(0, MOST_TAGS).map((tag) => (
          <span class="tag" key={tag}>
            {tag}
          </span>
        ))}
        {row.tags.length > MOST_TAGS && <span class="hint">+{row.tags.length - MOST_TAGS}</span>}
        {row.hypothesis && <div class="hint">{shortened(row.hypothesis, 200)}</div>}
      </td>
      <td>
        <StateWord state={row.state} />
      </td>
      <td>
        <Progress value={row.progress} state={row.state} />
      </td>
      <td class="num arms">{row.arms}</td>
      <td class="runs">
        {runs.completed ?? 0} of {total} done
        {runs.failed ? <span class="state failed">{runs.failed} failed</span> : null}
        {runs.stalled ? <span class="state stalled">{runs.stalled} stalled</span> : null}
      </td>
      <td class="headline">
        {headline && (
          <>
            <Spark values={headline.spark} name={headline.spark_name ?? headline.name} />
            <b>{number(headline.value)}</b>
            <span class="hint" title={headline.name}>
              {headline.name}
              {headline.arm && ` \u00b7 ${headline.arm}`}
            </span>
          </>
        )}
      </td>
      <td class="num">
        <Age since={row.last_event} suffix=" ago" />
      </td>
    </tr>
  );
}

const SPARK = { width: 84, height: 20 };

function Spark({ values, name }: { values: (number | null)[]; name: string }) {
  const known = values.filter((value): value is number => value !== null && Number.isFinite(value));
  if (known.length < 2) return <svg class="spark" width={SPARK.width} height={SPARK.height} aria-hidden="true" />;
  const low = Math.min(...known);
  const range = Math.max(...known) - low || 1;
  let path = "";
  let pen = "M";
  values.forEach((value, i) => {
    if (value === null || !Number.isFinite(value)) {
      pen = "M";
      return;
    }
    const x = 1 + ((SPARK.width - 2) * i) / (values.length - 1);
    const y = SPARK.height - 2 - ((SPARK.height - 4) * (value - low)) / range;
    path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  return (
    <svg class="spark" width={SPARK.width} height={SPARK.height} aria-hidden="true">
      <title>{shortened(name, 200)}</title>
      <path d={path} />
    </svg>
  );
}
