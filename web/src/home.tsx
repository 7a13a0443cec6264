// All experiments.
import { useRef } from "preact/hooks";
import { useFollowed } from "./followed";
import { number, shortened } from "./format";
import { Age, Failure, Link, Loading, Progress, Scroll, Search, StateWord, useTitle } from "./parts";
import type { ExperimentRow, Home } from "./types";
import { filter, hasFilterWords } from "./view";

/** Running ones first, then the latest; decided when a row appears, so that no live update moves one. */
function useOrder(rows: ExperimentRow[]): ExperimentRow[] {
  const order = useRef<string[]>([]);
  const byId = new Map(rows.map((row) => [row.id, row]));
  const known = new Set(order.current);
  const isActive = (row: ExperimentRow) => Number(row.state === "running" || row.state === "stalled");
  const added = rows.filter(({ id }) => !known.has(id)).sort((a, b) => isActive(b) - isActive(a) || (b.last_event ?? 0) - (a.last_event ?? 0));
  if (added.length) order.current = [...added.map(({ id }) => id), ...order.current];
  return order.current.flatMap((id) => byId.get(id) ?? []);
}

function updated(home: Home, { experiments, removed }: { experiments: ExperimentRow[]; removed: string[] }): Home {
  const rows = new Map([...home.experiments, ...experiments].map((row) => [row.id, row]));
  for (const id of removed) rows.delete(id);
  return { ...home, experiments: [...rows.values()] };
}

export function HomePage() {
  const [home, error] = useFollowed<Home>("/api/home", () => "home", { update: (shown, { home }) => updated(shown, home) });
  const all = useOrder(home?.experiments ?? []);
  useTitle();
  if (!home) return <Loading error={error} />;
  const rows = all.filter(({ name, state, hypothesis, headline, tags }) => hasFilterWords(name, state, hypothesis, headline?.name, ...tags));
  return (
    <main>
      <div class="tools">
        <h1>Experiments</h1>
        <Search label="filter" hint="filter: name, state, tag  ( / )" />
        <span class="muted">{filter.value ? `${rows.length} of ${all.length}` : all.length}</span>
      </div>
      <Failure error={error} />
      {all.length === 0 ? (
        <p class="empty">No experiment yet. A run appears here as soon as it starts with --dash, or with evsys_logger.</p>
      ) : rows.length === 0 ? (
        <p class="empty">No experiment matches the filter.</p>
      ) : (
        <Scroll label="experiments">
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
        </Scroll>
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
        {runs.failed ? <StateWord state="failed">{runs.failed} failed</StateWord> : null}
        {runs.stalled ? <StateWord state="stalled">{runs.stalled} stalled</StateWord> : null}
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
