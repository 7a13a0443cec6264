// The frame of all pages: bar, connection, keys, help; and which page a path shows.
import { useEffect, useErrorBoundary, useRef } from "preact/hooks";
import { effect, signal } from "@preact/signals";
import { canvasColours } from "./colours";
import { ExperimentPage } from "./experiment";
import { furtherPage } from "./further";
import { HomePage } from "./home";
import { connection } from "./live";
import { Failure, Link } from "./parts";
import * as view from "./view";

effect(() => void canvasColours.value); // sets the theme, before the first page is drawn

const isHelpOpen = signal(false);

type Key = [key: string, what: string, run: () => void];

const KEYS: Key[] = [
  ["/", "filter", () => document.querySelector<HTMLInputElement>("input[type=search]")?.focus()],
  [".", "pause: what arrives is not shown", () => (view.paused.value = !view.paused.value)],
  ["d", "light or dark", view.toggleTheme],
  ["?", "this list", () => (isHelpOpen.value = !isHelpOpen.value)],
];

/** On pages that have charts. */
const CHART_KEYS: Key[] = [
  ["m", "lines: band, members, both", () => (view.lines.value = view.next(view.LINES, view.lines.value))],
  ["g", "group charts by the beginnings of their names", () => (view.grouping.value = view.next(view.GROUPINGS, view.grouping.value))],
  ["l", "logarithmic axis: of the chart under the pointer or in focus, else of all", view.toggleLog],
  ["s", "smoothing: auto, off, light, medium, strong", () => (view.smoothing.value = view.next(view.SMOOTHINGS, view.smoothing.value))],
  ["x", "x axis: step, relative time, wall clock", view.cycleX],
  ["+", "zoom in; a drag over a chart too", () => view.zoomBy(0.5, 0)],
  ["-", "zoom out", () => view.zoomBy(2, 0)],
  ["[", "earlier steps", () => view.zoomBy(1, -0.5)],
  ["]", "later steps", () => view.zoomBy(1, 0.5)],
  ["0", "whole range again, as a double click on a chart", () => (view.zoom.value = null)],
];

const haveCharts = () => document.querySelector(".charts") !== null;

function onKey(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (target.matches("input, textarea, select")) {
    if (event.key === "Escape") target.blur();
    return;
  }
  const isCovered = document.querySelector("dialog[open]") !== null; // what the key would change cannot be seen
  const found = [...KEYS, ...(haveCharts() ? CHART_KEYS : [])].find(([key]) => key === event.key);
  if (!found || (isCovered && !["?", "d"].includes(event.key))) return;
  event.preventDefault();
  found[2]();
}

const CONNECTIONS = {
  connecting: ["\u25cc", "connecting"],
  live: ["\u25cf", "live"],
  polling: ["\u25cf", "live, by polling"],
  lost: ["\u25cb", "connection lost, trying again"],
} as const;

function Connection() {
  const state = view.paused.value ? "paused" : connection.value;
  const [sign, text] = view.paused.value ? ["\u2016", "paused"] : CONNECTIONS[connection.value];
  return (
    <button class={`connection ${state}`} aria-live="polite" title="pause or continue ( . )" onClick={() => (view.paused.value = !view.paused.value)}>
      <span aria-hidden="true">{sign}</span> {text}
    </button>
  );
}

function Help() {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(
    () =>
      effect(() => {
        if (isHelpOpen.value) dialog.current?.showModal();
        else dialog.current?.close();
      }),
    [],
  );
  return (
    <dialog ref={dialog} aria-label="Keys" onClose={() => (isHelpOpen.value = false)} onClick={() => (isHelpOpen.value = false)}>
      <dl>
        {[...KEYS, ...(isHelpOpen.value && haveCharts() ? CHART_KEYS : [])].map(([key, what]) => (
          <div key={key}>
            <dt>
              <kbd>{key}</kbd>
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
    </dialog>
  );
}

const METRICS_PAGE = /\/metrics\/?$/;

function Content({ path }: { path: string }) {
  const [error] = useErrorBoundary();
  const id = /^\/e\/([^/]+)/.exec(path)?.[1];
  if (error) return <Failure error={`The page failed: ${error}. Load it again.`} />;
  const further = furtherPage(path);
  if (further) return further;
  return id ? <ExperimentPage id={view.decoded(id)} onlyMetrics={METRICS_PAGE.test(path)} /> : <HomePage />;
}

export function Page() {
  useEffect(() => {
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  return (
    <>
      <header class="top">
        <Link to="/" class="brand">
          evsys-bus
        </Link>
        <Link to="/health">health</Link>
        <Connection />
        <button title="light or dark ( d )" aria-label="light or dark" onClick={view.toggleTheme}>
          {"\u25d0"}
        </button>
        <button title="keys ( ? )" aria-label="keys" onClick={() => (isHelpOpen.value = true)}>
          ?
        </button>
      </header>
      <Content key={view.path.value.replace(METRICS_PAGE, "")} path={view.path.value} />
      <Help />
    </>
  );
}
