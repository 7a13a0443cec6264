"""Markdown pages of local_logger: a run's conclusion, and the experiment with its arms side by side.

Pure functions from results, which may lack any field, to Markdown. Names are escaped inside table cells; hypothesis and
conclusion are the user's own Markdown and are inserted unchanged.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from evsys_adapters.common.hook_arguments import field, fields, list_or_empty
from evsys_adapters.common.logged_values import cut_text
from evsys_bus.context import spread_of

_MAX_COLUMNS: Final = 6
"""Metric columns in the table of arms; the table of runs has twice as many."""
_MAX_TEXT: Final = 200
_MARKUP: Final = str.maketrans({letter: f"\\{letter}" for letter in "\\|<>[]*`"})

EndedRuns = Sequence[tuple[Path, Any]]
"""Run folders with their results: an ArmResult, or the host's equivalent."""


def hypothesis_of(config: object) -> str | None:
    """Return ``config.metadata["hypothesis"]``; both levels may be objects or mappings."""
    hypothesis = field(field(config, "metadata"), "hypothesis")
    return str(hypothesis) if hypothesis else None


def conclusion_page(
    result: object,
    run: str,
    run_result: object,
    arm: object,
    summary: Mapping[str, Any] | None = None,
    config_updates: Mapping[str, Any] | None = None,
) -> str:
    """Return the page with the outcome of the experiment and of this run, and what was set during the run."""
    status = field(arm, "status") or field(run_result, "status")
    error = field(arm, "error") or field(run_result, "error")
    metrics = fields(field(run_result, "metrics")) | fields(field(arm, "metrics")) | fields(field(arm, "eval_metrics"))
    facts = [
        f"- experiment: {_cell(field(result, 'name'))} ({_cell(field(result, 'status'))})",
        *_best(result),
        f"- this run: {_cell(run)}" + (f" ({_cell(status)})" if status else ""),
        *([f"- error: {_cell(error)}"] if error else []),
    ]
    return _page(
        "# Conclusion",
        _text_or_default(field(result, "conclusion")),
        "\n".join(facts),
        _values(metrics, "metric"),
        "## Summary" if summary else "",
        _values(summary or {}, "name"),
        "## Changes of the configuration" if config_updates else "",
        _values(config_updates or {}, "key"),
    )


def experiment_page(result: object, root: Path, ended: EndedRuns, hypothesis: str | None) -> str:
    """Return the page of the experiment: status, hypothesis, arms, runs with links to their folders, conclusion."""
    runs = list_or_empty(field(result, "arms")) or [arm for _, arm in ended]
    facts = [f"- status: {_cell(field(result, 'status'))}", *_best(result)]
    return _page(
        f"# {_cell(field(result, 'name') or root.name)}",
        "\n".join(facts),
        "## Hypothesis",
        _text_or_default(field(result, "hypothesis") or hypothesis),
        "## Arms",
        _arms(runs, field(result, "best_arm")) if runs else "None has ended.",
        "## Runs",
        _runs(runs, root, ended) if runs else "None has ended.",
        "## Conclusion",
        _text_or_default(field(result, "conclusion")),
    )


def number(value: object) -> str:
    """Format a number with five significant digits; empty for None, anything else as one line of bounded text."""
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else _cell(value)


def _values(values: Mapping[str, Any], head: str) -> str:
    rows = [[_cell(name), number(value)] for name, value in values.items()]
    return _table([head, "value"], rows) if rows else ""


def _arms(runs: Iterable[object], best: object) -> str:
    """Return a table with one row per arm; metrics are means over its runs."""
    arms: dict[str, list[object]] = {}
    for run in runs:
        arms.setdefault(str(field(run, "name")), []).append(run)
    metrics = _main_metrics([run for each in arms.values() for run in each])[:_MAX_COLUMNS]
    rows: list[list[str]] = []
    for name, replicates in arms.items():
        states = Counter(str(field(run, "status") or "unknown") for run in replicates)
        rows.append(
            [
                f"**{_cell(name)}** (best)" if name == best else _cell(name),
                ", ".join(f"{count} {_cell(status)}" for status, count in states.items()),
                ", ".join(filter(None, map(_seed, replicates))),
                *(_mean([_metrics(run).get(metric) for run in replicates]) for metric in metrics),
            ]
        )
    return _table(["arm", "runs", "seeds", *map(_cell, metrics)], rows)


def _runs(runs: Sequence[object], root: Path, ended: EndedRuns) -> str:
    metrics = _main_metrics(runs)[: 2 * _MAX_COLUMNS]
    rows: list[list[str]] = []
    for run in runs:
        folder = _folder(run, root, ended)
        name = _cell(folder.name if folder else field(run, "name"))
        link = f"[{name}]({quote(folder.relative_to(root).as_posix())}/)" if folder else name
        values = _metrics(run)
        rows.append(
            [
                link,
                _cell(field(run, "name")),
                _cell(field(run, "status") or "unknown"),
                *(number(values.get(metric)) for metric in metrics),
                _cell(field(run, "error") or ""),
            ]
        )
    return _table(["run", "arm", "status", *map(_cell, metrics), "error"], rows)


def _folder(run: object, root: Path, ended: EndedRuns) -> Path | None:
    """Find the folder of a run inside the experiment's: where its events came from, or the one named by its result."""
    run_dir = field(field(field(run, "run_result"), "artifacts"), "run_dir")
    candidates = [
        *(folder for folder, arm in ended if arm is run),
        *([Path(str(run_dir))] if run_dir else []),
        *(folder for folder, arm in ended if arm == run),  # equal after serialization
        root / str(field(run, "name")),
    ]
    return next((each for each in candidates if each.is_relative_to(root) and each != root and each.is_dir()), None)


def _metrics(run: object) -> dict[str, Any]:
    """Return the eval metrics of a run, or else its training metrics, and the summary of an open one."""
    return (fields(field(run, "eval_metrics")) or fields(field(run, "metrics"))) | fields(field(run, "summary"))


def _main_metrics(runs: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _metrics(run)))


def _mean(values: Iterable[object]) -> str:
    spread = spread_of(float(value) for value in values if isinstance(value, int | float))
    return number(spread.mean) + ("" if spread.sd is None else f" ± {spread.sd:.2g}")


def _seed(run: object) -> str:
    seed = field(field(run, "run_config"), "seed")
    return "" if seed is None else _cell(seed)


def _best(result: object) -> list[str]:
    best = field(result, "best_arm")
    score = field(result, "best_score")
    return [f"- best arm: {_cell(best)}" + ("" if score is None else f" ({number(score)})")] if best else []


def _text_or_default(text: object) -> str:
    return str(text).strip() if text else "Not given."


def _cell(value: object) -> str:
    return cut_text(" ".join(str(value).split()), _MAX_TEXT).translate(_MARKUP)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _page(*parts: str) -> str:
    return "\n\n".join(filter(None, parts)) + "\n"
