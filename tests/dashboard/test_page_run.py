"""The pages of a run that was recorded with all that a run may log, in a browser."""

import base64
import hashlib
import json
import time
import urllib.error
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import evsys_bus
from evsys_adapters.dashboard import contents, run_events
from evsys_adapters.dashboard.journals import import_journal
from evsys_bus import build_callbacks
from support.browser import Tab, chromium
from support.dashboard_pages import PageServer
from support.dashboard_stores import open_store

STEPS = 60
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"
HAS_CHART = "document.querySelectorAll('.card canvas').length >= 1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def record(folder: Path) -> None:
    """Run a training that logs numbers, a text, histograms, tables, a page, a file and alerts."""
    callbacks = build_callbacks([{"kind": "local_logger", "params": {"print_every": 0}}])
    (folder / "map.png").write_bytes(PICTURE)
    (folder / "weights.bin").write_bytes(b"w" * 5_000)
    with evsys_bus.run(folder / "runs" / "digits", callbacks=callbacks, config={"lr": 0.1}, output=False) as run:
        for step in run.steps(STEPS):
            run.log({"loss": 1 / (step + 1), "note": f"{MARKUP} {step}"}, step=step)
            if step % 10 == 0:
                run.histogram("weights", [0.1 * step + k / 7 for k in range(30)], bins=6)
                run.image("map", folder / "map.png", caption=f"a map {MARKUP}")
                run.table("samples", [[f"{step} + 2", MARKUP]], columns=["question", "answer"])
        run.text("notes", "It learns.")
        run.html("report", f"<h1>{MARKUP}</h1>")
        run.artifact("weights", folder / "weights.bin")
        run.alert("loss is low", "stop early?", level="info")
        run.alert("loss is odd", MARKUP, level="error")
        run.summary["best"] = 0.5


@pytest.fixture(scope="module")
def server(browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    del browser  # without one there is nothing to show
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    with closing(open_store(folder)) as store:
        import_journal(store, folder / "runs" / "digits")
    with PageServer(folder, tmp_path_factory.mktemp("server") / "copy") as server:
        yield server


@pytest.fixture(params=["light", "dark"])
def tab(browser: Any, request: pytest.FixtureRequest) -> Iterator[Tab]:
    tab = Tab(browser)
    tab.page.emulate_media(color_scheme=request.param)
    yield tab
    assert tab.complaints == []
    tab.close()


def run_path(server: PageServer) -> str:
    experiment = server.path_of("runs").rpartition("/")[2]
    [row] = server.request(f"/api/experiments/{experiment}/runs")["rows"]
    return f"/r/{row['id']}"


# -- events


def events(server: PageServer, query: str = "") -> Any:
    return server.request(f"/api{run_path(server).replace('/r/', '/runs/')}/events?{query}")


def pages(server: PageServer, query: str) -> Iterator[Any]:
    """The answers from the newest events to the oldest ones."""
    before = ""
    while True:
        page = events(server, f"{query}&before={before}")
        yield page
        if page["next"] is None:
            return
        before = quote(json.dumps(page["next"]))


def test_the_events_of_a_run_are_read_from_its_journal_page_by_page_each_once(server: PageServer) -> None:
    found = [row for page in pages(server, "") for row in page["rows"]]
    numbers = [row["sequence"] for row in found]
    assert numbers == [*range(len(found), 0, -1)]
    assert (found[0]["type"], found[-1]["type"]) == ("run_end", "run_start")
    assert sum(row["type"] == "step_end" for row in found) == STEPS
    first = next(pages(server, ""))
    assert (first["source"], Path(first["journal"]).name, len(first["rows"])) == ("journal", "journal", 100)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("type:step_end", STEPS),
        ("type:step_end step>=58", 2),
        ("type:step_end loss>0.3", 3),
        ("type:run.alert level:error", 1),
        ("/^run\\.alert$/ -low", 1),
        ('"It learns"', 0),
        ("type:no_such", 0),
    ],
)
def test_events_are_found_by_the_filter_of_the_runs(server: PageServer, text: str, count: int) -> None:
    found = [row for page in pages(server, f"q={quote(text)}") for row in page["rows"]]
    assert len(found) == count


def test_a_filter_that_cannot_be_parsed_says_why_and_hides_no_event(server: PageServer) -> None:
    page = events(server, "q=step>much")
    assert "compares with no number" in page["problem"]
    assert len(page["rows"]) == 100


def test_after_the_newest_position_come_the_events_that_were_recorded_since(tmp_path: Path, browser: object) -> None:
    del browser
    everything = run_events.parse_selection("")
    with pytest.raises(ZeroDivisionError), evsys_bus.run(tmp_path / "live", output=False, environment=False) as run:
        run.log({"loss": 1.0}, step=0)
        raise ZeroDivisionError
    source = run_events.journal_source("live", str(tmp_path / "live"))
    assert source is not None
    first = run_events.read_before(source, {}, everything)
    with evsys_bus.run(tmp_path / "live", output=False, environment=False) as run:
        run.log({"loss": 0.5}, step=1)
    since = run_events.read_since(source, first["newest"], everything)
    assert {row["type"] for row in since["rows"]} >= {"run_start", "step_end", "run_end"}
    ids = [(row["stream"], row["sequence"]) for page in (since, first) for row in page["rows"]]
    again = run_events.read_before(source, {}, everything)
    assert ids == [(row["stream"], row["sequence"]) for row in again["rows"]]
    assert run_events.read_since(source, again["newest"], everything)["rows"] == []


@pytest.mark.parametrize("query", ["before=x", "before=%5B1%5D", 'after={"a":"b"}', "before=" + "9" * 30])
def test_a_position_that_is_none_gets_a_clear_error(server: PageServer, query: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as failure:
        events(server, quote(query, safe="=%&"))
    with failure.value as answer:
        assert answer.code == 400


def test_a_position_names_no_path(server: PageServer) -> None:
    page = events(server, "before=" + quote(json.dumps({"../../x": 3, "r0/../..": 1})))
    assert [row["type"] for row in page["rows"]][:1] == ["run_end"]


def test_what_the_database_keeps_are_the_events_of_a_run_whose_journal_is_elsewhere(tmp_path: Path) -> None:
    record(tmp_path)
    with closing(open_store(tmp_path)) as store:
        import_journal(store, tmp_path / "runs" / "digits")
        (run,) = store.catalogue.records.runs(store.catalogue.records.experiments()[0].id)
        assert run_events.journal_source(run.key, "/no/such/folder") is None
        assert run_events.journal_source(run.key, "no/absolute") is None
        assert run_events.journal_source(run.key, "/\0") is None
        source = run_events.stored_source(store, run)
        found = run_events.read_before(source, {}, run_events.parse_selection("-type:content"))
    assert [row["type"] for row in found["rows"]] == ["run_end", "alert", "alert", "run_start"]
    assert found["next"] is None
    assert found["rows"][1]["fields"] == {"title": "loss is odd", "text": MARKUP, "level": "error"}


def test_an_event_opens_to_its_fields_as_text_and_older_ones_are_loaded(tab: Tab, server: PageServer) -> None:
    rows = "document.querySelectorAll('.events tbody tr:not(.fields)').length"
    tab.open(f"{server.url}{run_path(server)}/events", f"{rows} == 100")
    assert "all events, from the journal /" in tab.text(".head")
    tab.page.get_by_role("button", name="older events").click()
    tab.until(f"{rows} > 100")
    tab.until("document.querySelector('.more')?.innerText == 'no older events'")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("type:run.alert level:error")
    tab.until(f"{rows} == 1")
    tab.page.locator(".events .open").focus()
    tab.page.keyboard.press("Enter")
    assert json.loads(tab.text(".events pre")) == {"title": "loss is odd", "text": MARKUP, "level": "error"}
    tab.page.reload()
    tab.until("document.querySelectorAll('.events pre').length == 1")
    assert tab.page.evaluate("document.images.length") == 0
    assert not tab.is_wider_than_the_screen()


def continue_run(folder: Path, step: int) -> None:
    """Do one more step of a run that has failed so far."""
    with pytest.raises(ZeroDivisionError), evsys_bus.run(folder, output=False, environment=False) as run:
        run.log({"loss": 1.0}, step=step)
        raise ZeroDivisionError


def test_events_appear_as_they_come_and_not_while_paused(tab: Tab, server: PageServer, tmp_path: Path) -> None:
    def go_on(step: int) -> None:
        continue_run(tmp_path / "live", step)
        server.request("/api/import", json.dumps({"journal": str(tmp_path / "live" / "journal")}).encode())

    def steps() -> str:
        return "[...document.querySelectorAll('.events td:nth-child(3)')].map((each) => each.innerText).join(' ')"

    go_on(0)
    found: list[Any] = []
    end = time.monotonic() + 10
    while not found and time.monotonic() < end:
        rows = server.request("/api/home")["experiments"]
        ids = [each["id"] for each in rows if each["name"] == tmp_path.name]
        found = [run["id"] for id_ in ids for run in server.request(f"/api/experiments/{id_}/runs")["rows"]]
    tab.open(f"{server.url}/r/{found[0]}/events?q=type:step_end", f"{steps()} == '0'")
    tab.until("document.querySelector('.connection').innerText.includes('live')")
    go_on(1)
    tab.until(f"{steps()} == '1 0'")
    tab.page.get_by_role("button", name="pause", exact=True).click()
    go_on(2)
    time.sleep(1.5)
    assert tab.page.evaluate(steps()) == "1 0"
    tab.page.keyboard.press(".")
    tab.until(f"{steps()} == '2 1 0'")


# -- what it logs beside numbers


def test_the_page_of_a_run_shows_its_text_table_histogram_and_picture_and_no_markup(
    tab: Tab, server: PageServer
) -> None:
    tab.open(f"{server.url}{run_path(server)}", "document.querySelectorAll('.content').length == 4")
    assert tab.text(".content.text pre") == "It learns."
    assert tab.text(".content.histogram figcaption") == "30 values from 5 to 9.143, at most 5 in a bin"
    assert tab.text(".content.table tbody td:last-child") == MARKUP
    tab.page.locator(".content.image").scroll_into_view_if_needed()
    tab.until("document.querySelector('.content.image img')?.naturalWidth === 1")
    assert tab.text(".content.image .hint") == f"a map {MARKUP}"
    assert tab.page.evaluate("document.images.length") == 1
    assert tab.page.evaluate("document.querySelectorAll('.content b').length") == 0
    assert not tab.is_wider_than_the_screen()


def test_a_picture_is_read_only_if_its_bytes_are_those_it_is_named_after(tmp_path: Path) -> None:
    digest = hashlib.sha256(PICTURE).hexdigest()
    (tmp_path / "media").mkdir()
    own = tmp_path / "media" / f"{digest}.png"
    own.write_bytes(PICTURE)
    item = {"kind": "image", "name": "map", "path": f"media/{digest}.png", "file": str(own)}
    assert contents.read_picture([item], digest) == ("image/png", PICTURE)
    assert contents.read_picture([item], "0" * 64) is None
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURE + b"secret")
    assert contents.read_picture([item | {"file": str(secret)}], digest) is None
    assert contents.read_picture([item | {"path": "../secret.png", "file": str(secret)}], digest) is None
    own.write_bytes(b"<svg onload=alert(1)>")
    page = hashlib.sha256(own.read_bytes()).hexdigest()
    assert contents.read_picture([item | {"path": f"media/{page}.png"}], page) is None, "no picture"
    own.unlink()
    assert contents.read_picture([item], digest) is None


def test_a_picture_that_is_not_there_is_a_clear_error(server: PageServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as failure:
        server.request(f"/api{run_path(server).replace('/r/', '/runs/')}/media/{'0' * 64}")
    with failure.value as answer:
        assert answer.code == 404


# -- alerts


def test_an_experiment_of_one_arm_has_its_value_and_nothing_leads(tab: Tab, server: PageServer) -> None:
    tab.open(f"{server.url}{server.path_of('runs')}", HAS_CHART)
    assert tab.text(".summary") == "train/loss: 0.01667. 1 run, none failed."
    assert tab.page.locator(".mark").count() == 0


def test_an_alert_has_its_level_as_a_word_and_a_sign_on_the_pages_of_experiment_and_run(
    tab: Tab, server: PageServer
) -> None:
    for path in (server.path_of("runs"), run_path(server)):
        tab.open(f"{server.url}{path}", HAS_CHART)
        alerts = [" ".join(each.split()) for each in tab.page.locator(".alert").all_inner_texts()]
        assert alerts[0].startswith(f"✕error loss is odd {MARKUP}")
        assert alerts[1].startswith("○info loss is low stop early?")
