"""What the pages beside home and experiment show, as JSON: the list of runs, one run, several compared, deliveries."""

import contextlib
import time as clock
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_adapters.common.hook_arguments import fields, list_or_empty
from evsys_adapters.dashboard import pages
from evsys_adapters.dashboard.details import JournalStatus
from evsys_adapters.dashboard.evals import EvalRow
from evsys_adapters.dashboard.pages import Direction, Json, direction_of
from evsys_adapters.dashboard.records import ExperimentRecord, RunRecord, arm_of, run_state
from evsys_adapters.dashboard.series import SeriesInfo
from evsys_adapters.dashboard.store import Store
from evsys_adapters.dashboard.values import finite, numbers_below
from evsys_bus.filters import parse_filter
from evsys_bus.reading import JOURNAL, RecordedRun
from evsys_bus.reading.fields import BEST, RunFields, differing_keys
from evsys_bus.tasks import DeliveryStatus

MAX_COMPARED: Final = 24
_SHOWN_METRICS: Final = 3
_MAX_METRICS: Final = 40
"""Columns of metrics in the list of runs."""
_MAX_TEXT: Final = 20_000
_MAX_LINE: Final = 300
_MAX_EVALS: Final = 300
_MAX_CONTENTS: Final = 300
_MAX_STATUSES: Final = 2_000
_TRAIN: Final = "train/"
_ENDED: Final = frozenset({"completed", "failed", "cancelled", "stopped"})
_SYNONYMS: Final = {"name": "run", "id": "run", "status": "state", "tag": "tags", "step": "steps"}


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
        info = self.series.get(name) or self.series.get(f"{_TRAIN}{name}")
        if info is None or direction is None:
            return None
        return info.min if direction == "min" else info.max


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
            "duration": _seconds(run, now),
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


def runs(store: Store, public_id: str, text: str = "", metrics: Sequence[str] = (), now: float | None = None) -> Json:
    """Return the runs of an experiment that match a filter.

    Args:
        store: The store.
        public_id: The experiment.
        text: See `evsys_bus.filters`; if it cannot be parsed, ``problem`` has why, and all runs are returned.
        metrics: Those whose values are returned; by default the first three.
        now: The time by which runs count as stalled.

    Raises:
        LookupError: There is no such experiment.
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
                "error": _last_line(row["error"]),
                "seconds": _seconds(run, now),
                "last": [_finite(values.last(name)) for name in shown],
                "best": [_finite(values.best(name, directions[name])) for name in shown],
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
        "arms": shown_arms(record, records.values()),
        "rows": rows,
    }


def run(store: Store, public_id: str, now: float | None = None) -> Json:
    """Return one run with all it has but its points and predictions.

    Raises:
        LookupError: There is no such run.
    """
    now = clock.time() if now is None else now
    catalogue = store.catalogue
    record = _run(store, public_id)
    experiment = catalogue.records.experiment(record.experiment)
    assert experiment is not None
    values = RunValues(record, store.series.names(record.id))
    evals = catalogue.evals.of_run(record.id)
    contents = catalogue.details.contents(record.id)
    journal = _journal_of(record.path)
    statuses = catalogue.details.statuses([] if journal is None else [journal])
    return {
        **_run_head(record, experiment, now),
        "arms": shown_arms(experiment, catalogue.records.runs(experiment.id)),
        "rank": record.rank,
        "group": record.group,
        "stop_reason": record.stop_reason,
        "path": record.path,
        "tags": record.tags,
        "notes": record.notes,
        "now": now,
        "error": None if record.error is None else _cut(record.error),
        "config": _short(RunFields(_recorded(record)).config),
        "environment": _short(record.environment),
        "summary": _short(record.summary),
        "extras": _short({key: value for key, value in record.extras.items() if key not in {"tags", "notes", "unit"}}),
        "metrics": _metric_rows(values),
        "evals": [_eval_row(each) for each in reversed(evals[-_MAX_EVALS:])],
        "eval_count": len(evals),
        "checkpoints": catalogue.details.checkpoints(record.id),
        "alerts": [
            {"title": each.title, "text": each.text[:_MAX_TEXT], "level": each.level, "time": each.time}
            for each in catalogue.details.alerts([record.id])
        ],
        "texts": [
            {"name": name, "step": step, "text": text[:_MAX_TEXT]}
            for name, (step, text) in catalogue.details.texts(record.id).items()
        ],
        "contents": [
            {key: each.get(key) for key in ("name", "kind", "step", "time", "path", "size", "caption", "media_type")}
            for each in contents[-_MAX_CONTENTS:]
        ],
        "events": catalogue.details.event_counts(record.id),
        **_journal_rows(statuses, record, now),
    }


def compare(store: Store, public_ids: Sequence[str], now: float | None = None) -> Json:
    """Return several runs side by side: what differs in their configs, and their metrics.

    Unknown runs are named in ``unknown``.
    """
    now = clock.time() if now is None else now
    found: list[tuple[RunRecord, ExperimentRecord]] = []
    unknown: list[str] = []
    for public_id in dict.fromkeys(public_ids[:MAX_COMPARED]):
        try:
            record = _run(store, public_id)
        except LookupError:
            unknown.append(public_id[:_MAX_LINE])
            continue
        experiment = store.catalogue.records.experiment(record.experiment)
        assert experiment is not None
        found.append((record, experiment))
    configs = [RunFields(_recorded(record)).config for record, _ in found]
    differing = differing_keys([RunFields(_recorded(record)) for record, _ in found]) if found else []
    values = [RunValues(record, store.series.names(record.id)) for record, _ in found]
    names = list(dict.fromkeys(name for each in values for name in each.series))
    metrics: list[Json] = [
        {
            **_metric_row(name, [each.series[name] for each in values if name in each.series]),
            "last": [_finite(each.last(name)) for each in values],
            "best": [_finite(each.best(name, direction_of(name))) for each in values],
        }
        for name in names
    ]
    metrics.sort(key=_compared_order)
    return {
        "now": now,
        "unknown": unknown,
        "runs": [_run_head(record, experiment, now) for record, experiment in found],
        "config": [{"key": key, "values": [_short_value(config.get(key)) for config in configs]} for key in differing],
        "same": len({key for config in configs for key in config} - {*differing}),
        "metrics": metrics,
    }


def health(store: Store, now: float | None = None) -> Json:
    """Return how far the deliveries of all journals are, those with errors first, and the figures of the database."""
    now = clock.time() if now is None else now
    records = store.catalogue.records
    rows = store.database.query(
        "SELECT journal, kind, name, time, body FROM journal_status ORDER BY time DESC LIMIT ?", _MAX_STATUSES
    )
    by_journal: dict[str, list[JournalStatus]] = {}
    for journal, kind, name, time, body in rows:
        by_journal.setdefault(journal, []).append(JournalStatus(journal, kind, name, time, msgspec.json.decode(body)))
    journals: list[Json] = []
    for journal, statuses in by_journal.items():
        folder = journal.rstrip("/").rpartition("/")[0]
        run_id = records.find("run path", folder)
        record = None if run_id is None else records.run(run_id)
        experiment_id = records.find("experiment path", folder) if record is None else record.experiment
        experiment = None if experiment_id is None else records.experiment(experiment_id)
        if any(each is not None and each.hidden is not None for each in (record, experiment)):
            continue
        journals.append(
            {
                "journal": journal,
                "run": None if record is None else {"id": record.public, "name": record.key},
                "experiment": None if experiment is None else {"id": experiment.public, "name": experiment.name},
                "state": None if record is None else run_state(record, now),
                "time": max(each.time for each in statuses),
                **_journal_rows(statuses, record, now),
            }
        )
    journals.sort(key=lambda each: (not any(row["last_error"] or row["dead"] for row in each["deliveries"]),))
    [(events, streams)] = store.database.query("SELECT CAST(COALESCE(SUM(seq), 0) AS BIGINT), COUNT(*) FROM stream")
    [(series,)] = store.database.query("SELECT COUNT(*) FROM series")
    return {
        "now": now,
        "store": store.id,
        "database": {
            "path": store.location,
            "bytes": store.database.size_bytes(),
            "events": events,
            "streams": streams,
            "series": series,
            "unreadable": store.catalogue.unreadable_events,
        },
        "journals": journals,
    }


def find_experiment(store: Store, public_id: str) -> ExperimentRecord:
    """Return an experiment that is not in the trash. Raises LookupError if there is none of this id."""
    id_ = store.catalogue.experiment_id(public_id)
    record = None if id_ is None else store.catalogue.records.experiment(id_)
    if record is None or record.hidden is not None:
        raise LookupError(public_id)
    return record


def _run(store: Store, public_id: str) -> RunRecord:
    id_ = store.catalogue.run_id(public_id)
    record = None if id_ is None else store.catalogue.records.run(id_)
    if record is None or record.hidden is not None:
        raise LookupError(public_id)
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
        "error": _last_line(run.error),
        "step": run.step,
        "num_steps": run.num_steps,
        "unit": run.unit,
        "started": run.started,
        "ended": run.ended,
        "last_event": run.last,
        "seconds": _seconds(run, now),
    }


def shown_arm(run: RunRecord) -> str:
    """Return the name of a run's arm, as short as pages need it."""
    return arm_of(run)[:_MAX_LINE]


def shown_arms(experiment: ExperimentRecord, runs: Iterable[RunRecord]) -> list[str]:
    """Return the arms of an experiment, planned ones first."""
    planned = [name[:_MAX_LINE] for name in experiment.planned_arms]
    return list(dict.fromkeys([*planned, *map(shown_arm, runs)]))


def _seconds(run: RunRecord, now: float) -> float | None:
    """Return how long a run took: until its end, its last event, or now."""
    if run.started is None:
        return None
    end = run.ended if run.ended is not None else now if run_state(run, now) == "running" else run.last
    return None if end is None else max(0.0, end - run.started)


def _metric_rows(values: RunValues) -> list[Json]:
    """Return the metrics of one run: training and evals, then what describes the machine, constants last."""
    rows = [_metric_row(name, [info]) for name, info in values.series.items()]
    for row in rows:
        info = values.series[row["name"]]
        row.update(last=_finite(values.last(info.name)), min=info.min, max=info.max, last_step=info.last_step)
    rows.sort(key=lambda row: (row["constant"] is not None, row["section"] in {"system", "epoch"}))
    return rows


def _metric_row(name: str, infos: Sequence[SeriesInfo]) -> Json:
    first = infos[0]
    is_constant = all(info.constant and info.n > 1 and info.min == first.min for info in infos)
    return {
        "name": name,
        "runs": len(infos),
        "points": sum(info.n + info.bad for info in infos),
        "constant": first.min if is_constant else None,
        "section": name.partition("/")[0] if "/" in name else "",
        "direction": direction_of(name),
    }


def _compared_order(row: Json) -> tuple[object, ...]:
    """Order metrics: those that all runs have and that decide first, constants last."""
    is_apart = row["section"] in {"system", "epoch"}
    return (row["constant"] is not None, -row["runs"], is_apart, row["direction"] is None, row["name"])


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


def _journal_of(path: str | None) -> str | None:
    return None if not path else f"{path.rstrip('/')}/{JOURNAL}"


def _journal_rows(statuses: Sequence[JournalStatus], run: RunRecord | None, now: float) -> Json:
    """Return the deliveries of a journal, the times of its hooks, and whether all of a finished run has arrived."""
    deliveries: list[Json] = []
    hooks: list[Json] = []
    for each in statuses:
        if each.kind == "delivery":
            deliveries.append(_delivery_row(each))
        else:
            found = map(fields, list_or_empty(each.body))
            hooks += [{"rank": each.name, **hook, "per_step": _per_step(hook, run)} for hook in found]
    hooks.sort(key=lambda each: -(each["per_step"] or 0.0))
    receipt = None
    if run is not None and run_state(run, now) in _ENDED and deliveries:
        receipt = {
            "complete": not any(each["pending"] or each["owed"] or each["dead"] for each in deliveries),
            **{name: sum(each[name] for each in deliveries) for name in ("recorded", "delivered", "dead", "pending")},
            "owed": sum(each["owed"] for each in deliveries),
        }
    return {"deliveries": deliveries, "hooks": hooks, "receipt": receipt}


def _delivery_row(status: JournalStatus) -> Json:
    """Return a `DeliveryStatus`, with what is to be shown of its errors."""
    body = {"name": status.name, **fields(status.body)}
    try:
        delivery = msgspec.convert(body, DeliveryStatus)
    except msgspec.ValidationError:  # of another version: what fits is shown
        delivery = DeliveryStatus(name=status.name)
        for name, value in body.items():
            with contextlib.suppress(msgspec.ValidationError):
                delivery = msgspec.convert({**msgspec.to_builtins(delivery), name: value}, DeliveryStatus)
    return {
        **msgspec.to_builtins(delivery),
        "adapter": status.name,
        "time": status.time,
        "last_error": delivery.last_error,
        "suggested_fix": delivery.suggested_fix,
    }


def _per_step(hook: Mapping[str, Any], run: RunRecord | None) -> float | None:
    """Return the seconds that a hook takes of each step of the run."""
    calls, mean = hook.get("calls"), hook.get("mean_seconds")
    if run is None or not run.step or not isinstance(calls, int) or not isinstance(mean, int | float):
        return None
    return calls * mean / (run.step + 1)


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


def _last_line(text: str | None) -> str | None:
    """Return of a traceback the line that names the error, of another text the first one."""
    if not text:
        return None
    lines = _cut(text).strip().splitlines() or [""]
    return (lines[-1] if _is_traceback(text) else lines[0])[:_MAX_LINE]


def _cut(text: str) -> str:
    """Return the end of a long traceback, the beginning of another long text."""
    return text[-_MAX_TEXT:] if _is_traceback(text) else text[:_MAX_TEXT]


def _is_traceback(text: str) -> bool:
    return text.startswith("Traceback")
