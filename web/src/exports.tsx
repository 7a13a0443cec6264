// Files that a reader takes along: tables as CSV or Markdown, charts.
import { csv, markdown, type TableRow } from "./format";

/** Save a file under a name that any system takes. */
export function save(name: string, blob: Blob | null): void {
  if (!blob) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name.replace(/[^\w.-]+/g, "_").slice(-120);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

interface Props {
  /** Of the file, without its ending. */
  name: string;
  /** The head first. */
  rows: () => TableRow[];
}

/** Buttons that save a table. */
export function Exports({ name, rows }: Props) {
  const button = (label: string, ending: string, type: string, text: (rows: TableRow[]) => string) => (
    <button class="quiet" title={`save the table as ${label}`} onClick={() => save(`${name.slice(0, 100)}.${ending}`, new Blob([text(rows())], { type }))}>
      {label}
    </button>
  );
  return (
    <span class="exports">
      {button("CSV", "csv", "text/csv", csv)}
      {button("Markdown", "md", "text/markdown", markdown)}
    </span>
  );
}
