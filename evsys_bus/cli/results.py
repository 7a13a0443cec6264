"""The result of an experiment on stdout: a table of arms, the conclusion, and the location of the data."""

import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from evsys_bus.cli.adapter_states import Ranks, ranks_served, state_words
from evsys_bus.cli.amounts import NONE, duration
from evsys_bus.cli.deliveries import count_words, sync_command
from evsys_bus.cli.planned import Planned
from evsys_bus.cli.progress import figures
from evsys_bus.cli.progress.figures import pair
from evsys_bus.cli.progress.live import first_line
from evsys_bus.cli.screen import printable, width_of
from evsys_bus.cli.tables import GAP, facts, table
from evsys_bus.codec import json_line
from evsys_bus.context import ArmResult, ExperimentResult
from evsys_bus.tasks import DeliveryStatus, Receipt
from evsys_bus.training.outcome import ArmSummary, Spread, summarise
from evsys_bus.training.plan import RunPlan

_MAX_METRICS: Final = 4
_MAX_FAILURES: Final = 10
_MAX_PAGES: Final = 10
_UNTOLD: Final = frozenset({"epoch", "step_seconds", "grad_norm"})


def result_lines(
    plan: Planned,
    result: ExperimentResult,
    seconds: float,
    receipt: Receipt | None = None,
    pages: Mapping[str, str] = {},
) -> list[str]:
    """Return the result as text; ``pages`` are the known URLs of runs."""
    width = width_of(sys.stdout)
    arms = summarise(result.arms, plan.config.success_metric)
    metrics = [name for name in dict.fromkeys(name for arm in arms for name in arm.metrics) if name not in _UNTOLD]
    shown = metrics[:_MAX_METRICS]
    head = ["arm", "runs", *map(printable, shown)]
    rows = [head, *(_row(arm, shown, result.best_arm) for arm in arms)]
    lines = [f"{result.name}   {result.status} in {duration(seconds)}", "", *table(rows, width)]
    failed = [(run, arm) for run, arm in _pairs(plan, result) if arm.status == "failed"]
    lines += ["", *(_failure(run, arm, plan) for run, arm in failed[:_MAX_FAILURES])] if failed else []
    if len(failed) > _MAX_FAILURES:
        lines.append(f"! and {len(failed) - _MAX_FAILURES} more failed runs")
    told = [
        *([["hypothesis", result.hypothesis]] if result.hypothesis else []),
        *([["conclusion", result.conclusion]] if result.conclusion else []),
        *([["delivery", _deliveries(receipt)]] if receipt and receipt.deliveries else []),
        ["data", plan.shown_folder],
        ["a run", f"evsys-bus show {plan.shown_folder}/{plan.runs[0].run_key}"],
        *_page_lines(pages),
    ]
    return [*lines, "", *facts([[name, printable(text)] for name, text in told], width)]


def result_json(
    plan: Planned,
    result: ExperimentResult,
    seconds: float,
    receipt: Receipt | None = None,
    pages: Mapping[str, str] = {},
) -> list[str]:
    """Return the result as JSON: a line for each run, arm and delivery, and one for the experiment."""
    rows: list[dict[str, Any]] = [
        {
            "type": "run",
            "run": run.run_key,
            "arm": run.arm,
            "seed": run.seed,
            "stage": run.stage,
            "status": arm.status,
            "metrics": arm.metrics,
            "eval_metrics": arm.eval_metrics,
            "error": arm.error,
            "run_dir": str(run.run_dir),
            "page": pages.get(run.run_key),
        }
        for run, arm in _pairs(plan, result)
    ]
    for arm in summarise(result.arms, plan.config.success_metric):
        spreads = {name: {"mean": each.mean, "sd": each.sd, "n": each.n} for name, each in arm.metrics.items()}
        counts = {"runs": arm.runs, "completed": arm.completed, "failed": arm.failed}
        rows.append({"type": "arm", "arm": arm.name, **counts, "metrics": spreads})
    deliveries = receipt.deliveries if receipt else ()
    rows += [{"type": "delivery", **msgspec.to_builtins(each), "trouble": each.trouble} for each in deliveries]
    rows.append(
        {
            "type": "experiment",
            "name": result.name,
            "status": result.status,
            "best_arm": result.best_arm,
            "best_score": result.best_score,
            "conclusion": result.conclusion,
            "output_dir": str(plan.folder),
            "seconds": round(seconds, 3),
            "finish": None if receipt is None else finish_command(receipt),
        }
    )
    return [json_line(row).decode() for row in rows]


def finish_command(receipt: Receipt) -> str | None:
    """Return the command that delivers pending events and confirms unconfirmed ones; None if there are none."""
    if receipt.finish is not None or receipt.journal is None:
        return receipt.finish
    settled_by_sync = any(each.owed and each.state is not None for each in receipt.deliveries)  # inline ones have none
    return sync_command(receipt.journal) if settled_by_sync else None


def _deliveries(receipt: Receipt) -> str:
    """Return ``csv_metrics ok   wandb 1,204 pending, 120 owed``."""
    ranks: Ranks = {} if receipt.journal is None else ranks_served(receipt.journal)
    return GAP.join(f"{each.name} {', '.join(count_words(each)) or _well(each, ranks)}" for each in receipt.deliveries)


def _well(delivery: DeliveryStatus, ranks: Ranks) -> str:
    return state_words(delivery, ranks) if delivery.state == "other_rank" else "ok"


def _page_lines(pages: Mapping[str, str]) -> list[list[str]]:
    lines = [[run, f"View run at {url}"] for run, url in list(pages.items())[:_MAX_PAGES]]
    return [*lines, ["", f"and {len(pages) - _MAX_PAGES} more runs"]] if len(pages) > _MAX_PAGES else lines


def _row(arm: ArmSummary, metrics: list[str], best: str | None) -> list[str]:
    mark = "!" if arm.failed else "*" if arm.name == best else " "
    seeds = f"{arm.completed}/{arm.runs} {mark}".rstrip()
    return [printable(arm.name), seeds, *(_spread(arm.metrics.get(name)) for name in metrics)]


def _spread(spread: Spread | None) -> str:
    if spread is None or spread.mean is None:
        return "NaN" if spread is not None and spread.nonfinite else NONE
    text = pair(figures.Spread(spread.mean, spread.sd, spread.n))
    return f"{text} ({spread.nonfinite} NaN)" if spread.nonfinite else text


def _failure(run: RunPlan, arm: ArmResult, plan: Planned) -> str:
    name = " ".join([run.arm, f"seed {run.seed}", *([run.stage] if run.stage else [])])
    show = f"show: evsys-bus show {plan.shown_folder}/{run.run_key}"
    return f"! {printable(name)} failed: {first_line(arm.error)}   {show}"


def _pairs(plan: Planned, result: ExperimentResult) -> list[tuple[RunPlan, ArmResult]]:
    """Pair planned runs with results: both are in plan order, followed by unplanned runs of earlier sessions."""
    return list(zip(plan.runs, result.arms, strict=False))
