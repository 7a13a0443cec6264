// The checkpoints of an experiment: run, step, metrics at that step, size, where stored, state of the upload.
import { useEffect, useMemo } from "preact/hooks";
import { Swatch } from "./arms";
import { slotsOf } from "./colours";
import { type Answer, useFollowed } from "./followed";
import { bytes, count, counted, number, shortened } from "./format";
import { ExperimentNav, type PageProps } from "./further";
import { Age, Failure, Link, StateWord } from "./parts";
import { type Column, sort, sorted, Table } from "./table";
import type { Direction, State } from "./types";
import { filter } from "./view";

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
  upload: "uploading" | "uploaded" | "conflict" | "removed" | null;
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

const UPLOADS = { uploading: ["\u25b6", "running"], uploaded: ["\u2713", "completed"], conflict: ["\u2715", "failed"], removed: ["\u2298", "cancelled"] } as const;

export function CheckpointsPage({ id }: PageProps) {
  const [found, error] = useFollowed<Checkpoints>(`/api/experiments/${encodeURIComponent(id)}/checkpoints`, () => `e/${id}`);
  const name = found?.name;
  useEffect(() => {
    if (name !== undefined) document.title = `checkpoints \u00b7 ${shortened(name, 80)} \u00b7 evsys-bus`;
  }, [name]);
  const slots = useMemo(() => slotsOf(found?.arms ?? []), [found?.arms.join("\0")]);
  if (!found) return error ? <Failure error={error} /> : <main class="loading" aria-busy="true" />;
  const columns = columnsOf(found, slots);
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matching = found.rows.filter((row) => {
    const text = [row.run_name, row.name, row.path, row.url, row.upload, row.stopped].filter(Boolean).join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const rows = sorted(matching, columns, sort.value);
  return (
    <main>
      <section class="head">
        <div class="title">
          <h1>{shortened(found.name, 300)}</h1>
          <StateWord state={found.state} />
          <ExperimentNav id={id} current="checkpoints" />
        </div>
      </section>
      <div class="tools">
        <input
          type="search"
          placeholder="filter: run, name, path  ( / )"
          aria-label="filter checkpoints"
          value={filter.value}
          onInput={(event) => (filter.value = event.currentTarget.value)}
        />
        <span class="muted" role="status">
          {rows.length === found.total ? counted(found.total, "checkpoint") : `${count(rows.length)} of ${counted(found.total, "checkpoint")}`}
        </span>
      </div>
      {error ? <Failure error={error} /> : null}
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
    ...shown.map(
      ({ name }, i): Column<Row> => ({
        id: `m:${name}`,
        label: name,
        title: `${name} at that step`,
        isNumber: true,
        value: (row) => row.values[i] ?? null,
        text: (row) => number(row.values[i]),
      }),
    ),
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

function Upload({ state }: { state: Row["upload"] }) {
  if (!state) return null;
  const [sign, like] = UPLOADS[state];
  return (
    <span class={`state ${like}`}>
      <span class="sign" aria-hidden="true">
        {sign}
      </span>
      {state}
    </span>
  );
}
