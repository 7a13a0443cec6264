"""Summary of an experiment: a comparison of the arms, the best arm, and a conclusion in words.

Pure functions of results; nothing is read, written or published here. NaN and infinities are counted, never averaged.
An arm with non-finite scores or failed runs is best only if no arm is complete, because a mean over the seeds that
happened to survive is biased.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import msgspec

from evsys_bus.config.experiment import SuccessMetric
from evsys_bus.context import ArmResult, Spread, spread_of
from evsys_bus.errors import did_you_mean


class ArmSummary(msgspec.Struct, frozen=True):
    """Summary of one arm over its runs."""

    name: str
    runs: int
    completed: int
    failed: int
    cancelled: int
    """Stopped, or never started."""
    metrics: dict[str, Spread]
    """Metrics of its completed runs, the success metric first: those of evaluations after training, else of training.
    """
    score: Spread | None = None
    """The success metric; None if the experiment has none."""
    score_runs: int = 0
    """Number of runs that should have a score; with stages, only the runs of the last stage."""

    @property
    def is_complete(self) -> bool:
        """Whether every run was completed and, if there is a success metric, has a finite score."""
        return self.completed == self.runs and (self.score is None or self.score.n == self.score_runs)


class Conclusion(msgspec.Struct, frozen=True):
    """The best arm and the conclusion in words."""

    best_arm: str | None
    best_score: float | None
    conclusion: str
    """One or two plain sentences."""


def summarise(arms: Iterable[ArmResult], success: SuccessMetric | None = None) -> list[ArmSummary]:
    """Summarise each arm, in the order of their first runs; of a continual experiment, only the last stage counts."""
    results = list(arms)
    last_stage = next((_stage_name(run) for run in reversed(results)), None)
    by_arm: dict[str, list[ArmResult]] = {}
    for run in results:
        by_arm.setdefault(run.name, []).append(run)
    return [_summary(name, runs, last_stage, success) for name, runs in by_arm.items()]


def conclude(summaries: Sequence[ArmSummary], success: SuccessMetric | None = None) -> Conclusion:
    """Determine the best arm, by the mean score over its seeds, and the conclusion."""
    if success is None:
        return Conclusion(
            None, None, f"{_counts_text(summaries)} No success metric was asked for, so no arm is called best."
        )
    scored = [each for each in summaries if each.score is not None and each.score.mean is not None]
    if not scored:
        return Conclusion(None, None, f"{_counts_text(summaries)} {_no_score_text(summaries, success.name)}")
    sign = 1 if success.mode == "max" else -1
    ranked = sorted(scored, key=lambda each: (not each.is_complete, -sign * _mean_score(each)))
    best, rest = ranked[0], ranked[1:]
    sentence = f"{best.name} is best: {success.name} {best.score}{_seed_count_text(best)}"
    if len(summaries) == 1:
        sentence = f"{best.name} reached {success.name} {best.score}{_seed_count_text(best)}"
    elif rest:
        next_best = rest[0]
        if next_best.is_complete or not best.is_complete:
            sentence += f", ahead of {next_best.name} ({next_best.score}){_spread_caveat(best, next_best)}"
        else:
            sentence += f", before {next_best.name} ({next_best.score}, incomplete)"
    return Conclusion(best.name, _mean_score(best), " ".join([f"{sentence}.", *_incomplete_arms(summaries)]))


def _summary(name: str, runs: list[ArmResult], last_stage: object, success: SuccessMetric | None) -> ArmSummary:
    last = [run for run in runs if _stage_name(run) == last_stage]
    done = [run for run in last if run.status == "completed"]
    evals = any(run.eval_metrics for run in done)
    names = dict.fromkeys(metric for run in done for metric in (run.eval_metrics if evals else run.metrics))
    score = None if success is None else _spread(success.name, done)
    if success is not None:
        names = {success.name: None} | names if score and (score.n or score.nonfinite) else names
    return ArmSummary(
        name=name,
        runs=len(runs),
        completed=sum(run.status == "completed" for run in runs),
        failed=sum(run.status == "failed" for run in runs),
        cancelled=sum(run.status not in {"completed", "failed"} for run in runs),
        metrics={metric: _spread(metric, done) for metric in names},
        score=score,
        score_runs=len(last),
    )


def _spread(metric: str, runs: Iterable[ArmResult]) -> Spread:
    return spread_of(run.score(metric) for run in runs)


def _stage_name(run: ArmResult) -> object:
    """Return the stage of a run in a continual experiment; a mere parameter named ``stage`` differs from its group."""
    config = cast("object", run.run_config)
    stage = cast("dict[str, object]", config).get("stage") if isinstance(config, dict) else None
    return stage if stage == run.group_name else None


def _mean_score(summary: ArmSummary) -> float:
    assert summary.score is not None
    assert summary.score.mean is not None
    return summary.score.mean


def _seed_count_text(summary: ArmSummary) -> str:
    assert summary.score is not None
    return f" over {summary.score.n} seeds" if summary.score.n > 1 else ""


def _spread_caveat(best: ArmSummary, next_best: ArmSummary) -> str:
    """Return a caveat if the seeds differ more than the two arms, else an empty text."""
    assert best.score is not None
    assert next_best.score is not None
    spreads = [each.sd for each in (best.score, next_best.score) if each.sd is not None]
    close = spreads and abs(_mean_score(best) - _mean_score(next_best)) <= max(spreads)
    return ", which is no more than the seeds differ" if close else ""


def _incomplete_arms(summaries: Iterable[ArmSummary]) -> list[str]:
    """Return one sentence for each arm that is not complete."""
    found: list[str] = []
    for each in summaries:
        nonfinite = 0 if each.score is None else each.score.nonfinite
        unscored = (
            0 if each.score is None else each.completed - (each.runs - each.score_runs) - each.score.n - nonfinite
        )
        counts = ((each.failed, "failed"), (each.cancelled, "not finished"), (nonfinite, "NaN or infinite"))
        parts = [f"{count} {word}" for count, word in (*counts, (unscored, "without a score")) if count > 0]
        if parts:
            found.append(f"{each.name}: {', '.join(parts)} of {_run_count_text(each.runs)}.")
    return found


def _no_score_text(summaries: Sequence[ArmSummary], metric_name: str) -> str:
    if any(each.score is not None and each.score.nonfinite for each in summaries):
        return f"{metric_name} is NaN or infinite in every run that has it, so no arm is called best."
    known = {metric for each in summaries for metric in each.metrics}
    hint = did_you_mean(metric_name, known)
    return f"No completed run has {metric_name}, so no arm is called best{f'; {hint}' if hint else '.'}"


def _counts_text(summaries: Sequence[ArmSummary]) -> str:
    runs, completed = sum(each.runs for each in summaries), sum(each.completed for each in summaries)
    arms = f"{len(summaries)} arm{'s' if len(summaries) != 1 else ''}"
    text = f"{arms}, {_run_count_text(runs)}, {'all' if completed == runs else completed} completed."
    return " ".join([text, *(_incomplete_arms(summaries) if completed < runs else [])])


def _run_count_text(count: int) -> str:
    return f"{count} run{'s' if count != 1 else ''}"
