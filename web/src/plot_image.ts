// A chart as a file, with its title and a legend, which on the page stand beside it.
import type uPlot from "uplot";

export interface Picture {
  title: string;
  plot: uPlot;
  curves: {
    name: string;
    colour: string;
    dash: number[];
    x: Float64Array;
    y: Float64Array;
    raw: Float64Array | null;
    low: Float64Array | null;
    high: Float64Array | null;
    badAt: Float64Array;
    bandOpacity: number;
  }[];
  text: string;
  grid: string;
  card: string;
  font: string;
}

const TITLE_HEIGHT = 24;
const ROW_HEIGHT = 18;
const SIDE = 12;

interface Entry {
  name: string;
  colour: string;
  dash: number[];
  left: number;
  top: number;
}

/** Where each name of the legend stands, below the chart; and the height of all. */
function legendOf({ curves, plot }: Picture): { entries: Entry[]; height: number } {
  const names = new Map(curves.map(({ name, colour, dash }) => [name, { colour, dash }]));
  const entries: Entry[] = [];
  let [left, top] = [SIDE, TITLE_HEIGHT + plot.height + 4];
  for (const [name, { colour, dash }] of names) {
    const short = name.length > 60 ? `${name.slice(0, 60)}\u2026` : name;
    const width = 40 + 6.4 * short.length;
    if (left > SIDE && left + width > plot.width) [left, top] = [SIDE, top + ROW_HEIGHT];
    entries.push({ name: short, colour, dash, left, top });
    left += width;
  }
  return { entries, height: top + ROW_HEIGHT + 4 };
}

/** What is drawn on the page, at its resolution. */
export function pngOf(picture: Picture): Promise<Blob | null> {
  const { plot, title, card, text, font } = picture;
  const { entries, height } = legendOf(picture);
  const drawn = plot.ctx.canvas;
  const scale = drawn.width / plot.width;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [drawn.width, Math.ceil(height * scale)];
  const context = canvas.getContext("2d")!;
  context.fillStyle = card;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(drawn, 0, Math.round(TITLE_HEIGHT * scale));
  context.scale(scale, scale);
  context.fillStyle = text;
  context.font = `600 12px ${font}`;
  context.fillText(title, SIDE, 16, plot.width - 2 * SIDE);
  context.font = `11px ${font}`;
  context.lineWidth = 2;
  for (const { name, colour, dash, left, top } of entries) {
    context.strokeStyle = colour;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(left, top + 8);
    context.lineTo(left + 18, top + 8);
    context.stroke();
    context.fillText(name, left + 24, top + 12);
  }
  return new Promise((resolve) => canvas.toBlob(resolve));
}

const escaped = (text: string) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\x00-\x08\x0b-\x1f]/g, " ");

/** The same as lines and texts, which can be enlarged and changed. */
export function svgOf(picture: Picture): Blob {
  const { plot, title, curves, text, grid, card, font } = picture;
  const { entries, height } = legendOf(picture);
  const ratio = plot.ctx.canvas.width / plot.width;
  const box = { left: plot.bbox.left / ratio, top: TITLE_HEIGHT + plot.bbox.top / ratio, width: plot.bbox.width / ratio, height: plot.bbox.height / ratio };
  const at = (value: number, scale: "x" | "y") => Number((plot.valToPos(value, scale) + (scale === "x" ? box.left : box.top)).toFixed(1));
  const parts = [
    `<rect width="${plot.width}" height="${height}" fill="${card}"/>`,
    `<text x="${SIDE}" y="16" font-size="12" font-weight="600" fill="${text}">${escaped(title)}</text>`,
  ];
  for (const [i, axis] of plot.axes.entries()) {
    // What uPlot has computed for its own drawing; its types do not have it.
    const { _splits: splits, _values: labels } = axis as unknown as { _splits: (number | null)[] | null; _values: (string | null)[] | null };
    (splits ?? []).forEach((value, k) => {
      const label = escaped(labels?.[k] ?? "");
      if (value === null) return;
      const place = at(value, i === 0 ? "x" : "y");
      if (i === 0) {
        if (place < box.left - 1 || place > box.left + box.width + 1) return;
        parts.push(`<path d="M${place} ${box.top}v${box.height}" stroke="${grid}"/><text x="${place}" y="${box.top + box.height + 16}" text-anchor="middle" fill="${text}">${label}</text>`);
      } else {
        if (place < box.top - 1 || place > box.top + box.height + 1) return;
        parts.push(`<path d="M${box.left} ${place}h${box.width}" stroke="${grid}"/><text x="${box.left - 6}" y="${place + 4}" text-anchor="end" fill="${text}">${label}</text>`);
      }
    });
  }
  parts.push(`<clipPath id="box"><rect x="${box.left}" y="${box.top}" width="${box.width}" height="${box.height}"/></clipPath><g clip-path="url(#box)">`);
  for (const { x, low, high, colour, bandOpacity } of curves) {
    if (!low || !high) continue;
    for (const [start, end] of stretches(x.length, (k) => Number.isFinite(low[k]!) && Number.isFinite(high[k]!))) {
      const upper = range(start, end).map((k) => `${at(x[k]!, "x")} ${at(high[k]!, "y")}`);
      const lower = range(start, end).reverse().map((k) => `${at(x[k]!, "x")} ${at(low[k]!, "y")}`);
      parts.push(`<path d="M${[...upper, ...lower].join("L")}Z" fill="${colour}" fill-opacity="${bandOpacity}"/>`);
    }
  }
  for (const { x, y, raw, colour, dash, badAt } of curves) {
    const line = (values: Float64Array, style: string) => {
      for (const [start, end] of stretches(x.length, (k) => Number.isFinite(values[k]!))) {
        const points = range(start, end).map((k) => `${at(x[k]!, "x")} ${at(values[k]!, "y")}`);
        if (points.length === 1) parts.push(`<circle cx="${at(x[start]!, "x")}" cy="${at(values[start]!, "y")}" r="2.5" fill="${colour}"/>`);
        else parts.push(`<path d="M${points.join("L")}" fill="none" stroke="${colour}" ${style}/>`);
      }
    };
    if (raw) line(raw, 'stroke-width="1" stroke-opacity="0.28"');
    line(y, `stroke-width="1.6"${dash.length ? ` stroke-dasharray="${dash.join(" ")}"` : ""}`);
    for (const bad of badAt) parts.push(`<path d="M${at(bad, "x")} ${box.top + box.height - 8}l-3.5 8h7Z" fill="${colour}"/>`);
  }
  parts.push("</g>");
  for (const { name, colour, dash, left, top } of entries) {
    parts.push(`<path d="M${left} ${top + 8}h18" stroke="${colour}" stroke-width="2" stroke-dasharray="${dash.join(" ")}"/><text x="${left + 24}" y="${top + 12}" fill="${text}">${escaped(name)}</text>`);
  }
  const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${plot.width}" height="${height}" viewBox="0 0 ${plot.width} ${height}" font-family="${escaped(font)}" font-size="11">`;
  return new Blob([head, parts.join("\n"), "</svg>\n"], { type: "image/svg+xml" });
}

const range = (start: number, end: number) => Array.from({ length: end - start }, (_, i) => start + i);

/** The ranges of indices without a gap. */
function stretches(length: number, isThere: (index: number) => boolean): [number, number][] {
  const found: [number, number][] = [];
  let start = -1;
  for (let i = 0; i <= length; i++) {
    const is = i < length && isThere(i);
    if (is && start < 0) start = i;
    if (!is && start >= 0) {
      found.push([start, i]);
      start = -1;
    }
  }
  return found;
}
