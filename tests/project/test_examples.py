"""The examples and the pages of the docs, run as their readers would run them."""

import re
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from evsys_bus import Callback, EventBus, LoopState
from evsys_bus.events import declared_events
from support import ROOT
from support.pages import run_blocks, run_without_warnings, snippets


def numbers(pattern, text):
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, text)]


def test_the_async_rl_example_learns_stops_early_and_leaves_nothing_undone(tmp_path):
    out = run_without_warnings(tmp_path, ROOT / "examples/async_rl.py", tmp_path / "rl")
    evals = numbers(r"eval of step (\d+) landed at step (\d+): prize ([\d.]+)", out)
    assert evals[0][2] < 0.7
    assert evals[-1][2] >= 0.84
    assert any(landed > step for step, landed, _ in evals)
    [(last, horizon)] = numbers(r"ended at step (\d+) of (\d+): the prize was good enough", out)
    assert last + 1 < horizon
    assert re.search(r"^tasks   [\d,]+ completed$", out, re.MULTILINE), (
        "none failed, was cancelled, refused or unfinished"
    )
    saved = {path.name: path.read_text() for path in (tmp_path / "rl").glob("*.json")}
    assert {"step-000019.json", "final.json"} <= saved.keys()
    assert {path.name: path.read_text() for path in (tmp_path / "rl/shipped").iterdir()} == saved
    [(rollouts,)] = numbers(r"'rollout_end': (\d+)", out)
    assert len((tmp_path / "rl/rollouts.jsonl").read_text().splitlines()) == rollouts


async def test_the_async_rl_example_publishes_rows_late_repeated_and_at_their_own_step(tmp_path):
    spec = spec_from_file_location("async_rl", ROOT / "examples/async_rl.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)

    class Notes(Callback):
        def __init__(self):
            self.rows, self.evals, self.rollouts = [], [], 0

        def on_step_end(self, state, step_idx, batch, metrics):
            self.rows.append((state.step, step_idx, metrics))

        def on_eval(self, state, step_idx, eval_name, metrics):
            self.evals.append((state.step, step_idx))

        def on_rollout_end(self, state, version, plays):
            self.rollouts += 1

    notes = Notes()
    state = LoopState(step=0, num_steps=60, output_dir=tmp_path)
    saved = []
    async with EventBus([notes]) as bus:
        await example.train(bus, state, saved)
    late = [row for row in notes.rows if row[1] < row[0]]
    assert late
    assert len(notes.rows) == 3 * 60  # one for the step, one for each rollout that it took
    assert [step for _, step, metrics in notes.rows if "best_odds" in metrics] == list(range(60))
    assert sorted(step for _, step in notes.evals) == [9, 19, 29, 39, 49, 59]
    assert any(landed > step for landed, step in notes.evals)
    assert notes.rollouts >= 2 * 60
    assert [row.name for row in saved] == ["step-000019", "step-000039", "step-000059", "final"]


def test_the_sync_example_finds_the_line_and_ships_its_checkpoints_in_order(tmp_path):
    out = run_without_warnings(tmp_path, ROOT / "examples/sync_loop.py", tmp_path / "sync")
    names = [f"step-000{step}99.json" for step in range(3)]
    assert re.findall(r"shipped (\S+)", out) == names
    assert sorted(path.name for path in (tmp_path / "sync/shipped").iterdir()) == names
    [(slope, intercept)] = numbers(r"y = (\S+) x (\S+)", out)
    assert abs(slope - 3) < 0.1
    assert abs(intercept + 1) < 0.1
    assert "\ntasks   3 completed\n" in out


def test_R13_a_side_eval_comes_back_as_an_eval_of_its_own_step(tmp_path):
    out = run_without_warnings(tmp_path, ROOT / "examples/side_eval.py", tmp_path / "side")
    evals = numbers(r"held-out of step (\d+), at step (\d+): ([\d.]+)", out)
    assert [step for step, _, _ in evals] == [9, 19, 29, 39, 49, 59]
    assert all(now >= step for step, now, _ in evals)
    assert any(now > step for step, now, _ in evals)
    assert evals[0][2] < evals[-1][2]


@pytest.mark.parametrize(
    ("page", "at_least"),
    [
        ("README.md", 2),
        ("docs/callbacks.md", 6),
        ("docs/checkpoints.md", 1),
        ("docs/content.md", 1),
        ("docs/delivery.md", 1),
        ("docs/destinations.md", 1),
        ("docs/embedding.md", 6),
        ("docs/experiments.md", 1),
        ("docs/files.md", 2),
        ("docs/reading.md", 1),
        ("docs/run.md", 1),
    ],
)
def test_every_snippet_of_a_page_runs_and_prints_what_the_page_says(tmp_path, page, at_least):
    found = list(snippets(ROOT / page))
    assert len(found) >= at_least
    assert run_blocks(tmp_path, found) == []


def test_the_table_of_hooks_has_every_hook_with_its_arguments():
    told = dict(re.findall(r"^\| `(on_\w+)\((.*?)\)` \|", (ROOT / "docs/callbacks.md").read_text(), re.MULTILINE))
    shipped = [event for event in declared_events().values() if event.__module__ == "evsys_bus.events"]
    assert len(shipped) == 20
    for event in shipped:
        arguments = told.pop(event.hook).replace("*, ", "").replace("=None", "")
        assert arguments == ", ".join(event.__struct_fields__)
    assert told == {}


def test_the_links_between_the_pages_lead_somewhere():
    pages = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
    for text in pages.values():
        for target, _, place in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
            assert (ROOT / "docs" / target).exists(), target
            if place:
                headings = re.findall(r"^#+ (.*)$", pages[target] if target else text, re.MULTILINE)
                assert place in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
