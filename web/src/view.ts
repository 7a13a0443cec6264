// What the page shows: the path, and the view's settings, which are all in the URL.
import { computed, signal } from "@preact/signals";
import type { Lines, XAxis } from "./types";

const read = () => ({ path: location.pathname, query: new URLSearchParams(location.search) });
const place = signal(read());
addEventListener("popstate", () => (place.value = read()));

export const path = computed(() => place.value.path);

/** The settings as a URL has them, for links that keep them. */
export const search = computed(() => place.value.query.size ? location.search : "");

/** A part of a path; as it is if it is not encoded well. */
export function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export function navigate(to: string): void {
  history.pushState(null, "", to);
  place.value = read();
  scrollTo(0, 0);
}

export function setting<T>(name: string, decode: (text: string | null) => T, encode: (value: T) => string | null) {
  const value = computed(() => decode(place.value.query.get(name)));
  return {
    get value(): T {
      return value.value;
    },
    set value(next: T) {
      const query = new URLSearchParams(location.search);
      const text = encode(next);
      if (text === null) query.delete(name);
      else query.set(name, text);
      const search = query.toString().replaceAll("%2F", "/").replaceAll("%2C", ",");
      history.replaceState(null, "", location.pathname + (search && `?${search}`));
      place.value = read();
    },
  };
}

export const oneOf = <T extends string>(name: string, choices: readonly T[]) =>
  setting<T>(
    name,
    (text) => choices.find((choice) => choice === text) ?? choices[0]!,
    (value) => (value === choices[0] ? null : value),
  );

/** A set of names; each is escaped, as a name may contain the comma. */
export const names = (name: string) =>
  setting<ReadonlySet<string>>(
    name,
    (text) => new Set(text ? text.split(",").map(unescapeName) : []),
    (value) => (value.size ? [...value].map((each) => each.replace(/[~,]/g, (c) => (c === "~" ? "~0" : "~1"))).join(",") : null),
  );
const unescapeName = (text: string) => text.replace(/~[01]/g, (c) => (c === "~0" ? "~" : ","));

/** A text; none is left out of the URL. */
export const text = (name: string) => setting<string>(name, (given) => given ?? "", (value) => value || null);

export const filter = text("q");

/** Whether the texts have all words of the filter, in any case. */
export function hasFilterWords(...texts: (string | null | undefined)[]): boolean {
  const text = texts.filter(Boolean).join("\n").toLowerCase();
  return filter.value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

export const LINES: readonly Lines[] = ["band", "members", "both"];
export const lines = oneOf<Lines>("lines", LINES);
export const X_AXES: readonly XAxis[] = ["step", "relative", "wall"];
export const xAxis = oneOf<XAxis>("x", X_AXES);
export const SMOOTHINGS = ["auto", "off", "light", "medium", "strong"] as const;
export type Smoothing = (typeof SMOOTHINGS)[number];
export const smoothing = oneOf<Smoothing>("smooth", SMOOTHINGS);
export const openArms = names("open");
export const hiddenArms = names("hide");
/** Charts with a logarithmic axis; "*" are all. */
export const logCharts = names("log");
/** The first and the last step in view. */
export const zoom = setting<[number, number] | null>(
  "zoom",
  (text) => {
    const [from, to] = (text ?? "").split("..").map(Number);
    return text && Number.isFinite(from) && Number.isFinite(to) && from! < to! ? [from!, to!] : null;
  },
  (value) => value && `${value[0]}..${value[1]}`,
);

export function toggled(set: ReadonlySet<string>, name: string): ReadonlySet<string> {
  const next = new Set(set);
  if (!next.delete(name)) next.add(name);
  return next;
}

export function next<T>(choices: readonly T[], value: T): T {
  return choices[(choices.indexOf(value) + 1) % choices.length]!;
}

/** Whether charts are in sections by the beginnings of their names; "auto": as the page has it. */
export const GROUPINGS = ["auto", "yes", "no"] as const;
export const grouping = oneOf("group", GROUPINGS);

/** The chart under the pointer or the focus, and the steps that it shows. */
export const activeChart = signal<{ metric: string; steps: () => [number, number] | null } | null>(null);

/** Show a part of the steps, by the chart in hand: `scale` times as many, moved by a part of them. */
export function zoomBy(scale: number, shift: number): void {
  const steps = activeChart.value?.steps() ?? zoom.value;
  if (!steps) return;
  const size = steps[1] - steps[0];
  const from = Math.max(0, Math.round(steps[0] + size * (shift + (1 - scale) / 2)));
  const to = Math.round(from + size * scale);
  if (to > from) zoom.value = [from, to];
}

/** Of the chart in hand, else of all. */
export function toggleLog(): void {
  logCharts.value = toggled(logCharts.value, activeChart.value?.metric ?? "*");
}

export function cycleX(): void {
  xAxis.value = next(X_AXES, xAxis.value);
}

/** While paused, what arrives is not shown. */
export const paused = signal(false);

const THEME_KEY = "evsys-bus-theme";
const darkPreferred = matchMedia("(prefers-color-scheme: dark)");
const chosen = signal(localStorage.getItem(THEME_KEY));
const preferred = signal(darkPreferred.matches);
darkPreferred.addEventListener("change", () => (preferred.value = darkPreferred.matches));
/** A preference of the reader, not of a view: it is not in the URL. */
export const theme = computed(() => chosen.value ?? (preferred.value ? "dark" : "light"));

export function toggleTheme(): void {
  chosen.value = theme.value === "dark" ? "light" : "dark";
  localStorage.setItem(THEME_KEY, chosen.value);
}

/** The arm under the pointer, in a table or a legend. */
export const highlightedArm = signal<string | null>(null);
