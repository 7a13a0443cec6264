"""What pages show, as JSON: the list of experiments, and one experiment with its arms, runs and metrics.

The order is one of meaning: headline metrics first, then those in which the arms differ most, constants last; runs that
have failed or stalled before the others.
"""

import math
import re
import time as clock
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeGuard

import msgspec

from evsys_adapters.common.hook_arguments import fields
from evsys_adapters.dashboard.catalogue import Catalogue
from evsys_adapters.dashboard.error_texts import MAX_LISTED, shorten, shorten_errors
from evsys_adapters.dashboard.open_series import SeriesInfo
from evsys_adapters.dashboard.records import ExperimentRecord, RunRecord, arm_of, run_state, stalled_at
from evsys_adapters.dashboard.series import SeriesStore
from evsys_adapters.dashboard.values import finite
from evsys_bus.context import Spread, spread_of
from evsys_bus.reading import RecordedRun, better_mode
from evsys_bus.reading.fields import RunFields, differing_keys, is_goal

Direction = Literal["min", "max"]
Json = dict[str, Any]

_LARGER_IS_BETTER: Final = frozenset(
    [
        "acc",
        "accuracy",
        "auc",
        "bleu",
        "em",
        "f1",
        "ap",
        "map",
        "mrr",
        "ndcg",
        "pass",
        "passed",
        "precision",
        "r2",
        "recall",
        "return",
        "returns",
        "reward",
        "rewards",
        "rouge",
        "score",
        "solved",
        "success",
        "win",
        "winrate",
    ]
)
"""Words in names of metrics of which larger values are better."""
_NOT_COMPARED: Final = ("system/", "epoch/")
_MAX_HEADLINES: Final = 3
_SPARK_BUCKETS: Final = 24
_MAX_SAME_CHARS: Final = 200
_MAX_SHOWN_ARMS: Final = 1_000
_MAX_LISTED_CHARS: Final = 300
_MAX_LISTED_TAGS: Final = 50
"""In the list of experiments; the experiment's own page has all."""
_MAX_ALERT_CHARS: Final = 400
"""The pages of the runs have the rest."""
_BASELINES: Final = ("baseline", "control")
_LEFT_OUT: Final = frozenset({"failed", "cancelled", "stalled", "pending"})
"""States of runs whose values do not count where an arm has others."""
_STATE_ORDER: Final = ("failed", "stalled", "running", "cancelled", "stopped", "pending", "completed")
"""Runs that need a person come first."""
_ENDED: Final = frozenset({"completed", "failed", "cancelled", "stopped"})
_IDLE_SECONDS: Final = 60.0
"""How long an experiment without a running run may be silent until it counts as stalled."""


class Store(Protocol):
    """What pages read."""

    @property
    def id(self) -> str:
        """A UUID of the database."""
        ...

    @property
    def catalogue(self) -> Catalogue:
        """The experiments and runs."""
        ...

    @property
    def series(self) -> SeriesStore:
        """Their points."""
        ...


class Headline(NamedTuple):
    """A metric by which arms are compared."""

    name: str
    direction: Direction | None
    """Which values are better; None if that is not known, and then no arm is marked."""
    rule: str
    """Why it was chosen."""


def home(store: Store, now: float | None = None) -> Json:
    """Return the list of experiments, the one with the newest event first."""
    now = clock.time() if now is None else now
    catalogue = store.catalogue
    rows: list[Json] = []
    for record in catalogue.records.experiments():
        known = catalogue.page_rows.get(record.id)
        version = catalogue.records.version(record.id)
        if known is None or known[0] != version or now >= known[1]:
            view = _View(store, record, now)
            known = catalogue.page_rows[record.id] = (version, view.valid_until, view.home_row())
        rows.append(known[2])
    return {"store": store.id, "now": now, "experiments": sorted(rows, key=lambda row: -(row["last_event"] or 0.0))}


def experiment(store: Store, public_id: str, now: float | None = None) -> Json | None:
    """Return one experiment; None if there is none, or it is in the trash."""
    id_ = store.catalogue.experiment_id(public_id)
    record = None if id_ is None else store.catalogue.records.experiment(id_)
    if record is None or record.hidden is not None:
        return None
    return _View(store, record, clock.time() if now is None else now).page()


def direction_of(metric: str) -> Direction | None:
    """Return which values of a metric are better, by the words in its name; None if they do not show it."""
    if better_mode(metric) == "min":
        return "min"
    words = set(re.findall(r"[a-z]+[0-9]*", metric.lower())) | set(re.findall(r"[a-z]+", metric.lower()))
    return "max" if words & _LARGER_IS_BETTER else None


def natural_order(name: str) -> tuple[object, ...]:
    """Return a key to sort names by in which numbers are in the order of their values."""
    parts = re.split("([0-9]+)", name)
    return tuple((len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(parts))


class _Arm(NamedTuple):
    name: str
    runs: list[RunRecord]
    """All of them, by seed."""
    state: str


class _View:
    """An experiment with its runs and the summaries of their series."""

    def __init__(self, store: Store, record: ExperimentRecord, now: float) -> None:
        self._store: Final = store
        self._record: Final = record
        self._now: Final = now
        self._runs: Final = store.catalogue.records.runs(record.id)
        self._states: Final = {run.id: run_state(run, now) for run in self._runs}
        self._series: Final = {run.id: _by_name(store.series.names(run.id)) for run in self._runs}
        self._last_stage: Final = next((stage for run in reversed(self._runs) if (stage := _stage(run))), None)
        self._arms: Final = self._find_arms()
        self._compared_runs: Final = [self._compared(arm) for arm in self._arms]
        self._headlines: Final = self._find_headlines()

    @property
    def valid_until(self) -> float:
        """When the view changes without an event: as soon as a running run counts as stalled."""
        times = [stalled_at(run) for run in self._runs if self._states[run.id] == "running"]
        if self._record.has_start and self._record.status is None:
            times += [time for time in [(self._last_event or 0.0) + _IDLE_SECONDS] if time > self._now]
        return min(times, default=math.inf)

    # -- arms and headlines

    def _find_arms(self) -> list[_Arm]:
        by_name: dict[str, list[RunRecord]] = {name: [] for name in self._record.planned_arms[:_MAX_SHOWN_ARMS]}
        for run in self._runs:
            by_name.setdefault(arm_of(run), []).append(run)
        return [
            _Arm(name, sorted(runs, key=_seed_key), _arm_state([self._states[run.id] for run in runs]))
            for name, runs in by_name.items()
        ]

    def _find_headlines(self) -> list[Headline]:
        """Return the metrics to compare arms by, the deciding one first."""
        record = self._record
        found: list[Headline] = []
        if record.success_metric:
            mode: Direction | None = "min" if record.success_mode == "min" else "max" if record.success_mode else None
            name = self._resolve(record.success_metric)
            found.append(Headline(name, mode or direction_of(name), "success metric"))
        elif any(_is_number(run.summary.get("best_score")) for run in self._runs):
            found.append(Headline("best_score", None, "best score"))
        names = list(dict.fromkeys(name for run in self._runs for name in run.eval_names))
        goals = [name for name in names if is_goal(name)] or names
        best = next((name for name in goals if direction_of(name) is not None), goals[0] if goals else None)
        if best is not None:
            found.append(Headline(best, direction_of(best), "first eval"))
        loss = self._training_loss()
        if loss is not None:
            is_loss = "loss" in loss.lower()
            found.append(Headline(loss, "min" if is_loss else direction_of(loss), "training loss"))
        by_name: dict[str, Headline] = {}
        for each in found:
            by_name.setdefault(each.name, each)
        return [*by_name.values()][:_MAX_HEADLINES]

    def _resolve(self, name: str) -> str:
        """Return the name of the series that a config calls ``name``."""
        for each in (name, f"train/{name}"):
            if any(each in self._series[run.id] or each in run.finals for run in self._runs):
                return each
        return name

    def _training_loss(self) -> str | None:
        names = Counter(name for found in self._series.values() for name in found if not name.startswith(_NOT_COMPARED))
        if "train/loss" in names:
            return "train/loss"
        training = [name for name, _ in names.most_common() if name.startswith("train/")]
        losses = [name for name in (*training, *names) if "loss" in name.lower()]
        others = [name for name in (*training, *names) if is_goal(name)]
        return next(iter([*losses, *others, *training, *names]), None)

    def _value(self, run: RunRecord, name: str) -> float | None:
        """Return the value by which a run is compared: that of an eval after training, else its last one."""
        if name in run.finals:
            final = run.finals[name]
            return math.nan if final is None else final
        info = self._series[run.id].get(name)
        if info is not None:
            return info.last
        value = run.summary.get(name)
        return float(value) if _is_number(value) else None

    def _compared(self, arm: _Arm) -> list[RunRecord]:
        """Return the runs of an arm whose values count; of stages only the last one."""
        runs = [run for run in arm.runs if self._last_stage is None or _stage(run) == self._last_stage]
        return [run for run in runs if self._states[run.id] not in _LEFT_OUT] or runs

    def _spread(self, arm: _Arm, name: str) -> Spread:
        values = [self._value(run, name) for run in self._compared(arm)]
        try:
            return spread_of(values)
        except OverflowError:  # numbers near the largest ones
            return Spread(None, None, 0, sum(value is not None for value in values))

    def _baseline(self) -> _Arm | None:
        config = self._record.config
        given = [source.get(key) for source in (config, fields(config.get("metadata"))) for key in _BASELINES]
        names = [each for each in given if isinstance(each, str)]
        names += [arm.name for arm in self._arms if arm.name.casefold() in _BASELINES]
        by_name = {arm.name: arm for arm in self._arms}
        named = next((by_name[name] for name in names if name in by_name), None)
        return named or next(iter(self._arms), None)

    def _winner(self) -> str | None:
        """Return the best arm: as the experiment has ended, else by the first headline that two arms have values of.

        An incomplete arm is the best only if no arm is complete. None if the direction is not known, or none is better.
        """
        if self._record.best_arm is not None:
            return self._record.best_arm
        for headline in self._headlines:
            spreads = {arm.name: self._spread(arm, headline.name) for arm in self._arms}
            scored = [(spreads[arm.name].mean or 0.0, arm) for arm in self._arms if spreads[arm.name].n]
            if len(scored) < 2:  # noqa: PLR2004 # nothing to compare
                continue
            if headline.direction is None:
                return None
            is_complete = [self._is_complete(arm) and not spreads[arm.name].nonfinite for _, arm in scored]
            chosen = [each for each, complete in zip(scored, is_complete, strict=True) if complete] or scored
            best = (min if headline.direction == "min" else max)(mean for mean, _ in chosen)
            names = [arm.name for mean, arm in chosen if mean == best]
            return names[0] if len(names) == 1 else None
        return None

    def _lead(self) -> Json | None:
        """Return how far the best arm is ahead of the second one, by the first headline that both have values of."""
        winner = self._winner()
        if winner is None:
            return None
        for name, direction, _ in self._headlines:
            spreads = {arm.name: self._spread(arm, name) for arm in self._arms}
            means = {arm: spread.mean for arm, spread in spreads.items() if spread.mean is not None}
            own = means.pop(winner, None)
            if own is None or direction is None or not means:
                continue
            second = (min if direction == "min" else max)(means, key=lambda arm: means[arm])
            return {"arm": winner, "second": second, "metric": name, **_delta(spreads[winner], spreads[second])}
        return None

    def _is_complete(self, arm: _Arm) -> bool:
        return not any(self._states[run.id] in _LEFT_OUT for run in arm.runs)

    # -- state and progress

    @property
    def _last_event(self) -> float | None:
        times = [run.last for run in self._runs if run.last is not None]
        return max([*times, *([] if self._record.last is None else [self._record.last])], default=None)

    @property
    def _state(self) -> str:
        states = set(self._states.values())
        if self._record.status is not None:
            return self._record.status
        if "running" in states:
            return "running"
        last = self._last_event
        if self._record.has_start:  # it has not ended: another run is about to start, or its process is gone
            return "running" if last is not None and self._now - last <= _IDLE_SECONDS else "stalled"
        return next(
            (each for each in ("stalled", "failed", "pending", "cancelled", "stopped") if each in states), "completed"
        )

    @property
    def _progress(self) -> float | None:
        """How much is done, from 0 to 1: steps of all planned runs; None if that is not known."""
        total = max(self._record.planned or 0, len(self._runs))
        if not total:
            return None
        done = 0.0
        for run in self._runs:
            if self._states[run.id] in _ENDED:
                done += 1
            elif run.num_steps:
                done += min(1.0, ((run.step if run.step is not None else -1) + 1) / run.num_steps)
            elif self._states[run.id] != "pending":
                return None
        return done / total

    def _counts(self) -> Json:
        counts = Counter(self._states.values())
        return {
            "total": len(self._runs),
            "planned": max(self._record.planned or 0, len(self._runs)),
            **{state: counts[state] for state in ("running", "completed", "failed", "cancelled", "stalled")},
            "stopped": counts["stopped"],
            "pending": counts["pending"],
        }

    # -- pages

    def home_row(self) -> Json:
        """Return the experiment's row in the list."""
        record = self._record
        return {
            "id": record.public,
            "name": record.name[:_MAX_LISTED_CHARS],
            "state": self._state,
            "hypothesis": record.hypothesis and record.hypothesis[:_MAX_LISTED_CHARS],
            "tags": [tag[:_MAX_LISTED_CHARS] for tag in self._tags()[:_MAX_LISTED_TAGS]],
            "arms": len(self._arms),
            "runs": self._counts(),
            "headline": self._headline_of_home(),
            "started": record.started,
            "ended": record.ended,
            "last_event": self._last_event,
            "progress": self._progress,
        }

    def _tags(self) -> list[str]:
        return list(dict.fromkeys([*self._record.tags, *(tag for run in self._runs for tag in run.tags)]))

    def _headline_of_home(self) -> Json | None:
        """Return the first headline that has a value, of the best arm, and the first curve of that arm's headlines."""
        winner = self._winner()
        arms = sorted(self._arms, key=lambda arm: arm.name != winner)
        for headline in self._headlines:
            for arm in arms:
                mean = self._spread(arm, headline.name).mean
                if mean is not None:
                    curve, spark = self._spark(arm)
                    shown = {**headline._asdict(), "value": mean, "arm": arm.name, "spark_name": curve}
                    return {
                        **{k: v[:_MAX_LISTED_CHARS] if isinstance(v, str) else v for k, v in shown.items()},
                        "spark": spark,
                    }
        return None

    def _spark(self, arm: _Arm) -> tuple[str | None, list[float | None]]:
        """Return the name and the curve of the first headline that has one in a run of the arm."""
        for headline in self._headlines:
            for run in self._compared(arm):
                info = self._series[run.id].get(headline.name)
                if info is not None:
                    line = self._store.series.read([info.id], buckets=_SPARK_BUCKETS).lines[0]
                    return headline.name, [_finite(float(value)) for value in line.mean]
        return None, []

    def page(self) -> Json:
        """Return the experiment's page."""
        record, catalogue = self._record, self._store.catalogue
        configs = {run.id: RunFields(_recorded(run)) for run in self._runs}
        varying = differing_keys(configs.values()) if len(self._runs) > 1 else []
        public = {run.id: run.public for run in self._runs}
        alerts = catalogue.details.alerts([*public])
        runs = [self._run_row(run, configs[run.id], varying) for run in self._ordered_runs()]
        shorten_errors(runs)
        return {
            "id": record.public,
            "name": record.name,
            "state": self._state,
            "hypothesis": record.hypothesis,
            "conclusion": record.conclusion,
            "tags": self._tags(),
            "notes": record.notes or next((run.notes for run in self._runs if run.notes), None),
            "config": record.config,
            "started": record.started,
            "ended": record.ended,
            "last_event": self._last_event,
            "progress": self._progress,
            "best_score": record.best_score,
            "error": record.error and shorten(record.error, MAX_LISTED),
            "baseline": None if (baseline := self._baseline()) is None else baseline.name,
            "counts": self._counts(),
            "headlines": [each._asdict() for each in self._headlines],
            "arms": self._arm_rows(baseline),
            "lead": self._lead(),
            "runs": runs,
            "metrics": self._metric_rows(),
            "same": _same(configs.values(), varying),
            "deliveries": [
                {"adapter": each.name, "journal": each.journal, "time": each.time, **fields(each.body)}
                for each in catalogue.statuses_of(record.id)
                if each.kind == "delivery"
            ],
            "alerts": [
                {**each._asdict(), "run": public[each.run], "text": each.text[:_MAX_ALERT_CHARS]} for each in alerts
            ],
        }

    def _arm_rows(self, baseline: _Arm | None) -> list[Json]:
        winner = self._winner()
        references = {each.name: self._spread(baseline, each.name) for each in self._headlines} if baseline else {}
        rows: list[Json] = []
        for arm in self._arms:
            compared = self._compared(arm)
            values: list[Json] = []
            for headline in self._headlines:
                spread = self._spread(arm, headline.name)
                points = [_finite(self._value(run, headline.name)) if run in compared else None for run in arm.runs]
                reference = None if arm is baseline else references.get(headline.name)
                values.append({**_spread_json(spread), **_delta(spread, reference), "points": points})
            rows.append(
                {
                    "name": arm.name,
                    "state": arm.state,
                    "runs": [run.public for run in arm.runs],
                    "n": len(arm.runs),
                    "values": values,
                    "winner": arm.name == winner,
                }
            )
        return rows

    def _ordered_runs(self) -> list[RunRecord]:
        """Return the failed and stalled runs, then the others by arm and seed."""
        runs = [run for arm in self._arms for run in arm.runs]
        return sorted(runs, key=lambda run: min(_STATE_ORDER.index(self._states[run.id]), 2))

    def _run_row(self, run: RunRecord, config: RunFields, varying: Sequence[str]) -> Json:
        error = run.error if run.error is not None or self._states[run.id] != "stopped" else run.stop_reason
        return {
            "id": run.public,
            "name": run.key,
            "arm": arm_of(run),
            "seed": run.seed,
            "rank": run.rank,
            "state": self._states[run.id],
            "error": error,
            "step": run.step,
            "num_steps": run.num_steps,
            "unit": run.unit,
            "started": run.started,
            "ended": run.ended,
            "last_event": run.last,
            "values": [_finite(self._value(run, each.name)) for each in self._headlines],
            "checkpoints": run.checkpoints,
            "config": {key: config.config[key] for key in varying if key in config.config},
        }

    def _metric_rows(self) -> list[Json]:
        """Return the metrics in the order to draw: headlines, then by how far arms are apart, constants last."""
        by_name: dict[str, list[SeriesInfo]] = {}
        for run in self._runs:
            for name, info in self._series[run.id].items():
                by_name.setdefault(name, []).append(info)
        directions: dict[str, Direction | None] = {each.name: each.direction for each in self._headlines}
        places = {each.name: place for place, each in enumerate(self._headlines)}
        rows: list[tuple[Any, Json]] = []
        for name, infos in by_name.items():
            constant = _constant(infos)
            row = {
                "name": name,
                "runs": len(infos),
                "points": sum(info.n + info.bad for info in infos),
                "constant": constant,
                "section": name.partition("/")[0] if "/" in name else "",
                "direction": directions[name] if name in directions else direction_of(name),
            }
            place = places.get(name, _MAX_HEADLINES)
            order = (
                *(constant is not None and name not in places, place, name.startswith(_NOT_COMPARED)),
                *(not is_goal(name), -self._separation(name), natural_order(name)),
            )
            rows.append((order, row))
        return [row for _, row in sorted(rows, key=lambda each: each[0])]

    def _separation(self, name: str) -> int:
        """Return how far the arms are apart in a metric, compared with the spread within them, in powers of ten.

        Rounded, so that the order does not change with each step of a run in progress.
        """
        means: list[float] = []
        variances: list[float] = []
        for runs in self._compared_runs:
            values = [value for run in runs if (value := _finite(self._value(run, name))) is not None]
            if values:
                mean, variance = _mean_and_variance(values)
                means.append(mean)
                variances += [] if variance is None else [variance]
        between = 0.0 if len(means) < 2 else math.sqrt(_mean_and_variance(means)[1] or 0.0)  # noqa: PLR2004 # one arm
        if not between:
            return -9
        scale = math.sqrt(sum(variances) / len(variances)) if variances else 0.0
        scale = scale or max(map(abs, means))
        ratio = between / scale if scale else between
        return round(math.log10(min(max(ratio, 1e-9), 1e9))) if math.isfinite(ratio) else 9


def _by_name(infos: Iterable[SeriesInfo]) -> dict[str, SeriesInfo]:
    """Return the series of a run by name, of several ranks that of the lowest; those without points are left out."""
    found: dict[str, SeriesInfo] = {}
    for info in sorted(infos, key=lambda each: each.rank):
        if info.last_step is not None:
            found.setdefault(info.name, info)
    return found


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the sample variance of several values.

    Thousands of metrics are put in order several times a second, for which `spread_of` is too exact.
    """
    mean = sum(values) / len(values)
    rest = len(values) - 1
    return mean, sum((value - mean) * (value - mean) for value in values) / rest if rest else None


def _stage(run: RunRecord) -> str | None:
    """Return the stage of a run in a continual experiment; a mere parameter of that name differs from its group."""
    stage = run.config.get("stage")
    return stage if isinstance(stage, str) and stage == run.group else None


def _seed_key(run: RunRecord) -> tuple[float, int]:
    return (math.inf if run.seed is None else run.seed, run.id)


def _arm_state(states: Sequence[str]) -> str:
    order = ("running", "failed", "stalled", "cancelled", "pending", "stopped", "completed")
    return next((each for each in order if each in states), "pending")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: float | None) -> float | None:
    return None if value is None else finite(value)


def _recorded(run: RunRecord) -> RecordedRun:
    return RecordedRun(id=run.key, directory=Path(), folder=Path(), config=run.config)


def _spread_json(spread: Spread) -> Json:
    return {"mean": spread.mean, "sd": spread.sd, "n": spread.n, "nonfinite": spread.nonfinite}


def _delta(spread: Spread, reference: Spread | None) -> Json:
    """Return the difference to the baseline, and its standard error if both arms have several seeds."""
    if reference is None or spread.mean is None or reference.mean is None:
        return {"delta": None, "delta_sd": None}
    error = None
    if spread.sd is not None and reference.sd is not None:
        error = math.hypot(spread.sd / math.sqrt(spread.n), reference.sd / math.sqrt(reference.n))
    return {"delta": spread.mean - reference.mean, "delta_sd": error}


def _constant(infos: Sequence[SeriesInfo]) -> float | None:
    """Return the value of a metric that has one in all steps of all runs; None if it has several, or only one point."""
    values = {info.min for info in infos} | {info.max for info in infos}
    is_repeated = any(info.n > 1 for info in infos)
    if len(values) != 1 or not is_repeated or any(info.bad for info in infos):
        return None
    return values.pop()


def _same(runs: Iterable[RunFields], varying: Sequence[str]) -> Json:
    """Return the short values of the config that are the same in all runs."""
    first = next(iter(runs), None)
    config = {} if first is None else first.config
    return {
        key: value
        for key, value in config.items()
        if key not in varying and len(msgspec.json.encode(value)) <= _MAX_SAME_CHARS
    }
