// Texts, tables, histograms and pictures of a run: the newest of each name.
import { useEffect, useState } from "preact/hooks";
import { getBlob } from "./api";
import { Exports } from "./exports";
import { count, number, shortened } from "./format";
import { Failure, Scroll, Verbatim } from "./parts";

type Cell = string | number | boolean | null;

export interface Content {
  kind: "text" | "table" | "histogram" | "image" | "figure";
  name: string;
  step: number | null;
  time: number;
  caption: string | null;
  data: { text?: string; columns?: string[]; rows?: Cell[][]; row_count?: number | null; edges?: (number | null)[]; counts?: (number | null)[] };
  /** The digest of a picture that this machine has. */
  picture: string | null;
  earlier: number;
}

export function Contents({ run, contents }: { run: string; contents: Content[] }) {
  return (
    <div class="contents">
      {contents.map((each) => (
        <article key={`${each.kind} ${each.name}`} class={`content ${each.kind}`}>
          <h3>
            <span class="name">{shortened(each.name, 120)}</span>{" "}
            <span class="muted">
              {each.kind}
              {each.step !== null && ` \u00b7 step ${count(each.step)}`}
              {each.earlier > 0 && ` \u00b7 ${count(each.earlier)} earlier`}
            </span>
          </h3>
          <Shown run={run} content={each} />
          {each.caption && <p class="hint">{shortened(each.caption, 300)}</p>}
        </article>
      ))}
    </div>
  );
}

function Shown({ run, content }: { run: string; content: Content }) {
  const { kind, data, picture } = content;
  if (kind === "text") return <Verbatim text={data.text ?? ""} />;
  if (kind === "histogram") return <Histogram edges={data.edges ?? []} counts={data.counts ?? []} />;
  if (kind === "table") return <TableOf content={content} />;
  return picture ? <Picture run={run} digest={picture} name={content.caption ?? content.name} /> : <p class="muted">its file is not on the dashboard's machine, or is no picture</p>;
}

function TableOf({ content: { name, data } }: { content: Content }) {
  const { columns = [], rows = [], row_count } = data;
  const text = (cell: Cell) => (typeof cell === "number" ? number(cell) : cell === null ? "" : String(cell));
  return (
    <>
      <Scroll label={`table ${shortened(name, 80)}`}>
        <table class="plain">
          <thead>
            <tr>
              {columns.map((column, i) => (
                <th key={i}>{column}</th>
              ))}
            </tr>
          </thead>
          <tbody>
            {rows.map((row, i) => (
              <tr key={i}>
                {row.map((cell, k) => (
                  <td key={k}>{text(cell)}</td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
      <p class="muted">
        {row_count && row_count > rows.length ? `the first ${count(rows.length)} of ${count(row_count)} rows ` : ""}
        <Exports name={name} rows={() => [columns, ...rows.map((row) => row.map((cell) => (typeof cell === "boolean" ? String(cell) : cell)))]} />
      </p>
    </>
  );
}

const SIZE = { width: 300, height: 96 };

function Histogram({ edges, counts }: { edges: (number | null)[]; counts: (number | null)[] }) {
  const known = edges.filter((each) => each !== null);
  const [first, last] = [known[0], known.at(-1)];
  const most = Math.max(0, ...counts.map((each) => each ?? 0));
  if (first === undefined || last === undefined || !(last > first) || !most) return <p class="muted">no values</p>;
  const total = counts.reduce<number>((sum, each) => sum + (each ?? 0), 0);
  const at = (edge: number) => (SIZE.width * (edge - first)) / (last - first);
  const label = `${count(total)} values from ${number(first)} to ${number(last)}, at most ${count(most)} in a bin`;
  return (
    <figure>
      <svg class="bars hue-0" width={SIZE.width} height={SIZE.height} role="img" aria-label={label}>
        {counts.map((each, i) => {
          const [from, to] = [edges[i], edges[i + 1]];
          if (!each || from === null || from === undefined || to === null || to === undefined) return null;
          const height = (SIZE.height * each) / most;
          return (
            <rect key={i} x={at(from)} y={SIZE.height - height} width={Math.max(1, at(to) - at(from) - 1)} height={height}>
              <title>{`${number(from)} to ${number(to)}: ${count(each)}`}</title>
            </rect>
          );
        })}
      </svg>
      <figcaption class="hint">{label}</figcaption>
    </figure>
  );
}

function Picture({ run, digest, name }: { run: string; digest: string; name: string }) {
  const [url, setUrl] = useState("");
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    const abort = new AbortController();
    let made = "";
    getBlob(`/api/runs/${encodeURIComponent(run)}/media/${digest}`, abort.signal).then(
      (blob) => setUrl((made = URL.createObjectURL(blob))),
      (failed) => !abort.signal.aborted && setError(failed),
    );
    return () => {
      abort.abort();
      if (made) URL.revokeObjectURL(made);
    };
  }, [digest]);
  if (error) return <Failure error={error} />;
  return url ? <img src={url} alt={shortened(name, 200)} /> : <p class="muted">loading</p>;
}
