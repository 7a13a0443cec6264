// Requests to the server, and its container of columns.
import { signal } from "@preact/signals";
import type { Chart, Line, Lines, XAxis } from "./types";

const CLOCK_TOLERANCE_SECONDS = 5;
const TOKEN_KEY = "evsys-bus-token";

/** The token comes in the fragment, which no request carries; local storage gives it to other tabs. */
function takeToken(): string {
  const given = /^#token=([\w.~-]+)$/.exec(location.hash);
  if (given) {
    history.replaceState(null, "", location.pathname + location.search);
    localStorage.setItem(TOKEN_KEY, given[1]!);
    return given[1]!;
  }
  return localStorage.getItem(TOKEN_KEY) ?? "";
}

export const token = takeToken();

/** Seconds that the server's clock is ahead of ours. */
export const clockAhead = signal(0);

export class RequestError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly fix: string,
  ) {
    super(message);
  }
}

async function request(path: string, body: unknown, abort?: AbortSignal): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: { Authorization: `Bearer ${token}`, ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: abort,
      cache: "no-store",
    });
  } catch (error) {
    if (abort?.aborted) throw error;
    throw new RequestError(0, "The dashboard does not answer.", "Is it still running? The page connects again by itself.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = `The dashboard answered ${response.status}.`;
  let fix = "";
  try {
    const { error } = JSON.parse(text);
    message = String(error.message ?? message);
    fix = String(error.fix ?? "");
  } catch {
    // A proxy's answer is not ours to show.
  }
  throw new RequestError(response.status, message, fix);
}

export async function getJson<T extends { now?: number }>(path: string, abort?: AbortSignal): Promise<T> {
  const answer: T = await (await request(path, undefined, abort)).json();
  const ahead = (answer.now ?? 0) - Date.now() / 1000;
  if (answer.now) clockAhead.value = Math.abs(ahead) > CLOCK_TOLERANCE_SECONDS ? ahead : 0;
  return answer;
}

/** Something that only a request with the token gets, such as a picture. */
export async function getBlob(path: string, abort: AbortSignal): Promise<Blob> {
  return (await request(path, undefined, abort)).blob();
}

export interface Columns {
  header: any; // eslint-disable-line -- each reader knows the shape of its own
  data: Float64Array;
}

/** "EVC1", the header's length, the header in JSON, padded to a multiple of 8; then columns of float64. */
export function decodeColumns(buffer: ArrayBuffer): Columns {
  const view = new DataView(buffer);
  if (buffer.byteLength < 8 || view.getUint32(0) !== 0x45564331) throw new Error("not a container of columns");
  const length = view.getUint32(4, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const start = 8 + length;
  return { header, data: new Float64Array(buffer, start, (buffer.byteLength - start) >> 3) };
}

export function chartOf(header: any, data: Float64Array): Chart {
  const column = (place: [number, number] | null | undefined) =>
    place ? data.subarray(place[0], place[0] + place[1]) : null;
  const empty = new Float64Array(0);
  return {
    metric: header.metric,
    width: header.width,
    total: header.total,
    lines: header.lines.map(
      (line: any): Line => ({
        kind: line.kind,
        arm: line.arm ?? "",
        run: line.run ?? null,
        seed: line.seed ?? null,
        n: line.n ?? 1,
        points: line.points ?? 0,
        bad: line.bad ?? 0,
        x: column(line.x) ?? empty,
        mean: column(line.mean) ?? empty,
        min: column(line.min),
        max: column(line.max),
        sd: column(line.sd),
        badAt: column(line.badAt) ?? empty,
        steps: column(line.steps),
      }),
    ),
  };
}

export interface ChartQuery {
  metric: string;
  /** Ids of the runs to draw; null for all. */
  runs: string[] | null;
  lines: Lines;
  from: number | null;
  to: number | null;
  buckets: number;
  x: XAxis;
}

interface Waiting {
  query: ChartQuery;
  resolve: (answer: { chart: Chart; frame: number | null }) => void;
  reject: (error: unknown) => void;
}

const waiting = new Map<string, Waiting[]>();

/** Charts that are asked for at the same time travel in one request. */
export function fetchChart(experiment: string, query: ChartQuery): Promise<{ chart: Chart; frame: number | null }> {
  return new Promise((resolve, reject) => {
    let all = waiting.get(experiment);
    if (!all) {
      all = [];
      waiting.set(experiment, all);
      setTimeout(() => void fetchWaiting(experiment));
    }
    all.push({ query, resolve, reject });
  });
}

const CHARTS_PER_REQUEST = 32;

async function fetchWaiting(experiment: string): Promise<void> {
  const all = waiting.get(experiment) ?? [];
  waiting.delete(experiment);
  for (let start = 0; start < all.length; start += CHARTS_PER_REQUEST) {
    const some = all.slice(start, start + CHARTS_PER_REQUEST);
    try {
      const charts = some.map(({ query }) => query);
      const response = await request("/api/charts", { experiment, charts });
      const { header, data } = decodeColumns(await response.arrayBuffer());
      some.forEach(({ resolve }, i) => resolve({ chart: chartOf(header.charts[i], data), frame: header.frame ?? null }));
    } catch (error) {
      for (const { reject } of some) reject(error);
    }
  }
}

export async function poll(topics: unknown, abort: AbortSignal): Promise<ArrayBuffer[]> {
  const response = await request(`/api/live?topics=${encodeURIComponent(JSON.stringify(topics))}`, undefined, abort);
  if (response.status === 204) return [];
  const frames: string[] = await response.json();
  return frames.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}
