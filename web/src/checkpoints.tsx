// The checkpoints of an experiment: run, step, metrics at that step, size, where stored, state of the upload.
import { useMemo } from "preact/hooks";
import { Swatch } from "./arms";
import { slotsOf } from "./colours";
import { Exports } from "./exports";
import { type Answer, useFollowed } from "./followed";
import { bytes, count, counted, number, shortened } from "./format";
import { ExperimentHead, type PageProps } from "./further";
import { Age, Failure, Link, Loading, Search, StateWord, useTitle } from "./parts";
import { type Column, sort, sorted, Table } from "./table";
import { type Direction, type State, UPLOADS } from "./types";
import { hasFilterWords } from "./view";

interface Row {
  name: string;
  step: number;
  time: number;
  epoch: number | null;
  stopped: string | null;
  path: string | null;
  sampler: string | null;
  run: string;
  run_name: string;
  arm: string;
  seed: number | null;
  upload: keyof typeof UPLOADS | null;
  url: string | null;
  bytes: number | null;
  values: (number | null)[];
}

interface Checkpoints extends Answer {
  id: string;
  name: string;
  state: State;
  arms: string[];
  shown: { name: string; direction: Direction }[];
  total: number;
  rows: Row[];
}

export function CheckpointsPage({ id }: PageProps) {
  const [found, error] = useFollowed<Checkpoints>(`/api/experiments/${encodeURIComponent(id)}/checkpoints`, () => `e/${id}`);
  useTitle("checkpoints", found?.name);
  const slots = useMemo(() => slotsOf(found?.arms ?? []), [found?.arms.join("\0")]);
  if (!found) return <Loading error={error} />;
  const columns = columnsOf(found, slots);
  const matching = found.rows.filter((row) => hasFilterWords(row.run_name, row.name, row.path, row.url, row.upload, row.stopped));
  const rows = sorted(matching, columns, sort.value);
  return (
    <main>
      <ExperimentHead experiment={found} current="checkpoints" />
      <div class="tools">
        <Search label="filter checkpoints" hint="filter: run, name, path  ( / )" />
        <span class="muted" role="status">
          {rows.length === found.total ? counted(found.total, "checkpoint") : `${count(rows.length)} of ${counted(found.total, "checkpoint")}`}
        </span>
        <span class="right">
          <Exports name={`${found.name}-checkpoints`} rows={() => [columns.map(({ label }) => label), ...rows.map((row) => columns.map(({ value }) => value(row)))]} />
        </span>
      </div>
      <Failure error={error} />
      {rows.length ? (
        <Table label="checkpoints" rows={rows} columns={columns} keyOf={(row) => `${row.run} ${row.name}`} />
      ) : (
        <p class="empty">{found.total ? "No checkpoint matches the filter." : "No checkpoint yet."}</p>
      )}
    </main>
  );
}

function columnsOf({ shown, rows }: Checkpoints, slots: Map<string, number>): Column<Row>[] {
  const hasUploads = rows.some((row) => row.upload);
  const hasStops = rows.some((row) => row.stopped);
  return [
    {
      id: "run",
      label: "run",
      value: (row) => row.run_name,
      text: (row) => `${row.run_name}${" ".repeat(5)}`,
      cell: (row) => (
        <span class="run-name">
          <Swatch slot={slots.get(row.arm) ?? 0} />
          <Link to={`/r/${encodeURIComponent(row.run)}`}>{shortened(row.run_name, 200)}</Link>
        </span>
      ),
    },
    { id: "name", label: "checkpoint", value: (row) => row.name, text: (row) => row.name },
    { id: "step", label: "step", isNumber: true, value: (row) => row.step, text: (row) => count(row.step) },
    ...shown.map(({ name, direction }, i): Column<Row> => {
      const best = bestOf(rows.map((row) => row.values[i] ?? null), direction);
      const text = (row: Row) => number(row.values[i]);
      return {
        id: `m:${name}`,
        label: name,
        title: `${name} at that step`,
        isNumber: true,
        value: (row) => row.values[i] ?? null,
        text,
        cell: (row) => (best !== null && row.values[i] === best ? <b title="the best">{`\u2605 ${text(row)}`}</b> : text(row)),
      };
    }),
    { id: "time", label: "saved", isNumber: true, width: 11, value: (row) => row.time, text: () => "", cell: (row) => <Age since={row.time} suffix=" ago" /> },
    ...(hasUploads
      ? [
          { id: "upload", label: "upload", width: 12, value: (row: Row) => row.upload, text: (row: Row) => row.upload ?? "", cell: (row: Row) => <Upload state={row.upload} /> },
          { id: "size", label: "size", isNumber: true, value: (row: Row) => row.bytes, text: (row: Row) => (row.bytes === null ? "" : bytes(row.bytes)) },
        ]
      : []),
    ...(hasStops ? [{ id: "stopped", label: "stopped", value: (row: Row) => row.stopped, text: (row: Row) => row.stopped ?? "" }] : []),
    { id: "where", label: "where", width: 60, value: (row) => row.url ?? row.path, text: (row) => row.url ?? row.path ?? "" },
  ];
}

/** The best of several values; null if it is not known which ones are better. */
function bestOf(values: (number | null)[], direction: Direction): number | null {
  const known = values.filter((value) => value !== null);
  return direction === null || known.length < 2 ? null : known.reduce((a, b) => (direction === "min" ? Math.min(a, b) : Math.max(a, b)));
}

function Upload({ state }: { state: Row["upload"] }) {
  if (!state) return null;
  return <StateWord state={UPLOADS[state]}>{state}</StateWord>;
}
