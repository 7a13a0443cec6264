// Numbers, times and texts for people.

const GROUPED = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const MINUS = "\u2212";

function exponent(value: number, digits: number): string {
  return value.toExponential(digits).replace("e+", "e").replace(/^-/, MINUS).replace("e-", `e${MINUS}`);
}

export function count(value: number): string {
  return GROUPED.format(value);
}

/** How many steps a run has done, of how many: "2,000 of 2,000". Its last step counts from 0. */
export function stepsDone({ step, num_steps }: { step: number | null; num_steps: number | null }): string {
  return step === null ? "" : `${count(step + 1)}${num_steps ? ` of ${count(num_steps)}` : ""}`;
}

/** "1 run", "2 runs". */
export function counted(value: number, noun: string): string {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** A number at four significant digits; never "0" for what is not zero. */
export function number(value: number | null | undefined): string {
  if (value === null || value === undefined) return "\u2013";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "Inf" : `${MINUS}Inf`;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e7 || size < 1e-3) return exponent(value, 2);
  if (Number.isInteger(value)) return GROUPED.format(value).replace("-", MINUS);
  return value.toFixed(Math.max(0, 3 - Math.floor(Math.log10(size)))).replace("-", MINUS);
}

/** Decimals that show one digit of a deviation, two where it begins with 1. */
function decimalsOf(sd: number): number {
  const power = Math.floor(Math.log10(sd));
  return sd / 10 ** power < 2 ? 1 - power : -power;
}

/** "1.790 \u00b1 0.007": rounded to the deviation. */
export function withDeviation(mean: number | null, sd: number | null, signed = false): string {
  if (mean === null || !Number.isFinite(mean)) return number(mean);
  const sign = signed && mean > 0 ? "+" : "";
  if (!sd || !Number.isFinite(sd)) return sign + number(mean);
  const decimals = decimalsOf(sd);
  const size = Math.max(Math.abs(mean), sd);
  if (decimals > 5 || size >= 1e7) {
    const power = Math.floor(Math.log10(size));
    const scaled = Math.max(0, Math.min(8, decimals + power));
    const [m, s] = [mean, sd].map((each) => (each / 10 ** power).toFixed(scaled).replace("-", MINUS));
    return `(${sign}${m} \u00b1 ${s})e${String(power).replace("-", MINUS)}`;
  }
  const [m, s] = [mean, sd].map((each) => each.toFixed(Math.max(0, Math.min(8, decimals))).replace("-", MINUS));
  return `${sign}${m} \u00b1 ${s}`;
}

/** "1.2 MB". */
export function bytes(size: number): string {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const power = size < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(size) / 3 + 1e-9));
  return `${power ? (size / 1e3 ** power).toPrecision(3) : size} ${units[power]}`;
}

/** A short time: "0.4 \u00b5s", "12 \u00b5s", "3.4 ms", "1.2 s". */
export function shortTime(seconds: number): string {
  if (seconds >= 60) return duration(seconds);
  const [unit, size] = ([["s", 1], ["ms", 1e-3], ["\u00b5s", 1e-6], ["ns", 1e-9]] as const).find(([, least]) => seconds >= least) ?? ["s", 1];
  return seconds > 0 ? `${Number((seconds / size).toPrecision(2))} ${unit}` : "0";
}

/** A part of a whole, at two digits: "25 %", "0.3 %"; never "0 %" for what is not nothing. */
export function share(part: number): string {
  return part > 0 && part < 1e-5 ? "less than 0.001 %" : `${Number((100 * part).toPrecision(2))} %`;
}

export function duration(seconds: number): string {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 36_000) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86_400)} d`;
}

/** A position on the axis of relative time; two units where one is not exact. */
export function elapsed(seconds: number): string {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Number(seconds.toFixed(1))}s`;
  if (minutes < 60) return seconds % 60 ? `${minutes}m${Math.round(seconds % 60)}s` : `${minutes}m`;
  return minutes % 60 ? `${Math.floor(minutes / 60)}h${minutes % 60}m` : `${minutes / 60}h`;
}

export function percent(value: number): string {
  return `${Math.floor(100 * Math.min(1, Math.max(0, value)))} %`;
}

/** Texts of ticks at equal distances, with the digits that make them differ: "0.0012", "1.5e\u22125", "20k". */
export function tickTexts(values: number[], distance: number): string[] {
  const size = Math.max(...values.map(Math.abs));
  if (!(distance > 0) || !(size > 0)) return values.map((value) => number(value));
  const decimals = decimalsFor(distance);
  if (decimals > 3 && size < 1e-3) {
    const digits = (value: number) => Math.floor(Math.log10(Math.abs(value))) - Math.floor(Math.log10(distance) + 1e-9);
    return values.map((value) => (value === 0 ? "0" : exponent(value, Math.max(0, Math.min(6, digits(value))))));
  }
  const scales: [number, string][] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [unit, letter] = scales.find(([limit]) => size >= limit && distance >= limit / (size < 10 * limit ? 2 : 100)) ?? [1, ""];
  const digits = unit === 1 ? decimals : decimalsFor(distance / unit);
  return values.map((value) => (value === 0 ? "0" : (value / unit).toFixed(digits).replace("-", MINUS) + letter));
}

/** 1, 2 or 5 times a power of ten, as short as it goes. */
export function roundTickText(value: number): string {
  return value >= 1e-3 && value < 1e6 ? String(Number(value.toPrecision(1))) : exponent(value, 0);
}

/** Decimals that make multiples of a distance differ, and show 0.25 whole. */
function decimalsFor(distance: number): number {
  const least = Math.max(0, Math.ceil(-Math.log10(distance) - 1e-9));
  const scaled = distance * 10 ** least;
  return Math.abs(scaled - Math.round(scaled)) < 1e-6 * scaled ? least : least + 1;
}

const LONGEST_TEXT = 2_000;

/** Texts of runs may have megabytes; nobody reads them in a table. */
export function shortened(text: string, most = LONGEST_TEXT): string {
  return text.length <= most ? text : `${text.slice(0, most)}\u2026`;
}

export type TableRow = (string | number | null)[];

/** A table of Markdown; the first row is its head. */
export function markdown(rows: TableRow[]): string {
  const cell = (value: string | number | null) => (value === null || Number.isNaN(value) ? "" : String(value).replace(/[\\|<>*_`[\]]/g, "\\$&").replace(/\s*[\r\n]+\s*/g, " "));
  const line = (cells: string[]) => `| ${cells.join(" | ")} |\n`;
  const [head = [], ...body] = rows;
  const isNumber = head.map((_, i) => body.length > 0 && body.every((row) => typeof row[i] !== "string"));
  return line(head.map(cell)) + line(isNumber.map((is) => (is ? "---:" : "---"))) + body.map((row) => line(row.map(cell))).join("");
}

/** Rows of comma-separated values; a text that a spreadsheet would run is quoted as text. */
export function csv(rows: TableRow[]): string {
  const cell = (value: string | number | null) => {
    if (typeof value !== "string") return value === null || Number.isNaN(value) ? "" : String(value);
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",") + "\n").join("");
}

/** A value of a config: numbers as they were written, but for the noise of binary fractions. */
export function setting(value: unknown): string {
  if (typeof value === "number") return String(Number(value.toPrecision(8))).replace("-", MINUS).replace("e+", "e").replace("e-", `e${MINUS}`);
  return valueText(value);
}

export function valueText(value: unknown): string {
  if (typeof value === "number") return number(value);
  return shortened(typeof value === "string" ? value : JSON.stringify(value) ?? "", 120);
}
