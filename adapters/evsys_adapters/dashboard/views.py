"""What the pages beside home and experiment show, as JSON: the list of runs, one run, several compared."""

import time as clock
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_adapters.common.hook_arguments import fields
from evsys_adapters.dashboard import pages
from evsys_adapters.dashboard.contents import latest_contents
from evsys_adapters.dashboard.delivery_views import journal_of_run
from evsys_adapters.dashboard.error_texts import MAX_TEXT, last_line, shorten
from evsys_adapters.dashboard.evals import EvalRow
from evsys_adapters.dashboard.open_series import SeriesInfo
from evsys_adapters.dashboard.pages import Direction, Json, direction_of
from evsys_adapters.dashboard.records import ExperimentRecord, RunRecord, arm_of, run_seconds, run_state
from evsys_adapters.dashboard.store import Store
from evsys_adapters.dashboard.values import finite, numbers_below
from evsys_bus.filters import parse_filter
from evsys_bus.reading import RecordedRun
from evsys_bus.reading.fields import BEST, RunFields, differing_keys, is_goal

MAX_COMPARED: Final = 24
_SHOWN_METRICS: Final = 3
_MAX_METRICS: Final = 40
"""Columns of metrics in the list of runs."""
_MAX_LINE: Final = 300
_MAX_EVALS: Final = 300
_MAX_CONTENTS: Final = 300
_MAX_READ_POINTS: Final = 200_000
_LOOK_BACK: Final = 4_096
"""Of a long series, how many steps before a step its last value may lie at least."""
_UPLOAD_EVENTS: Final = {
    "upload_progress": "uploading",
    "checkpoint_uploaded": "uploaded",
    "checkpoint_conflict": "conflict",
    "checkpoint_pruned": "removed",
}
_MAX_UPLOAD_EVENTS: Final = 2_000
NO_UPLOAD: Final[Mapping[str, None]] = {"upload": None, "url": None, "bytes": None}
"""What is known of the upload of a checkpoint that no courier has reported."""
_TRAIN: Final = "train/"
_SYNONYMS: Final = {"name": "run", "id": "run", "status": "state", "tag": "tags", "step": "steps"}


class NotFoundError(LookupError):
    """What a view is to show is not in the database, or in the trash."""


class RunValues:
    """The metrics of a run: of several ranks that of the lowest, results after training, and numbers of the summary."""

    def __init__(self, run: RunRecord, infos: Iterable[SeriesInfo]) -> None:
        self._run: Final = run
        self.series: Final[dict[str, SeriesInfo]] = {}
        for info in sorted(infos, key=lambda each: each.rank):
            if info.last_step is not None:
                self.series.setdefault(info.name, info)

    def last(self, name: str) -> float | None:
        """Return the result after training, else the last value; None if there is none."""
        for each in (name, f"{_TRAIN}{name}"):
            if each in self._run.finals:
                return self._run.finals[each]
            if each in self.series:
                return self.series[each].last
        value = self._run.summary.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def best(self, name: str, direction: Direction | None) -> float | None:
        """Return the best value; None if it is not known which ones are better."""
        if direction is None:
            return None
        info = self.series.get(name) or self.series.get(f"{_TRAIN}{name}")
        values = [] if info is None else [info.min if direction == "min" else info.max]
        values += [self._run.finals[each] for each in (name, f"{_TRAIN}{name}") if each in self._run.finals]
        found = [value for each in values if (value := _finite(each)) is not None]
        return (min if direction == "min" else max)(found, default=None)

    @property
    def names(self) -> list[str]:
        """The names of its series, and of its results after training."""
        return list(dict.fromkeys([*self.series, *self._run.finals]))


class _FilteredRun:
    """A run as filters see it: its own facts, config keys and metrics."""

    def __init__(self, run: RunRecord, experiment: str, values: RunValues, now: float) -> None:
        self._run: Final = run
        self._experiment: Final = experiment
        self._values: Final = values
        self._now: Final = now
        self.config: Final = RunFields(_recorded(run))

    @property
    def texts(self) -> Collection[str]:
        """The texts that words and regular expressions are searched in."""
        run = self._run
        found = (run.key, run.public, arm_of(run), self._experiment, run.group, run.notes, *run.tags)
        return [each for each in found if each]

    def field(self, name: str) -> object:
        """Return a fact of the run, a value of its config, or a metric's last or best value."""
        run, now = self._run, self._now
        facts: dict[str, Any] = {
            "run": run.key,
            "state": run_state(run, now),
            "experiment": self._experiment,
            "arm": arm_of(run),
            "seed": run.seed,
            "group": run.group,
            "tags": run.tags,
            "notes": run.notes,
            "started": run.started,
            "age": None if run.started is None else max(0.0, now - run.started),
            "duration": run_seconds(run, now),
            "steps": None if run.step is None else run.step + 1,
            "checkpoints": run.checkpoints,
            "error": run.error,
            "folder": run.path,
        }
        own = _SYNONYMS.get(name, name)
        if own in facts:
            return facts[own]
        key = self.config.config_key(name)
        if key is not None:
            return self.config.config[key]
        if name.startswith(BEST):
            metric = name.removeprefix(BEST)
            return self._values.best(metric, direction_of(metric))
        return self._values.last(name)


def runs(
    store: Store,
    public_id: str,
    text: str = "",
    metrics: Sequence[str] = (),
    now: float | None = None,
    at: Sequence[tuple[int, str]] = (),
) -> Json:
    """Return the runs of an experiment that match a filter.

    Args:
        store: The store.
        public_id: The experiment.
        text: See `evsys_bus.filters`; if it cannot be parsed, ``problem`` has why, and all runs are returned.
        metrics: Those whose values are returned; by default the first three.
        now: The time by which runs count as stalled.
        at: Steps and metrics whose values at that step, or the last ones before it, are returned of runs that have come
            so far.

    Raises:
        NotFoundError: There is no such experiment.
    """
    now = clock.time() if now is None else now
    record = find_experiment(store, public_id)
    page = pages.experiment(store, public_id, now)
    assert page is not None
    directions: dict[str, Direction | None] = {each["name"]: each["direction"] for each in page["headlines"]}
    constants = {each["name"] for each in page["metrics"] if each["constant"] is not None}
    for each in page["metrics"]:
        directions.setdefault(each["name"], each["direction"])
    asked = [name for name in metrics if name in directions][:_MAX_METRICS]
    shown = asked or [name for name in directions if name not in constants][:_SHOWN_METRICS]
    problem, matches = None, None
    try:
        matches = parse_filter(text).matches if text.strip() else None
    except ValueError as error:
        problem = str(error)
    records = {run.public: run for run in store.catalogue.records.runs(record.id)}
    rows: list[Json] = []
    for row in page["runs"]:
        run = records[row["id"]]
        values = RunValues(run, store.series.names(run.id))
        if matches is not None and not matches(_FilteredRun(run, record.name, values, now)):
            continue
        rows.append(
            {
                **{key: value for key, value in row.items() if key not in {"values", "error", "config"}},
                "arm": shown_arm(run),
                "config": _short(row["config"]),
                "error": last_line(row["error"]),
                "seconds": run_seconds(run, now),
                "last": [_finite(values.last(name)) for name in shown],
                "best": [_finite(values.best(name, directions[name])) for name in shown],
                "at": [_value_at(store, values, run, step, name) for step, name in at[:_MAX_METRICS]],
            }
        )
    varying = list(dict.fromkeys(key for row in page["runs"] for key in row["config"]))
    return {
        "id": record.public,
        "name": record.name,
        "state": page["state"],
        "now": now,
        "total": len(page["runs"]),
        "problem": problem,
        "config": varying,
        "metrics": [*directions],
        "shown": [{"name": name, "direction": directions[name]} for name in shown],
        "at": [{"step": step, "name": name} for step, name in at[:_MAX_METRICS]],
        "arms": shown_arms(record, records.values()),
        "rows": rows,
    }


def _value_at(store: Store, values: RunValues, run: RunRecord, step: int, name: str) -> float | None:
    has_come_so_far = run.step is not None and run.step >= step
    return values_at(store, values.series.get(name), [step])[0] if has_come_so_far else None


def run(store: Store, public_id: str, now: float | None = None) -> Json:
    """Return one run with all it has but its points and predictions.

    Raises:
        NotFoundError: There is no such run.
    """
    now = clock.time() if now is None else now
    catalogue = store.catalogue
    record = find_run(store, public_id)
    experiment = catalogue.records.experiment(record.experiment)
    assert experiment is not None
    values = RunValues(record, store.series.names(record.id))
    evals = catalogue.evals.of_run(record.id)
    runs = catalogue.records.runs(experiment.id)
    uploads = uploads_of(store, [record])
    return {
        **_run_head(record, experiment, now),
        "arms": shown_arms(experiment, runs),
        "rank": record.rank,
        "group": record.group,
        "stop_reason": record.stop_reason,
        "path": record.path,
        "tags": record.tags,
        "notes": record.notes,
        "now": now,
        "error": None if record.error is None else shorten(record.error),
        "config": _short(RunFields(_recorded(record)).config),
        "environment": _short(record.environment),
        "summary": _short(record.summary),
        "extras": _short({key: value for key, value in record.extras.items() if key not in {"tags", "notes", "unit"}}),
        "metrics": _metric_rows(values),
        "evals": [_eval_row(each) for each in reversed(evals[-_MAX_EVALS:])],
        "eval_count": len(evals),
        "checkpoints": [
            {**each, **uploads.get((record.key, each["name"]), NO_UPLOAD)}
            for each in catalogue.details.checkpoints(record.id)
        ],
        "alerts": [
            {"title": each.title, "text": each.text[:MAX_TEXT], "level": each.level, "time": each.time}
            for each in catalogue.details.alerts([record.id])
        ],
        "texts": [
            {"name": name, "step": step, "text": text[:MAX_TEXT]}
            for name, (step, text) in catalogue.details.texts(record.id).items()
        ],
        "contents": [
            {key: each.get(key) for key in ("name", "kind", "step", "time", "path", "size", "caption", "media_type")}
            for each in catalogue.details.contents(record.id, _MAX_CONTENTS)
        ],
        "shown_contents": latest_contents(catalogue.details, record.id),
        "events": catalogue.details.event_counts(record.id),
        **journal_of_run(store, record, experiment, now),
    }


def run_record_and_head(store: Store, public_id: str, now: float | None = None) -> tuple[RunRecord, Json]:
    """Return the record of a run, and what each page of it shows first.

    Raises:
        NotFoundError: There is no such run.
    """
    record = find_run(store, public_id)
    experiment = store.catalogue.records.experiment(record.experiment)
    assert experiment is not None
    return record, _run_head(record, experiment, clock.time() if now is None else now)


def compare(store: Store, public_ids: Sequence[str], now: float | None = None) -> Json:
    """Return several runs side by side: what differs in their configs, and their metrics.

    Unknown runs are named in ``unknown``.
    """
    now = clock.time() if now is None else now
    found: list[tuple[RunRecord, ExperimentRecord]] = []
    unknown: list[str] = []
    for public_id in dict.fromkeys(public_ids[:MAX_COMPARED]):
        try:
            record = find_run(store, public_id)
        except NotFoundError:
            unknown.append(public_id[:_MAX_LINE])
            continue
        experiment = store.catalogue.records.experiment(record.experiment)
        assert experiment is not None
        found.append((record, experiment))
    configs = [RunFields(_recorded(record)).config for record, _ in found]
    differing = differing_keys([RunFields(_recorded(record)) for record, _ in found]) if found else []
    values = [RunValues(record, store.series.names(record.id)) for record, _ in found]
    names = list(dict.fromkeys(name for each in values for name in each.names))
    metrics: list[Json] = [
        {
            **_metric_row(name, [each.series[name] for each in values if name in each.series]),
            "runs": sum(name in each.names for each in values),
            "last": [_finite(each.last(name)) for each in values],
            "best": [_finite(each.best(name, direction_of(name))) for each in values],
        }
        for name in names
    ]
    deciding = {each for _, experiment in found if (each := experiment.success_metric)}
    metrics.sort(key=lambda row: _compared_order(row, deciding))
    return {
        "now": now,
        "unknown": unknown,
        "runs": [_run_head(record, experiment, now) for record, experiment in found],
        "arms": _common_arms(store, [experiment for _, experiment in found]),
        "config": [{"key": key, "values": [_short_value(config.get(key)) for config in configs]} for key in differing],
        "same": len({key for config in configs for key in config} - {*differing}),
        "metrics": metrics,
    }


def _common_arms(store: Store, experiments: Sequence[ExperimentRecord]) -> list[str]:
    """Return the arms of the experiment if it is the only one, for their colours."""
    if len({each.id for each in experiments}) != 1:
        return []
    return shown_arms(experiments[0], store.catalogue.records.runs(experiments[0].id))


def find_experiment(store: Store, public_id: str) -> ExperimentRecord:
    """Return an experiment that is not in the trash. Raises NotFoundError if there is none of this id."""
    id_ = store.catalogue.experiment_id(public_id)
    record = None if id_ is None else store.catalogue.records.experiment(id_)
    if record is None or record.hidden is not None:
        raise NotFoundError(public_id)
    return record


def find_run(store: Store, public_id: str) -> RunRecord:
    """Return a run that is not in the trash. Raises NotFoundError if there is none of this id."""
    id_ = store.catalogue.run_id(public_id)
    record = None if id_ is None else store.catalogue.records.run(id_)
    if record is None or record.hidden is not None:
        raise NotFoundError(public_id)
    return record


def _recorded(run: RunRecord) -> RecordedRun:
    return RecordedRun(id=run.key, directory=Path(), folder=Path(run.path or ""), config=run.config)


def _run_head(run: RunRecord, experiment: ExperimentRecord, now: float) -> Json:
    return {
        "id": run.public,
        "name": run.key,
        "experiment": {"id": experiment.public, "name": experiment.name},
        "arm": shown_arm(run),
        "seed": run.seed,
        "state": run_state(run, now),
        "error": last_line(run.error),
        "step": run.step,
        "num_steps": run.num_steps,
        "unit": run.unit,
        "started": run.started,
        "ended": run.ended,
        "last_event": run.last,
        "seconds": run_seconds(run, now),
    }


def uploads_of(store: Store, runs: Sequence[RunRecord]) -> dict[tuple[str, str], Json]:
    """Return what couriers have reported last about the upload of each checkpoint, by names of run and checkpoint.

    An event that names a run only by its key counts if no other run has that key.
    """
    records = store.catalogue.records
    found: dict[tuple[str, str], Json] = {}
    times: dict[tuple[str, str], float] = {}
    details = store.catalogue.details
    is_only: dict[str, bool] = {}
    for owner, key in [(0, None), *((run.id, run.key) for run in runs)]:
        for tag in details.event_counts(owner):
            state = _UPLOAD_EVENTS.get(tag.rpartition(".")[2])
            for event in [] if state is None else details.kept_events(owner, tag, _MAX_UPLOAD_EVENTS):
                about = fields(event["fields"])
                name = (key or str(about.get("run")), str(about.get("checkpoint")))
                if key is None and name[0] not in is_only:
                    is_only[name[0]] = len(records.ids_of_key(name[0])) == 1
                if key is None and not is_only[name[0]]:
                    continue
                if name not in found or times[name] < event["time"]:
                    size = about.get("bytes") or about.get("total_bytes")
                    found[name] = {"upload": state, "url": about.get("url"), "bytes": size}
                    times[name] = event["time"]
    return found


def shown_arm(run: RunRecord) -> str:
    """Return the name of a run's arm, as short as pages need it."""
    return arm_of(run)[:_MAX_LINE]


def shown_arms(experiment: ExperimentRecord, runs: Iterable[RunRecord]) -> list[str]:
    """Return the arms of an experiment, planned ones first."""
    planned = [name[:_MAX_LINE] for name in experiment.planned_arms]
    return list(dict.fromkeys([*planned, *map(shown_arm, runs)]))


def values_at(store: Store, info: SeriesInfo | None, steps: Sequence[int]) -> list[float | None]:
    """Return the last value of a series up to each step; None where there is none."""
    import numpy as np

    if info is None or not steps:
        return [None] * len(steps)
    # The steps of a long series are read one by one, with as many before each as its points may be apart.
    look_back = max(_LOOK_BACK, _LOOK_BACK * ((info.last_step or 0) + 1) // max(1, 64 * info.n))
    if info.n <= min(_MAX_READ_POINTS, _LOOK_BACK * len(steps)):
        lines = [store.series.read([info.id], width=1).lines[0]] * len(steps)
    else:
        lines = [store.series.read([info.id], first=step - look_back, last=step, width=1).lines[0] for step in steps]
    values: list[float | None] = []
    for line, step in zip(lines, steps, strict=True):
        place = int(np.searchsorted(line.x, step, side="right")) - 1
        values.append(None if place < 0 else finite(float(line.last[place])))
    return values


def _metric_rows(values: RunValues) -> list[Json]:
    """Return the metrics of one run: training and evals, then what describes the machine, constants last."""
    rows = [_metric_row(name, [info]) for name, info in values.series.items()]
    for row in rows:
        info = values.series[row["name"]]
        row.update(last=_finite(values.last(info.name)), min=info.min, max=info.max, last_step=info.last_step)
    rows.sort(key=lambda row: (row["constant"] is not None, row["section"] in {"system", "epoch"}))
    return rows


def _metric_row(name: str, infos: Sequence[SeriesInfo]) -> Json:
    first = infos[0] if infos else None
    is_constant = first is not None and all(info.constant and info.n > 1 and info.min == first.min for info in infos)
    return {
        "name": name,
        "runs": len(infos),
        "points": sum(info.n + info.bad for info in infos),
        "constant": first.min if first is not None and is_constant else None,
        "section": name.partition("/")[0] if "/" in name else "",
        "direction": direction_of(name),
    }


def _compared_order(row: Json, deciding: Collection[str]) -> tuple[object, ...]:
    """Order metrics: those that decide first, then scores, then those that all runs have, constants last."""
    name, is_apart = row["name"], row["section"] in {"system", "epoch"}
    decides = name in deciding or name.removeprefix(_TRAIN) in deciding
    is_better_known = row["direction"] is not None
    return (
        *(not decides, row["constant"] is not None, is_apart, not is_goal(name)),
        *(-row["runs"], not is_better_known, pages.natural_order(name)),
    )


def _eval_row(row: EvalRow) -> Json:
    numbers = numbers_below(row.name, fields(row.body.get("metrics")))
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "step": row.step,
        "time": row.time,
        "predictions": row.predictions,
        "seconds": row.body.get("eval_seconds"),
        "values": {name: finite(value) for name, value in [*numbers.items()][:_MAX_METRICS]},
    }


def _short(values: Mapping[str, Any]) -> Json:
    return {key: _short_value(value) for key, value in values.items()}


def _short_value(value: Any) -> Any:
    """Return a value as it is, or the beginning of a long one as text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return value if len(text) <= _MAX_LINE * 4 else f"{text[: _MAX_LINE * 4]}…"


def _finite(value: float | None) -> float | None:
    return None if value is None else finite(value)
