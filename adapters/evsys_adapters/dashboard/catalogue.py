"""Events become what the dashboard shows: experiments, runs, evals, checkpoints, contents, alerts, and points.

Events may come from other programs and versions, so the types of their fields are not trusted: what does not fit is
counted and left out. Records are written in the transaction of the events that change them.
"""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, ClassVar, Final, NamedTuple, cast

import msgspec

from evsys_adapters.common.hook_arguments import (
    field,
    fields,
    list_or_empty,
    run_context,
    run_id,
    run_key,
)
from evsys_adapters.common.logged_values import TRAIN, prefixed
from evsys_adapters.dashboard import details, evals, hosted_records, records
from evsys_adapters.dashboard.attempts import Attempts, end_run, end_training, is_earlier, is_replaced, reopen
from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.details import Details, JournalStatus, journal_in
from evsys_adapters.dashboard.evals import Evals
from evsys_adapters.dashboard.experiment_events import end_experiment, start_experiment
from evsys_adapters.dashboard.hosted_records import HostedRecords
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.records import Records, RunRecord, identity_of
from evsys_adapters.dashboard.series import SeriesStore
from evsys_adapters.dashboard.values import (
    MAX_NAME_CHARS,
    UNREADABLE,
    add_names,
    add_value,
    finite,
    is_step,
    json_fields,
    merge_config,
    numbers_below,
)
from evsys_bus.context import LogContext, LoopState
from evsys_bus.events import Envelope, Event, Metrics, StepEnd, UnknownEvent, event_tag

_MAX_NAMES: Final = 100_000
_MAX_RANK: Final = 1 << 31
_PACE_WEIGHT: Final = 0.1
_ALERT_LEVELS: Final = frozenset({"info", "warning", "error"})
_WAITING: Final = "of run "
"""Begins the type under which an event is kept whose run is not known yet; the run's key follows."""
_NO_PROGRESS: Final = frozenset({"system_metrics", "run.environment"})
"""Events that come from threads beside the training, so that it may have stalled nevertheless."""
_EPOCH: Final = "epoch"
_SYSTEM: Final = "system"


_STATUS_EVENTS: Final = {"run.delivery_changed": "delivery", "run.hook_times": "hooks"}


class RunRow(NamedTuple):
    """What charts need of a run."""

    id: int
    public: str
    experiment: int
    arm: str
    seed: int | None
    rank: int
    state: str


class Catalogue:
    """The experiments and runs of one database, and all that is known about them but their points.

    Args:
        database: Has `TABLES`.
        series: Receives the points.
    """

    TABLES: ClassVar[list[str]] = [*records.TABLES, *evals.TABLES, *details.TABLES, *hosted_records.TABLES]

    def __init__(self, database: Database, series: SeriesStore) -> None:
        self._series: Final = series
        self.records: Final = Records(database)
        self.evals: Final = Evals(database)
        self.details: Final = Details(database)
        self.hosted: Final = HostedRecords(database, self.records, self.evals, self.details)
        self.unreadable_events = 0
        """Number of events whose fields did not fit."""
        self.page_rows: Final[dict[int, Any]] = {}
        """What pages have computed of experiments, by their ids."""
        self._attempts: Final = Attempts()
        self._routes: Final[dict[tuple[str, str | None, object], int]] = {}
        """Runs by what their steps have: stream, key and directory."""
        self._names: Final[dict[str, str]] = {}
        """Names of series by the keys of rows."""
        self._handlers: Final[dict[str, Callable[[RunRecord, Mapping[str, Any], Envelope], int | None]]] = {
            "run_start": self._start_run,
            "train_start": self._start_training,
            "checkpoint": self._add_checkpoint,
            "eval": self._add_eval,
            "benchmark_eval": self._add_benchmark,
            "train_end": self._end_training,
            "run_end": self._end_run,
            "run.epoch_end": self._add_epoch,
            "run.rollout": self._add_rollouts,
            "run.environment": self._add_environment,
            "run.config_update": self._update_config,
            "run.summary": self._update_summary,
            "run.content": self._add_content,
            "run.alert": self._add_alert,
            "system_metrics": self._add_sample,
        }
        """By tag; each returns the number of points that it has added."""

    def apply(self, envelope: Envelope, changes: Changes) -> int:
        """Add an event; return the number of its points. It does not raise for unexpected content.

        Args:
            envelope: The event; those of a stream come in order.
            changes: Receives the ids of the changed runs and experiments.
        """
        event = envelope.event
        if not isfinite(envelope.time):  # of a foreign program; no column takes it
            envelope = msgspec.structs.replace(envelope, time=0.0)
        if abs(envelope.rank) > _MAX_RANK:
            self.unreadable_events += 1
            return 0
        try:
            if isinstance(event, StepEnd | Metrics):
                return self._add_step(envelope, event, changes)
            return self._add_other(envelope, changes)
        except UNREADABLE:
            self.unreadable_events += 1
            return 0

    def flush(self) -> None:
        """Write what has changed in memory; called once in each transaction."""
        self.records.flush()
        self.details.flush()
        self.records.limit_memory()
        if len(self._routes) > _MAX_NAMES:
            self._routes.clear()

    def run_id(self, public: str) -> int | None:
        """Return the id of a run from its public one, or None."""
        return self.records.find("run", public)

    def experiment_id(self, public: str) -> int | None:
        """Return the id of an experiment from its public one, or None."""
        return self.records.find("experiment", public)

    def runs_of(self, experiment: int, now: float | None = None) -> list[RunRow]:
        """Return the runs of an experiment that are not in the trash, in the order in which they came.

        Args:
            experiment: Its id.
            now: The time by which a run without events counts as stalled; None for that of its last event.
        """
        return [
            RunRow(
                *(each.id, each.public, each.experiment, records.arm_of(each), each.seed, each.rank),
                records.run_state(each, now),
            )
            for each in self.records.runs(experiment)
        ]

    def statuses_of(self, experiment: int) -> list[JournalStatus]:
        """Return what couriers have reported last about the journals of an experiment and of its runs."""
        record = self.records.experiment(experiment)
        folders = [] if record is None else [record.path, *(run.path for run in self.records.runs(experiment))]
        return self.details.statuses(list(dict.fromkeys([journal_in(folder) for folder in folders if folder])))

    def remove_runs(self, runs: Iterable[int]) -> None:
        """Remove runs with all they have; inside a transaction."""
        for run in runs:
            record = self.records.run(run)
            self.details.remove_statuses(record and record.path)
            self._series.remove(run)
            self.hosted.remove_run(run)
            self.evals.remove_run(run)
            self.details.remove_run(run)
            self.records.remove("run", [run])
        self._routes.clear()

    def remove_experiment(self, experiment: int) -> None:
        """Remove an experiment with its runs; inside a transaction."""
        self.remove_runs(self.records.run_ids(experiment))
        record = self.records.experiment(experiment)
        self.details.remove_statuses(record and record.path)
        self.details.remove_events(-experiment)
        self.hosted.remove_experiment(experiment)
        self.records.remove("experiment", [experiment])
        self.page_rows.pop(experiment, None)

    def evict(self, experiments: Iterable[int], runs: Iterable[int]) -> None:
        """Read again what another process has changed."""
        self.records.evict(experiments, runs)

    # -- steps

    def _add_step(self, envelope: Envelope, event: StepEnd | Metrics, changes: Changes) -> int:
        step, state = event.step_idx, event.state
        run = self._run_of(envelope, state, changes)
        if not is_step(step):
            self.unreadable_events += 1
            return 0
        limit = self._attempts.limit(run, envelope)
        if limit is not None and step >= limit:
            return 0
        numbers, texts = self._split(event.metrics)
        if numbers and not self._series.add_row(run.id, envelope.rank, step, envelope.time, numbers):
            self.unreadable_events += 1
            return 0
        self._add_progress(run, envelope.rank, envelope.time, step)
        for name, text in texts.items():
            self.details.set_text(run.id, name, step, text)
        self._set_num_steps(run, field(state, "num_steps"))
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        return len(numbers)

    def _add_progress(self, run: RunRecord, rank: int, time: float, step: int) -> None:
        last = run.last
        if last is not None and time > last and run.step is not None and step > run.step:
            gap = time - last
            run.pace = gap if run.pace is None else run.pace + _PACE_WEIGHT * (gap - run.pace)
        if run.step is None or step > run.step:
            run.step = step
        run.last = time if last is None else max(time, last)
        if rank < run.rank:
            run.rank = rank
            self.records.touch(run)
        self.records.touch_progress(run)

    def _split(self, metrics: object) -> tuple[dict[str, float], dict[str, str]]:
        """Return the numbers and the texts of a row of training, by the names of their series."""
        names = self._names
        numbers: dict[str, float] = {}
        texts: dict[str, str] = {}
        row = cast("dict[str, Any]", metrics) if isinstance(metrics, dict) else fields(metrics)
        for key, value in row.items():
            name = names.get(key)
            if name is None:
                if len(names) > _MAX_NAMES:
                    names.clear()
                name = names[key] = prefixed(TRAIN, str(key))[:MAX_NAME_CHARS]
            if type(value) is float:  # nearly all of them
                numbers[name] = value
            else:
                add_value(name, value, numbers, texts)
        return numbers, texts

    def _add_row(self, run: RunRecord, envelope: Envelope, step: object, values: Mapping[str, float]) -> int:
        """Add points that do not belong to a row of training."""
        if not values or not is_step(step):
            return 0
        return self._series.add_row(run.id, envelope.rank, step, None, values)

    # -- identity

    def _run_of(self, envelope: Envelope, handle: object, changes: Changes) -> RunRecord:
        """Return the run of an event; a new one if there is none.

        The first state of a stream has the whole context, if nothing before it had.
        """
        key = (envelope.stream, envelope.run, field(handle, "output_dir"))
        known = self._routes.get(key)
        run = None if known is None else self.records.run(known)
        if run is None and handle is None and envelope.run is not None:  # of an adapter, which names the run only
            run = self.records.find_in_stream(envelope.stream, envelope.run)
            run = run or self.records.find_by_key(envelope.run, envelope.stream, envelope.time)
        if run is None:
            run = self.records.find_run(identity_of(envelope, handle), envelope.time)
            if run.step is None and not run.has_start:
                run.rank = envelope.rank
            self._routes[key] = run.id
            self._add_context(run, run_context(handle), replace=False)
            self._add_waiting(run, envelope.stream, changes)
        return run

    def _add_waiting(self, run: RunRecord, stream: str, changes: Changes) -> None:
        """Add the events of adapters that named the run before its own events came in a stream of their journal."""
        for name in dict.fromkeys((self._waiting_name(run.key, stream), f"{_WAITING}{run.key}")):
            for time, event in self.details.take_events(0, name):
                tag, parts = str(event["type"]), event["fields"]
                if tag == "learnt":
                    self._annotate(parts, stream, time, changes)
                else:
                    self.details.keep_event(run.id, tag, parts, time)

    def _keep_waiting(self, key: str, stream: str, tag: str, parts: Mapping[str, Any], time: float) -> None:
        self.details.keep_event(0, self._waiting_name(key, stream), {"type": tag, "fields": parts}, time)

    def _waiting_name(self, key: str, stream: str) -> str:
        """Return the name under which events wait for a run of the journal that holds a stream."""
        journal = self.records.find("journal stream", stream)
        return f"{_WAITING}{key}" if journal is None else f"{_WAITING}{key} in journal {journal}"

    def _is_of_unknown_run(self, envelope: Envelope) -> bool:
        known = self._routes.get((envelope.stream, envelope.run, None))
        if known is not None:
            return False
        return self.records.find_by_key(str(envelope.run), envelope.stream, envelope.time) is None

    def _forget_routes(self, envelope: Envelope) -> None:
        """Have the run identified again: it starts, maybe with another UUID in the same directory."""
        for key in [key for key in self._routes if key[:2] == (envelope.stream, envelope.run)]:
            del self._routes[key]

    def _set_num_steps(self, run: RunRecord, num_steps: object) -> None:
        if run.num_steps != num_steps and is_step(num_steps) and num_steps > 0:
            run.num_steps = num_steps
            self.records.touch(run)

    # -- all other events

    def _add_other(self, envelope: Envelope, changes: Changes) -> int:
        tag, parts, handle = _parts(envelope.event)
        is_of_run = (
            envelope.run is not None
            or (handle is not None and run_key(handle) is not None)
            or field(handle, "step") is not None
        )
        if tag in {"experiment_start", "group_start", "experiment_end"}:
            self._add_to_experiment(tag, parts, envelope, changes)
        elif tag == "learnt":
            self._annotate(parts, envelope.stream, envelope.time, changes)
        elif tag in _STATUS_EVENTS:
            self._add_status(tag, parts, envelope.time, changes)
        elif handle is None and envelope.run is None:
            self.details.keep_event(0, tag, _without_handles(parts), envelope.time)
        elif handle is None and tag not in self._handlers and self._is_of_unknown_run(envelope):
            self._keep_waiting(str(envelope.run), envelope.stream, tag, _without_handles(parts), envelope.time)
        elif is_of_run or tag in self._handlers:
            return self._add_to_run(tag, parts, handle, envelope, changes)
        else:
            experiment = self.records.find_experiment(identity_of(envelope, handle), envelope.time)
            self.details.keep_event(-experiment.id, tag, _without_handles(parts), envelope.time)
            changes.experiments.add(experiment.id)
        return 0

    def _add_to_run(
        self, tag: str, parts: Mapping[str, Any], handle: object, envelope: Envelope, changes: Changes
    ) -> int:
        if tag == "run_start":
            self._forget_routes(envelope)
        run = self._run_of(envelope, handle, changes)
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        if tag not in _NO_PROGRESS:
            run.last = max(envelope.time, run.last or 0.0)
            self.records.touch_progress(run)
        limit = self._attempts.limit(run, envelope)
        self._add_context(run, run_context(handle), replace=tag == "run_start" and limit is None)
        if tag == "train_start":
            step = field(handle, "step")
            self._attempts.add(run, envelope, step if is_step(step) else 0)
            self.records.touch(run)
        if limit is not None and is_replaced(tag, parts, limit):
            return 0
        handler = self._handlers.get(tag)
        if handler is None:
            self.details.keep_event(run.id, tag, _without_handles(parts), envelope.time)
            self.records.count_change(run.experiment)
            return 0
        points = handler(run, parts, envelope) or 0
        if tag == "system_metrics":
            self.records.count_change(run.experiment)
        else:
            self.records.touch(run)
        return points

    def _add_context(self, run: RunRecord, ctx: object, *, replace: bool) -> None:
        """Add what a context has of its run; ``replace``: the run starts, maybe again with another config."""
        if ctx is None:
            return
        config = json_fields(field(ctx, "run_config"))
        extras = json_fields(field(ctx, "extras"))
        group = field(ctx, "group_name")
        if not (config or extras or group):
            return
        if config and (replace or not run.config):
            run.config = config
        if config:
            arm, seed = config.get("arm"), config.get("seed")
            run.arm = arm[:MAX_NAME_CHARS] if isinstance(arm, str) and arm else run.arm
            run.seed = seed if is_step(seed) else run.seed
        run.group = group if isinstance(group, str) and group else run.group
        if extras:
            run.extras = run.extras | extras
            run.tags = [str(each) for each in list_or_empty(extras.get("tags"))] or run.tags
            for name in ("notes", "unit"):
                text = extras.get(name)
                setattr(run, name, str(text) if text else getattr(run, name))
        self.records.touch(run)

    def _start_run(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        del parts
        reopen(run, envelope)
        run.has_start = True
        run.started = envelope.time if run.started is None else min(run.started, envelope.time)

    def _start_training(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        """Remove what an earlier training has from this step on: the one that starts makes it anew."""
        state, rank = parts["state"], envelope.rank
        reopen(run, envelope)
        self._set_num_steps(run, field(state, "num_steps"))
        step = field(state, "step")
        if not is_step(step):
            return
        self._series.cut(run.id, rank, step)
        if step <= 0:
            self._series.cut(run.id, rank, 0, epochs=True)
        self.evals.cut(run.id, rank, step)
        self.details.cut_contents(run.id, rank, step)
        if rank == run.rank:
            self.details.cut_texts(run.id, step)
        run.checkpoints = self.details.cut_checkpoints(run.id, rank, step)
        if rank == run.rank and run.step is not None:
            run.step = min(run.step, step - 1) if step > 0 else None

    def _add_checkpoint(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        row = parts["row"]
        batch, stopped = field(row, "batch"), field(row, "stopped")
        body = {each: field(row, each) for each in ("epoch", "state_path", "sampler_path", "stopped")}
        at = batch if is_step(batch) else 0
        name = str(field(row, "name"))
        run.checkpoints = self.details.add_checkpoint(run.id, envelope.rank, name, at, envelope.time, body)
        run.stop_reason = str(stopped) if stopped else run.stop_reason

    def _add_eval(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> int:
        name, step, metrics = str(parts["eval_name"]), parts["step_idx"], parts["metrics"]
        values = numbers_below(name, metrics)
        add_names(run.eval_names, values)
        at = step if is_step(step) else None
        body = {"metrics": fields(metrics)}
        self.evals.add(run.id, envelope.rank, "eval", name, at, envelope.time, body)
        return self._add_row(run, envelope, step, values)

    def _add_benchmark(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> int:
        result, step = parts["eval_result"], parts.get("step")
        name, metrics = str(field(result, "name")), field(result, "metrics")
        values = numbers_below(name, metrics)
        add_names(run.eval_names, values)
        at = step if is_step(step) else None
        if at is None:
            run.finals = run.finals | {each: finite(value) for each, value in values.items()}
        more = {each: field(result, each) for each in ("breakdowns", "tags", "eval_seconds") if field(result, each)}
        self.evals.add(
            *(run.id, envelope.rank, "benchmark", name, at, envelope.time, {"metrics": fields(metrics), **more}),
            list_or_empty(parts.get("predictions")),
            str(field(result, "benchmark_id") or ""),
        )
        return self._add_row(run, envelope, step, values)

    def _add_epoch(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> int:
        epoch = parts["epoch"]
        if not is_step(epoch):
            self.unreadable_events += 1
            return 0
        values: dict[str, float] = {}
        texts: dict[str, str] = {}
        add_value(_EPOCH, fields(parts["metrics"]), values, texts)
        if self._attempts.limit(run, envelope) is not None:  # a later attempt has made some epochs anew
            known = self._series.names_at(run.id, envelope.rank, epoch)
            values = {name: value for name, value in values.items() if name not in known}
        for name, text in texts.items():
            self.details.set_text(run.id, name, epoch, text)
        return self._add_row(run, envelope, epoch, values)

    def _add_sample(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> int:
        return self._add_row(run, envelope, parts.get("step"), numbers_below(_SYSTEM, parts["values"]))

    def _add_rollouts(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        items = list_or_empty(parts.get("rollout_items"))
        rollouts = list_or_empty(parts.get("rollouts"))
        paired = len(items) == len(rollouts)
        rows = [
            (cast("dict[str, Any]", each) if isinstance(each, dict) else {"output": each})
            | ({"item": items[n]} if paired else {})
            for n, each in enumerate(rollouts)
        ]
        step = parts["step_idx"]
        at = step if is_step(step) else None
        body = {} if paired else {"items": items}
        self.evals.add(run.id, envelope.rank, "rollout", "rollout", at, envelope.time, body, rows)

    def _add_environment(self, run: RunRecord, parts: Mapping[str, Any], _: Envelope) -> None:
        run.environment = json_fields(parts["facts"])

    def _update_config(self, run: RunRecord, parts: Mapping[str, Any], _: Envelope) -> None:
        run.config = merge_config(run.config, json_fields(parts["config"]))

    def _update_summary(self, run: RunRecord, parts: Mapping[str, Any], _: Envelope) -> None:
        values = json_fields(parts["values"])
        run.summary = run.summary | values
        run.result_names = [name for name in run.result_names if name not in values]

    def _add_content(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        item, step = parts["item"], parts.get("step_idx")
        plain: dict[str, Any] = msgspec.to_builtins(item) if isinstance(item, msgspec.Struct) else fields(item)
        at = step if is_step(step) else None
        self.details.add_content(run.id, envelope.rank, at, envelope.time, plain, run_id(parts.get("state")))

    def _add_alert(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        title, text, level = (str(parts.get(name) or "") for name in ("title", "text", "level"))
        level = level if level in _ALERT_LEVELS else "warning"
        self.details.add_alert(run.id, title, text, level, envelope.time)

    def _end_training(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        end_training(run, parts["state"], envelope)

    def _end_run(self, run: RunRecord, parts: Mapping[str, Any], envelope: Envelope) -> None:
        end_run(run, parts.get("run_result"), envelope)
        arm = parts.get("arm")
        values: dict[str, float] = {}
        for name, value in fields(field(arm, "eval_metrics")).items():
            add_value(str(name), value, values, {})
        run.finals = {name: finite(value) for name, value in values.items()} | run.finals
        name = field(arm, "name")
        if run.arm is None and isinstance(name, str) and name != run.key:
            run.arm = name[:MAX_NAME_CHARS]

    def _annotate(self, parts: Mapping[str, Any], stream: str, time: float, changes: Changes) -> None:
        key = str(parts.get("run"))
        run = self.records.find_by_key(key, stream, time)
        if run is None:
            self._keep_waiting(key, stream, "learnt", parts, time)
        else:
            run.extras = run.extras | json_fields(parts.get("extras"))
            self.records.touch(run)
            changes.runs.add(run.id)
            changes.experiments.add(run.experiment)

    def _add_status(self, tag: str, parts: Mapping[str, Any], time: float, changes: Changes) -> None:
        """Add what a courier reports of its journal: the status of a delivery, or how long hooks take."""
        journal, kind = str(parts["journal"]), _STATUS_EVENTS[tag]
        name, body = (parts["adapter"], parts["status"]) if kind == "delivery" else (parts["rank"], parts["hooks"])
        self.details.set_status(journal, kind, str(name), time, body)
        folder = journal.rstrip("/").rpartition("/")[0]
        run = self.records.find("run path", folder)
        record = None if run is None else self.records.run(run)
        experiment = self.records.find("experiment path", folder) if record is None else record.experiment
        if experiment is not None:
            self.records.count_change(experiment)
            changes.experiments.add(experiment)

    # -- experiments

    def _add_to_experiment(self, tag: str, parts: Mapping[str, Any], envelope: Envelope, changes: Changes) -> None:
        ctx = parts.get("ctx")
        experiment = self.records.find_experiment(identity_of(envelope, ctx), envelope.time)
        experiment.last = max(envelope.time, experiment.last or 0.0)
        is_late = experiment.start is not None and is_earlier(envelope.stream, envelope.time, *experiment.start)
        match tag:
            case "experiment_start" | "experiment_end" if is_late:  # a later attempt is known already
                pass
            case "experiment_start":
                experiment.start = (envelope.stream, envelope.time)
                start_experiment(experiment, json_fields(field(ctx, "config")), envelope.time)
            case "group_start":
                add_names(experiment.groups, [str(parts.get("group_name"))])
            case _:
                end_experiment(experiment, parts.get("result"), envelope.time)
        self.records.touch(experiment)
        changes.experiments.add(experiment.id)

    def call(self, op: str, args: dict[str, Any], time: float, changes: Changes) -> Any:  # what the client gets
        """Carry out a call of a client of the hosted service that changes something; inside a transaction.

        Args:
            op: One of ``hosted.operations``.
            args: Its arguments; a new row has its ``id``.
            time: The time of the call.
            changes: As of `apply`.
        """
        result = self.hosted.operations[op](args, time, changes)
        step = args.get("step")
        if op not in hosted_records.POINT_OPS or not is_step(step):
            return result
        run = self.hosted.ensure_run(str(args["run_id"]), time)
        if op == "create_eval":
            values = numbers_below(str(args.get("benchmark_id") or "eval"), args.get("metrics"))
            self._series.add_row(run.id, 0, step, None, values)
            return result
        split = str(args.get("split") or TRAIN)
        numbers: dict[str, float] = {}
        for name, value in hosted_records.metrics_of(args).items():
            add_value(name, value, numbers, {})
        if numbers:
            values = {self.hosted.series_name(run, name, split): value for name, value in numbers.items()}
            self._series.add_row(run.id, 0, step, time, values)
        self._add_progress(run, 0, time, step)
        return result


def _without_handles(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in parts.items() if not isinstance(each, LoopState | LogContext)}


def _parts(event: Event | UnknownEvent) -> tuple[str, dict[str, Any], object]:
    """Return the tag of an event, its fields, and the handle that names its run, or None."""
    if isinstance(event, UnknownEvent):
        handle = next((event.fields.get(name) for name, kind in event.handles.items() if kind != "batch"), None)
        return event.type, event.fields, handle
    parts = {name: getattr(event, name, None) for name in event.__struct_fields__}
    handles = (parts.get("state"), parts.get("ctx"), *parts.values())
    return (
        event_tag(type(event)),
        parts,
        next((each for each in handles if isinstance(each, LoopState | LogContext)), None),
    )
