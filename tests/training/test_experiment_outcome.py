"""Which arm is best, and what is said of it."""

import pytest

from evsys_bus.config.experiment import SuccessMetric
from evsys_bus.context import ArmResult
from evsys_bus.training.summary import Spread, conclude, summarise

NAN, INF = float("nan"), float("inf")
ACC = SuccessMetric("test/acc")


def run(name, acc=None, *, status="completed", stage=None, **metrics):
    evals = {} if acc is None else {"test/acc": acc}
    config = {"seed": 0} | ({"stage": stage} if stage else {})
    return ArmResult(name, run_config=config, status=status, metrics=metrics, eval_metrics=evals, group_name=stage)


def verdict(*runs, success=ACC):
    return conclude(summarise(runs, success), success)


def test_the_mean_and_the_sample_deviation_are_over_the_seeds():
    (arm,) = summarise([run("a", 0.4), run("a", 0.6)], ACC)
    assert (arm.runs, arm.completed, arm.failed, arm.cancelled, arm.is_complete) == (2, 2, 0, 0, True)
    assert arm.score == arm.metrics["test/acc"]
    assert (arm.score.mean, arm.score.n) == (0.5, 2)
    assert arm.score.sd == pytest.approx(0.02**0.5)
    assert str(arm.score) == "0.5 ± 0.14"


@pytest.mark.parametrize(("mode", "best"), [("max", "b"), ("min", "a")])
def test_the_mode_says_which_way_is_better(mode, best):
    assert verdict(run("a", 0.1), run("b", 0.9), success=SuccessMetric("test/acc", mode)).best_arm == best


def test_a_training_metric_may_decide():
    success = SuccessMetric("train/loss", "min")
    result = verdict(run("a", **{"train/loss": 0.3}), run("b", **{"train/loss": 0.2}), success=success)
    assert (result.best_arm, result.best_score) == ("b", 0.2)


def test_a_score_of_zero_counts():
    assert verdict(run("a", 0.0), run("b", -1.0)).best_score == 0.0


def test_an_arm_that_lost_a_seed_is_best_only_where_no_arm_is_whole():
    survivor = [run("lucky", 0.99), run("lucky", status="failed")]
    result = verdict(*survivor, run("steady", 0.9), run("steady", 0.9))
    assert result.best_arm == "steady"
    assert result.conclusion == (
        "steady is best: test/acc 0.9 ± 0 over 2 seeds, before lucky (0.99, incomplete). lucky: 1 failed of 2 runs."
    )
    assert verdict(*survivor, run("worse", 0.1), run("worse", NAN)).best_arm == "lucky"


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_nan_and_infinities_are_counted_and_never_averaged(broken):
    result = verdict(run("bad", broken), run("bad", 0.9), run("good", 0.5), run("good", 0.5))
    assert (result.best_arm, result.best_score) == ("good", 0.5)
    (bad, _) = summarise([run("bad", broken), run("bad", 0.9), run("good", 0.5)], ACC)
    assert bad.score == Spread(mean=0.9, sd=None, n=1, nonfinite=1)
    assert not bad.is_complete
    assert "bad: 1 NaN or infinite of 2 runs." in result.conclusion


def test_where_every_score_is_nan_no_arm_is_best():
    result = verdict(run("a", NAN), run("b", NAN))
    assert (result.best_arm, result.best_score) == (None, None)
    assert "test/acc is NaN or infinite in every run that has it" in result.conclusion


def test_a_success_metric_that_no_run_has_names_the_one_that_was_meant():
    result = verdict(run("a", 0.5), success=SuccessMetric("test/ac"))
    assert result.best_arm is None
    assert result.conclusion == (
        '1 arm, 1 run, all completed. No completed run has test/ac, so no arm is called best; did you mean "test/acc"?'
    )


def test_arms_that_differ_less_than_their_seeds_are_called_so():
    result = verdict(run("a", 0.5), run("a", 0.7), run("b", 0.55), run("b", 0.6))
    assert result.conclusion.endswith("ahead of b (0.575 ± 0.035), which is no more than the seeds differ.")
    assert "no more than" not in verdict(run("a", 0.5), run("a", 0.51), run("b", 0.9), run("b", 0.91)).conclusion


def test_one_arm_is_not_best_of_anything():
    assert verdict(run("a", 0.5)).conclusion == "a reached test/acc 0.5."


def test_without_a_success_metric_the_conclusion_counts_runs():
    result = verdict(run("a", 0.5), run("b", status="failed"), run("b", status="cancelled"), success=None)
    assert result.conclusion == (
        "2 arms, 3 runs, 1 completed. b: 1 failed, 1 not finished of 2 runs. "
        "No success metric was asked for, so no arm is called best."
    )


def test_nothing_at_all_has_an_outcome_too():
    assert summarise([]) == []
    assert verdict().best_arm is None
    assert verdict(run("a", status="cancelled")).conclusion.startswith("1 arm, 1 run, 0 completed.")


def test_the_headline_metrics_are_the_evals_or_where_there_are_none_the_training_metrics():
    (arm,) = summarise([run("a", 0.5, loss=0.1)])
    assert list(arm.metrics) == ["test/acc"]
    (arm,) = summarise([run("a", loss=0.1)])
    assert list(arm.metrics) == ["loss"]
    (arm,) = summarise([run("a", 0.5, loss=0.1)], SuccessMetric("loss", "min"))
    assert list(arm.metrics) == ["loss", "test/acc"]


def test_of_stages_the_last_one_counts():
    runs = [
        run("a", 0.9, stage="one"),
        run("a", 0.1, stage="two"),
        run("b", 0.2, stage="one"),
        run("b", 0.3, stage="two"),
    ]
    arms = summarise(runs, ACC)
    assert [(arm.runs, arm.score.mean, arm.is_complete) for arm in arms] == [(2, 0.1, True), (2, 0.3, True)]
    assert verdict(*runs).best_arm == "b"
    broken = verdict(*runs[:2], runs[2], run("b", status="failed", stage="two"))
    assert broken.best_arm == "a"
    assert broken.conclusion.endswith("b: 1 failed of 2 runs.")


def test_a_parameter_called_stage_makes_no_stages():
    runs = [ArmResult(name, run_config={"stage": name}, eval_metrics={"test/acc": 0.5}) for name in "ab"]
    assert [arm.score.n for arm in summarise(runs, ACC)] == [1, 1]


def test_a_completed_run_without_a_score_is_told():
    assert "a: 1 without a score of 2 runs." in verdict(run("a", 0.5), run("a"), run("b", 0.1)).conclusion


def test_results_that_are_no_dicts_inside_are_fine():
    (arm,) = summarise([ArmResult("a", run_config=object(), eval_metrics={"test/acc": 1})], ACC)
    assert arm.score.mean == 1.0
