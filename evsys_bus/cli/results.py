"""The result of an experiment on stdout: a table of arms, the conclusion, and the location of the data."""

import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from evsys_bus.cli.experiment_plan import ExperimentPlan
from evsys_bus.cli.output.deliveries import (
    RanksByAdapter,
    describe_counts,
    describe_state,
    load_ranks_by_adapter,
    sync_command,
)
from evsys_bus.cli.output.formatting import (
    GAP,
    NO_VALUE,
    MetricSpread,
    format_duration,
    format_facts,
    format_mean_sd,
    format_table,
    summarize_error,
)
from evsys_bus.cli.output.screen import printable, terminal_width
from evsys_bus.codec import json_line
from evsys_bus.context import ArmResult, ExperimentResult
from evsys_bus.tasks import DeliveryStatus, Receipt
from evsys_bus.training.plan import RunPlan
from evsys_bus.training.summary import ArmSummary, Spread, summarise

_MAX_METRICS: Final = 4
_MAX_FAILURES: Final = 10
_MAX_PAGE_URLS: Final = 10
_HIDDEN_METRICS: Final = frozenset({"epoch", "step_seconds", "grad_norm"})


def result_lines(
    plan: ExperimentPlan,
    result: ExperimentResult,
    seconds: float,
    receipt: Receipt | None = None,
    page_urls: Mapping[str, str] = {},
) -> list[str]:
    """Return the result as text; ``page_urls`` are the known URLs of runs."""
    width = terminal_width(sys.stdout)
    arms = summarise(result.arms, plan.config.success_metric)
    metrics = [
        name for name in dict.fromkeys(name for arm in arms for name in arm.metrics) if name not in _HIDDEN_METRICS
    ]
    shown = metrics[:_MAX_METRICS]
    head = ["arm", "runs", *map(printable, shown)]
    rows = [head, *(_row(arm, shown, result.best_arm) for arm in arms)]
    lines = [f"{result.name}   {result.status} in {format_duration(seconds)}", "", *format_table(rows, width)]
    failed = [(run, arm) for run, arm in _pair_runs(plan, result) if arm.status == "failed"]
    lines += ["", *(_format_failure(run, arm, plan) for run, arm in failed[:_MAX_FAILURES])] if failed else []
    if len(failed) > _MAX_FAILURES:
        lines.append(f"! and {len(failed) - _MAX_FAILURES} more failed runs")
    details = [
        *([["hypothesis", result.hypothesis]] if result.hypothesis else []),
        *([["conclusion", result.conclusion]] if result.conclusion else []),
        *([["delivery", _format_deliveries(receipt)]] if receipt and receipt.deliveries else []),
        ["data", plan.display_folder],
        ["a run", f"evsys-bus show {plan.display_folder}/{plan.runs[0].run_key}"],
        *_page_lines(page_urls),
    ]
    return [*lines, "", *format_facts([[name, printable(text)] for name, text in details], width)]


def result_json(
    plan: ExperimentPlan,
    result: ExperimentResult,
    seconds: float,
    receipt: Receipt | None = None,
    page_urls: Mapping[str, str] = {},
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
            "page": page_urls.get(run.run_key),
        }
        for run, arm in _pair_runs(plan, result)
    ]
    for arm in summarise(result.arms, plan.config.success_metric):
        spreads = {name: {"mean": each.mean, "sd": each.sd, "n": each.n} for name, each in arm.metrics.items()}
        counts = {"runs": arm.runs, "completed": arm.completed, "failed": arm.failed}
        rows.append({"type": "arm", "arm": arm.name, **counts, "metrics": spreads})
    deliveries = receipt.deliveries if receipt else ()
    rows += [{"type": "delivery", **msgspec.to_builtins(each), "trouble": each.last_error} for each in deliveries]
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
            "finish": None if receipt is None else delivery_command(receipt),
        }
    )
    return [json_line(row).decode() for row in rows]


def delivery_command(receipt: Receipt) -> str | None:
    """Return the command that delivers pending events and confirms unconfirmed ones; None if there are none."""
    if receipt.resume_command is not None or receipt.journal is None:
        return receipt.resume_command
    confirmable_by_sync = any(
        each.owed and each.state is not None for each in receipt.deliveries
    )  # inline ones have none
    return sync_command(receipt.journal) if confirmable_by_sync else None


def _format_deliveries(receipt: Receipt) -> str:
    """Return ``csv_metrics ok   wandb 1,204 pending, 120 owed``."""
    ranks: RanksByAdapter = {} if receipt.journal is None else load_ranks_by_adapter(receipt.journal)
    return GAP.join(
        f"{each.name} {', '.join(describe_counts(each)) or _describe_complete(each, ranks)}"
        for each in receipt.deliveries
    )


def _describe_complete(delivery: DeliveryStatus, ranks: RanksByAdapter) -> str:
    return describe_state(delivery, ranks) if delivery.state == "other_rank" else "ok"


def _page_lines(page_urls: Mapping[str, str]) -> list[list[str]]:
    lines = [[run, f"View run at {url}"] for run, url in list(page_urls.items())[:_MAX_PAGE_URLS]]
    return (
        [*lines, ["", f"and {len(page_urls) - _MAX_PAGE_URLS} more runs"]] if len(page_urls) > _MAX_PAGE_URLS else lines
    )


def _row(arm: ArmSummary, metrics: list[str], best: str | None) -> list[str]:
    mark = "!" if arm.failed else "*" if arm.name == best else " "
    seeds = f"{arm.completed}/{arm.runs} {mark}".rstrip()
    return [printable(arm.name), seeds, *(_format_spread(arm.metrics.get(name)) for name in metrics)]


def _format_spread(spread: Spread | None) -> str:
    if spread is None or spread.mean is None:
        return "NaN" if spread is not None and spread.nonfinite else NO_VALUE
    text = format_mean_sd(MetricSpread(spread.mean, spread.sd, spread.n))
    return f"{text} ({spread.nonfinite} NaN)" if spread.nonfinite else text


def _format_failure(run: RunPlan, arm: ArmResult, plan: ExperimentPlan) -> str:
    name = " ".join([run.arm, f"seed {run.seed}", *([run.stage] if run.stage else [])])
    show = f"show: evsys-bus show {plan.display_folder}/{run.run_key}"
    return f"! {printable(name)} failed: {summarize_error(arm.error)}   {show}"


def _pair_runs(plan: ExperimentPlan, result: ExperimentResult) -> list[tuple[RunPlan, ArmResult]]:
    """Pair planned runs with results: both are in plan order, followed by unplanned runs of earlier sessions."""
    return list(zip(plan.runs, result.arms, strict=False))
