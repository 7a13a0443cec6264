// A dense table of any number of rows: only those in view exist. Sorted by one column.
import type { ComponentChildren } from "preact";
import { useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { text } from "./view";

const ROW_HEIGHT = 28;
const ROWS_BEYOND = 12;
const WIDTHS = { least: 5, most: 34 };

export interface Column<Row> {
  id: string;
  label: string;
  title?: string;
  /** What rows are sorted by and what a CSV has. */
  value: (row: Row) => string | number | null;
  /** As it is shown. */
  text: (row: Row) => string;
  cell?: (row: Row) => ComponentChildren;
  /** In characters; by default that of the longest text. */
  width?: number;
  isNumber?: boolean;
}

/** "lr" or "-lr": the column, and whether the largest come first. */
export const sort = text("sort");

export function sorted<Row>(rows: Row[], columns: Column<Row>[], by: string): Row[] {
  const isDown = by.startsWith("-");
  const column = columns.find(({ id }) => id === (isDown ? by.slice(1) : by));
  if (!column) return rows;
  const sign = isDown ? -1 : 1;
  return rows
    .map((row) => ({ row, value: column.value(row) }))
    .sort((a, b) => {
      if (a.value === null || b.value === null) return Number(a.value === null) - Number(b.value === null);
      if (typeof a.value === "number" && typeof b.value === "number") return sign * (a.value - b.value);
      return sign * String(a.value).localeCompare(String(b.value), "en", { numeric: true });
    })
    .map(({ row }) => row);
}

interface Props<Row> {
  label: string;
  rows: Row[];
  columns: Column<Row>[];
  keyOf: (row: Row) => string;
  classOf?: (row: Row) => string;
}

export function Table<Row>({ label, rows, columns, keyOf, classOf }: Props<Row>) {
  const scroll = useRef<HTMLDivElement>(null);
  const [place, setPlace] = useState({ top: 0, height: 800 });
  useLayoutEffect(() => {
    const element = scroll.current!;
    const read = () => setPlace({ top: element.scrollTop, height: element.clientHeight });
    read();
    element.addEventListener("scroll", read, { passive: true });
    const resized = new ResizeObserver(read);
    resized.observe(element);
    return () => {
      element.removeEventListener("scroll", read);
      resized.disconnect();
    };
  }, []);
  const first = Math.max(0, Math.floor(place.top / ROW_HEIGHT) - ROWS_BEYOND);
  const last = Math.min(rows.length, Math.ceil((place.top + place.height) / ROW_HEIGHT) + ROWS_BEYOND);
  const ids = columns.map(({ id }) => id).join("\0");
  const widths = useMemo(() => columns.map((column) => widthOf(column, rows)), [ids, rows]);
  return (
    <div class="dense" ref={scroll} tabIndex={0} role="region" aria-label={label}>
      <table aria-rowcount={rows.length + 1}>
        <colgroup>
          {columns.map(({ id }, i) => (
            <col key={id} style={{ width: `calc(${widths[i]}ch + 18px)` }} />
          ))}
        </colgroup>
        <thead>
          <tr>
            {columns.map((column) => (
              <Head key={column.id} column={column} />
            ))}
          </tr>
        </thead>
        <tbody>
          {first > 0 && <Space rows={first} columns={columns.length} />}
          {rows.slice(first, last).map((row) => (
            <tr key={keyOf(row)} class={classOf?.(row)}>
              {columns.map((column) => (
                <td key={column.id} class={column.isNumber ? "num" : ""} title={column.cell ? undefined : column.text(row)}>
                  {column.cell ? column.cell(row) : column.text(row)}
                </td>
              ))}
            </tr>
          ))}
          {last < rows.length && <Space rows={rows.length - last} columns={columns.length} />}
        </tbody>
      </table>
    </div>
  );
}

function Space({ rows, columns }: { rows: number; columns: number }) {
  return (
    <tr class="space" aria-hidden="true">
      <td colSpan={columns} style={{ height: `${rows * ROW_HEIGHT}px` }} />
    </tr>
  );
}

function Head<Row>({ column }: { column: Column<Row> }) {
  const { id, label, title } = column;
  const by = sort.value;
  const order = by === id ? "ascending" : by === `-${id}` ? "descending" : "none";
  if (!label)
    return (
      <th>
        <span class="unseen">{title ?? id}</span>
      </th>
    );
  const next = order === "none" ? (column.isNumber ? `-${id}` : id) : order === "descending" ? (column.isNumber ? id : "") : column.isNumber ? "" : `-${id}`;
  return (
    <th class={column.isNumber ? "num" : ""} aria-sort={order}>
      <button title={title ?? `sort by ${label}`} onClick={() => (sort.value = next)}>
        <span class="text">{label}</span>
        {order !== "none" && <span aria-hidden="true">{order === "ascending" ? " \u2191" : " \u2193"}</span>}
      </button>
    </th>
  );
}

function widthOf<Row>(column: Column<Row>, rows: Row[]): number {
  if (column.width) return column.width;
  let longest = Math.min(column.label.length + 2, 22);
  for (const row of rows) longest = Math.max(longest, column.text(row).length);
  return Math.max(WIDTHS.least, Math.min(longest, WIDTHS.most));
}
