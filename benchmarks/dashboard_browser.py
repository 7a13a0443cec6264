"""The dashboard and its peers in headless Chromium: when something is on the screen, and what was fetched for it.

A recorder in the page notes each drawing of a chart at the frame after it, when it is visible, and for live charts the
last step of each line. Times are milliseconds of the page's own clock, from the start of its navigation.
"""

import contextlib
import http.server
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeAlias
from urllib.parse import urlsplit

TIMEOUT: Final = 60.0
WIDTH, HEIGHT = 1_440, 900

_RECORDER: Final = """
(() => {
  const bench = (window.bench = { drawn: [], live: [], reached: {}, key: 0, input: 0, answered: 0 });
  const waiting = new Map();
  const strokes = new Map();
  const stroke = CanvasRenderingContext2D.prototype.stroke;
  CanvasRenderingContext2D.prototype.stroke = function (...args) {
    stroke.apply(this, args);
    const metric = this.canvas.closest?.(".card")?.getAttribute("aria-label");
    if (!metric) return;
    const isWaiting = strokes.has(metric);
    strokes.set(metric, performance.now());
    if (isWaiting) return;
    const [lines, arrived] = waiting.get(metric) ?? [];
    waiting.delete(metric);
    // After the tasks of the next frame, this one's drawing has been committed.
    requestAnimationFrame(() => setTimeout(() => {
      bench.drawn.push([metric, performance.now(), strokes.get(metric)]);
      strokes.delete(metric);
      if (!bench.isLive || !lines) return;
      bench.live.push([metric, Date.now() / 1000, arrived, lines]);
      for (const [line, step] of Object.entries(lines)) bench.reached[`${metric}/${line}`] = step;
    }));
  };
  function note({ metric, lines }, data) {
    const [last] = waiting.get(metric) ?? [{}];
    for (const { arm, seed, x } of lines) if (x[1]) last[`${arm}/${seed}`] = data[x[0] + x[1] - 1];
    waiting.set(metric, [last, Date.now() / 1000]);
  }
  function decode(buffer) {
    const length = new DataView(buffer).getUint32(4, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    return [header, new Float64Array(buffer, 8 + length, (buffer.byteLength - 8 - length) >> 3)];
  }
  window.WebSocket = class extends WebSocket {
    constructor(...args) {
      super(...args);
      this.addEventListener("message", ({ data }) => {
        if (!bench.isLive) return;
        const [header, columns] = decode(data);
        if (header.chart) note(header.chart, columns);
      });
    }
  };
  const fetched = window.fetch;
  window.fetch = async (...args) => {
    const response = await fetched(...args);
    if (args[0] === "/api/charts") bench.answered = performance.now();
    if (bench.isLive && args[0] === "/api/charts") {
      const [header, columns] = decode(await response.clone().arrayBuffer());
      for (const chart of header.charts) note(chart, columns);
    }
    return response;
  };
  addEventListener("keydown", () => (bench.key = performance.now()), true);
  addEventListener("input", () => (bench.input = performance.now()), true);
  const look = () => {
    if (bench.appeared === undefined && (CONDITION)) bench.appeared = performance.now();
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})();
"""
CHART: Final = "bench.drawn.length > 0"
TENSORBOARD_CHART: Final = (
    "document.querySelector('scalar-card line-chart canvas, scalar-card line-chart svg path')"
    " && !document.querySelector('scalar-card mat-spinner')"
)
_PAINT: Final = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


class Load(NamedTuple):
    """One loading of a page; milliseconds."""

    paint: float
    """To the first text or picture."""
    chart: float
    """To the first chart; of a blank page, to its first frame."""
    requests: tuple[tuple[str, int], ...]
    """Hosts and bytes."""


class Browser:
    """One process of Chromium, started by a context manager.

    Args:
        condition: An expression that is true when the first chart is there.
    """

    def __init__(self, playwright: Any, executable: str, condition: str = CHART) -> None:
        # Its sandbox refuses to run as root, as in a container.
        self._browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        self._context = self._browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
        self._context.add_init_script(_RECORDER.replace("CONDITION", condition))
        self.page = self._context.new_page()
        self._requests: list[tuple[str, int]] = []
        self.page.on("requestfinished", self._note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._browser.close()

    def _note(self, request: Any) -> None:
        with contextlib.suppress(Exception):  # of a page that is left
            sizes = request.sizes()
            self._requests.append(
                (urlsplit(request.url).netloc, sizes["responseBodySize"] + sizes["responseHeadersSize"])
            )

    def load(self, url: str, *, settle_seconds: float = 0.0) -> Load:
        """Load a page, and wait for its first chart."""
        self.page.goto("about:blank")
        self._requests.clear()
        self.page.goto(url, wait_until="commit")
        paint = self.until(_PAINT)
        chart = self.until("bench.appeared")
        self.page.wait_for_timeout(1_000 * settle_seconds)
        return Load(paint, chart, tuple(self._requests))

    def until(self, expression: str, seconds: float = TIMEOUT) -> Any:
        """Wait for an expression to be true, and return its value."""
        # Playwright's own way needs `eval`, which the page's policy refuses.
        end = time.monotonic() + seconds
        while not (value := self.page.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression}; the page: {self.page.inner_text('body')[:500]}")
            self.page.wait_for_timeout(20)
        return value

    def drawn_after_key(self, key: str, charts: int) -> float:
        """Press a key; return the milliseconds until the last of so many charts is drawn anew."""
        self.page.evaluate("void (bench.drawn.length = 0)")
        self.page.keyboard.press(key)
        # The first drawing of each chart since the server's answer.
        times = "[...new Map(bench.drawn.filter(([, , stroke]) => stroke > bench.answered).reverse()).values()]"
        self.until(f"bench.answered > bench.key && {times}.length >= {charts}")
        return self.page.evaluate(f"Math.max(...{times}) - bench.key")


OpenBrowser: TypeAlias = Callable[..., AbstractContextManager[Browser]]
"""Starts Chromium; its argument is `Browser`'s condition."""


@contextlib.contextmanager
def chromium() -> Iterator[tuple[Any, str]]:
    """Yield Playwright and the path of Chromium. Raises ImportError if one of them is not there."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        raise ImportError("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright, executable


@contextlib.contextmanager
def blank_page() -> Iterator[str]:
    """Serve a page with one word; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = b"<!doctype html><title>blank</title>blank" if self.path == "/" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            del args

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/"
    finally:
        listening.shutdown()
        listening.server_close()


class Relay:
    """Passes connections on to a server and counts their bytes, in both directions and with all overheads of HTTP."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._target = (target.hostname or "", target.port or 80)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.bytes = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def write_tensorboard_run(folder: Path, steps: int, metrics: int, runs: int) -> None:
    """Write the event files of an experiment: those of one run, copied. Raises ImportError without tensorboardX."""
    import random

    from tensorboardX import SummaryWriter
    from tensorboardX.proto.summary_pb2 import Summary

    walk = [0.0] * metrics
    rng = random.Random(1)  # noqa: S311 # numbers to draw
    first = folder / "run-00"
    with SummaryWriter(str(first)) as writer:
        for step in range(steps):
            walk = [value + rng.gauss(0, 0.01) for value in walk]
            values = [Summary.Value(tag=f"train/metric_{i}", simple_value=value) for i, value in enumerate(walk)]
            writer.file_writer.add_summary(Summary(value=values), step)
    for run in range(1, runs):
        shutil.copytree(first, folder / f"run-{run:02}")
