"""`MlflowLoggerCallback`: logs runs to a tracking server or a local store of MLflow, in a courier.

RunStart, TrainStart    a run, created or continued; the configuration as params, notes and tags
StepEnd                 metrics ``train/<key>``; keys that have a ``/`` stay as they are
Eval, BenchmarkEval     metrics ``eval/<name>/<key>``, after training ``final/<name>/<key>``; predictions as a table
Checkpoint              a tag ``checkpoint.<name>``
Content                 an artifact ``<kind>/<name>/step-<n>/…``
Alert                   a tag ``alert.<title>``
Environment             the artifact ``environment.json``, and the commit under MLflow's own names
Summary, EpochEnd       metrics ``summary/<key>``, and ``epoch/<key>`` over the epoch
SystemMetrics           metrics ``system/<key>``
RunEnd                  the status FINISHED, FAILED or KILLED
"""

import asyncio
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, TypeVar, cast

import msgspec

from evsys_adapters.common.hook_arguments import (
    field,
    list_or_empty,
    num_steps_of,
    output_dir_of,
    run_context,
    run_folder,
    run_id,
    run_name,
    safe_name,
    step_of,
)
from evsys_adapters.common.logged_values import EVAL, TRAIN, config_of, json_of, prefixed, table_of, text_of, values_of
from evsys_adapters.common.mlflow_tracking import (
    MetricPoint,
    OpenedRun,
    TrackingClient,
    TrackingRefusedError,
    absolute_uri,
    finite_or_nan,
    safe_key,
)
from evsys_adapters.common.params import require_package, validate_params
from evsys_bus.adapter import Ranks, RunAnnotated
from evsys_bus.callback import Callback
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import BatchTooLargeError, RejectedError, RetryLaterError
from evsys_bus.events import Envelope
from evsys_bus.location import short_digest
from evsys_bus.sink import Sink

_URI: Final = r"^[^@\s]+$"
_MAX_PARAMS: Final = 1000
_MAX_NAMES: Final = 100
_MAX_ENDED_RUNS: Final = 500
_LEVELS_SHOWN: Final = 8
"""How deep a configuration is flattened; what is deeper is one JSON text."""
_STATUSES: Final[Mapping[str, str]] = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}

_T = TypeVar("_T")


class MlflowLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `MlflowLoggerCallback`."""

    experiment: Annotated[str, msgspec.Meta(min_length=1, max_length=250)] | None = None
    """MLflow's experiment, which is created if it is missing. Default: ``MLFLOW_EXPERIMENT_NAME``, or the name of the
    experiment's folder."""
    tracking_uri: Annotated[str, msgspec.Meta(pattern=_URI, examples=["http://localhost:5000"])] | None = None
    """A server, or ``sqlite:///runs.db`` or a folder, without user and password: those are read from
    ``MLFLOW_TRACKING_USERNAME`` and ``_PASSWORD`` or ``MLFLOW_TRACKING_TOKEN``. Default: ``MLFLOW_TRACKING_URI``, or
    MLflow's own default."""
    name: str | None = None
    """Prefix of the run's name, before its key. Default: the key alone."""
    log_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Log one step in this many, and the last."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Maximum number of predictions in the table of one eval."""
    tags: dict[str, str] = {}
    """Further tags of every run."""
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """How long MLflow may take for a batch before the delivery counts as retrying; the call goes on meanwhile."""

    def __post_init__(self) -> None:
        require_package("mlflow_logger", "mlflow", "mlflow")

    @staticmethod
    def from_environment() -> dict[str, str | None]:
        """Return the parameters set by the environment; not a URI with a password."""
        found: dict[str, str | None] = {}
        if uri := os.environ.get("MLFLOW_TRACKING_URI", "").strip():
            found["tracking_uri"] = absolute_uri(uri) if re.match(_URI, uri) else None
        if experiment := os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            found["experiment"] = experiment
        return found


class _Run(msgspec.Struct):
    """What is known of one run; a mark has it."""

    id: str
    experiment_id: str
    key: str
    announced: bool = False
    """Whether it has a RunStart, and so will have a RunEnd."""
    ended: bool = False
    last_step: int = -1
    renamed: dict[str, str] = {}
    """Original names, by those that MLflow accepts."""
    checked: bool = False
    """Whether this process has looked whether it still exists."""


class MlflowSink(Sink):
    """Sends events to MLflow. Its parameters are those of `MlflowLoggerConfig`."""

    name: ClassVar[str] = "mlflow_logger"
    Config: ClassVar[type | None] = MlflowLoggerConfig
    max_batch_seconds: float = 1.0
    write_timeout_seconds: float = 86_400.0  # see `MlflowLoggerConfig.timeout_seconds`

    def __init__(self, experiment: str | None = None, tracking_uri: str | None = None, **params: Any) -> None:
        """Validate the parameters against `MlflowLoggerConfig`."""
        params |= {"experiment": experiment, "tracking_uri": tracking_uri}
        self.config = validate_params(MlflowLoggerConfig, params)
        uri = self.config.tracking_uri
        self._uri = None if uri is None else absolute_uri(uri)
        self._client = TrackingClient(None)
        self._runs: dict[str, _Run] = {}
        self._contexts: dict[str, object] = {}
        self._points: dict[str, list[MetricPoint]] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._opened: list[tuple[str, OpenedRun]] = []
        """Runs whose page is not published yet."""
        self._store = ""
        """A digest of the URI, by which a mark of another store is recognized."""
        self._running: asyncio.Future[Any] | None = None
        self._may_repeat = True
        """Whether the next batch may have been sent before, at least in part."""
        self._faults = FaultLog()
        self._handlers: dict[str, Callable[[Any, Envelope], None]] = {
            "on_run_start": self._on_start,
            "on_train_start": self._on_start,
            "on_environment": self._on_environment,
            "on_config_update": self._on_config_update,
            "on_step_end": self._on_step_end,
            "on_eval": self._on_eval,
            "on_benchmark_eval": self._on_benchmark_eval,
            "on_epoch_end": self._on_epoch_end,
            "on_checkpoint": self._on_checkpoint,
            "on_summary": self._on_summary,
            "on_content": self._on_content,
            "on_alert": self._on_alert,
            "on_system_metrics": self._on_system_metrics,
            "on_train_end": self._on_train_end,
            "on_run_end": self._on_run_end,
        }

    async def open(self) -> None:
        """Find the tracking server; nothing is requested before there are events.

        Raises:
            ParkedError: The environment names an invalid URI.
        """
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip() or None
        uri = None if uri is None else absolute_uri(uri)
        self._client = TrackingClient(uri)
        store = short_digest(uri or "")
        if self._runs and self._store not in {"", store}:
            self._faults.warn(
                "mlflow.other_store", "", why="runs of another store are unknown to this one", runs=len(self._runs)
            )
            self._runs = {}
        self._store = store

    async def write(self, batch: Sequence[Envelope]) -> None:
        """Send the batch: a row that MLflow has already changes nothing.

        Raises:
            RejectedError: MLflow rejects the only event of the batch.
            BatchTooLargeError: It rejects one of several.
        """
        may_repeat, self._may_repeat = self._may_repeat, True
        try:
            await self._in_thread(partial(self._send, batch, may_repeat=may_repeat))
            self._may_repeat = False
        except TrackingRefusedError as error:
            if len(batch) == 1:
                raise RejectedError({0: error.what}) from None
            raise BatchTooLargeError(error.what) from None
        finally:
            self._publish_pages()

    async def close(self) -> None:
        """Log what was counted."""
        self._faults.flush()

    def mark(self) -> dict[str, Any]:
        """Return MLflow's ids of the runs as plain data."""
        runs = self._runs.copy()  # a call that took too long may still change it
        for path in [path for path, run in runs.items() if run.ended][:-_MAX_ENDED_RUNS]:
            del runs[path]
            self._runs.pop(path, None)
        return {"store": self._store, "runs": {path: msgspec.to_builtins(run) for path, run in runs.items()}}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Restore the ids from a mark."""
        self._runs = msgspec.convert(mark.get("runs", {}), dict[str, _Run])
        for run in self._runs.values():
            run.checked = False
        known, self._store = self._store, str(mark.get("store", ""))
        if known and known != self._store:  # opened before it was rewound
            self._runs, self._store = {}, known

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Remember the contexts of open runs, for runs that are not created yet."""
        for each in starts:
            self._remember(each.event)

    # -- on the thread ------------------------------------------------------------------------------------------------

    def _send(self, batch: Sequence[Envelope], *, may_repeat: bool) -> None:
        if may_repeat:
            self._client.expect_repeats()
        self._points, self._tags = {}, {}
        for envelope in batch:
            handler = self._handlers.get(str(field(envelope.event, "hook") or f"on_{field(envelope.event, 'type')}"))
            if handler is not None:
                handler(_event_fields(envelope.event), envelope)
        for path in [*self._points, *self._tags]:
            self._flush(path)

    def _flush(self, path: str) -> None:
        """Send what has been collected of a run."""
        run = self._runs[path]
        points, tags = self._points.pop(path, []), self._tags.pop(path, {})
        if points:
            self._client.log_metrics(run.id, points)
        if tags:
            self._client.set_tags(run.id, tags)

    def _on_start(self, event: Any, envelope: Envelope) -> None:
        self._remember(event)
        handle, is_run_start = _handle_of(event), field(event, "hook") == "on_run_start"
        known = self._runs.get(run_id(handle))
        run = self._run(handle, envelope)
        if run is known and is_run_start:  # a resumed run, or one with samples of the machine before this event
            self._log_params(run, _merged_config(run_context(handle)), is_new=False)
            self._tags.setdefault(run.key, {}).update(self._run_tags(handle))
        run.announced = run.announced or is_run_start
        if run.ended:
            self._client.set_status(run.id, "RUNNING")
            run.ended = False

    def _on_environment(self, event: Any, envelope: Envelope) -> None:
        """Log the facts as a file, and the commit under MLflow's own names."""
        run = self._run(event.ctx, envelope)
        self._client.log_text(run.id, json_of(event.facts), "environment.json")
        git = _mapping(field(event.facts, "git"))
        names = {"commit": "mlflow.source.git.commit", "branch": "mlflow.source.git.branch"}
        names["remote"] = "mlflow.source.git.repoURL"
        found = {tag: str(git[name]) for name, tag in names.items() if git.get(name)}
        command = list_or_empty(field(event.facts, "command"))
        if command:
            found["mlflow.source.name"] = " ".join(map(str, command))
        self._tags.setdefault(run.key, {}).update(found)

    def _on_config_update(self, event: Any, envelope: Envelope) -> None:
        run = self._run(event.ctx, envelope)
        self._log_params(run, values_of(event.config), is_new=False)

    def _on_step_end(self, event: Any, envelope: Envelope) -> None:
        run, step = self._run(event.state, envelope), step_of(event.step_idx)
        run.last_step = max(run.last_step, step)
        if step % self.config.log_every == 0 or step + 1 == num_steps_of(event.state):
            self._add(run, envelope, step, TRAIN, event.metrics)

    def _on_eval(self, event: Any, envelope: Envelope) -> None:
        run = self._run(event.state, envelope)
        self._add(run, envelope, step_of(event.step_idx), f"{EVAL}{event.eval_name}", event.metrics)

    def _on_benchmark_eval(self, event: Any, envelope: Envelope) -> None:
        run, result = self._run(event.ctx, envelope), event.eval_result
        name = str(field(result, "name") or "benchmark")
        stream = f"final/{name}" if event.step is None else f"{EVAL}{name}"
        step = max(run.last_step, 0) if event.step is None else step_of(event.step)
        self._add(run, envelope, step, stream, field(result, "metrics"))
        folder = f"{safe_key(stream)}/step-{step}"
        if list_or_empty(event.predictions):
            table = table_of(event.predictions, self.config.max_pred_rows)
            content = {"columns": table.columns, "data": table.rows, "caption": table.caption}
            self._client.log_text(run.id, json_of(content), f"{folder}/predictions.json")
        if field(result, "breakdowns"):
            self._client.log_text(run.id, json_of(field(result, "breakdowns")), f"{folder}/breakdowns.json")

    def _on_epoch_end(self, event: Any, envelope: Envelope) -> None:
        self._add(self._run(event.state, envelope), envelope, step_of(event.epoch), "epoch", event.metrics)

    def _on_checkpoint(self, event: Any, envelope: Envelope) -> None:
        run = self._run(event.state, envelope)
        facts = {key: field(event.row, key) for key in ("name", "batch", "epoch", "state_path", "sampler_path")}
        text = json_of({key: each for key, each in facts.items() if each is not None})
        name = str(facts["name"] or "checkpoint")
        self._tags.setdefault(run.key, {}).update({f"checkpoint.{name}": text, "checkpoint.latest": text})

    def _on_summary(self, event: Any, envelope: Envelope) -> None:
        run = self._run(event.ctx, envelope)
        self._add(run, envelope, max(run.last_step, 0), "summary", event.values)

    def _on_system_metrics(self, event: Any, envelope: Envelope) -> None:
        step = field(event, "step")
        self._add(
            self._run(event.ctx, envelope), envelope, 0 if step is None else step_of(step), "system", event.values
        )

    def _on_content(self, event: Any, envelope: Envelope) -> None:
        run, item = self._run(event.state, envelope), event.item
        name, kind = safe_key(str(field(item, "name"))), safe_name(str(field(item, "kind") or "content"))
        folder = f"{kind}/{name}"
        if event.step_idx is not None:
            folder += f"/step-{step_of(event.step_idx)}"
        path, data = field(item, "path"), field(item, "data")
        if not path:
            self._client.log_text(run.id, json_of(data), f"{folder}/{kind}.json")
            return
        file = run_folder(event.state) / str(path)
        if not file.exists():
            raise TrackingRefusedError(f"{file} is missing, so it cannot be an artifact", "")
        self._client.log_file(run.id, file, folder)

    def _on_alert(self, event: Any, envelope: Envelope) -> None:
        run, facts = self._run(event.ctx, envelope), values_of({"title": event.title, "text": event.text})
        text = f"{event.level}: {facts['text'] or facts['title']}"
        self._tags.setdefault(run.key, {})[f"alert.{safe_key(str(facts['title']))}"] = text

    def _on_train_end(self, event: Any, envelope: Envelope) -> None:
        run = self._run(event.state, envelope)
        if run.announced:
            return
        error = field(event.state, "error")
        status = "failed" if error else "cancelled" if field(event.state, "stop_reason") == "cancelled" else "completed"
        self._end(run, envelope, status, error)

    def _on_run_end(self, event: Any, envelope: Envelope) -> None:
        run = self._run(event.ctx, envelope)
        status, error = (field(event.run_result, key) or field(event.arm, key) for key in ("status", "error"))
        self._end(run, envelope, str(status or ("failed" if error else "completed")), error)
        self._contexts.pop(run.key, None)

    def _end(self, run: _Run, envelope: Envelope, status: str, error: object) -> None:
        if error:
            self._tags.setdefault(run.key, {})["error"] = str(error)
        self._flush(run.key)
        self._client.set_status(run.id, _STATUSES.get(status, "FINISHED"), envelope.time)
        run.ended = True

    def _remember(self, event: Any) -> None:
        handle = _handle_of(event)
        if handle is not None and (field(event, "hook") == "on_run_start" or run_id(handle) not in self._contexts):
            self._contexts[run_id(handle)] = handle

    def _run(self, handle: object, envelope: Envelope) -> _Run:
        """Return the run of an event; it is created if the event is its first."""
        path = run_id(handle)
        run = self._runs.get(path)
        if run is not None and not run.checked:
            if not self._client.is_active(run.id):
                fix = "restore it in MLflow to continue it"
                self._faults.warn(
                    "mlflow.run_deleted", path, run=path, id=run.id, meaning="a new run is created", fix=fix
                )
                run = None
            else:
                run.checked = True
        if run is not None:
            return run
        handle = self._contexts.get(path, handle)
        ctx, name = run_context(handle), run_name(handle)
        opened = self._client.open_run(
            self._experiment(handle),
            name if self.config.name is None else f"{self.config.name}-{name}",
            f"{envelope.stream}/{envelope.seq}",
            self._run_tags(handle),
            envelope.time,
        )
        run = self._runs[path] = _Run(opened.id, opened.experiment_id, path, checked=True)
        self._opened.append((envelope.run or name, opened))
        self._log_params(run, _merged_config(ctx), is_new=opened.is_new)
        return run

    def _run_tags(self, handle: object) -> dict[str, str]:
        ctx = run_context(handle)
        extras, group = field(ctx, "extras"), field(ctx, "group_name")
        found = {"evsys_bus.run_key": run_name(handle), **self.config.tags}
        if group is not None:
            found["group"] = str(group)
        if words := list_or_empty(field(extras, "tags")):
            found["tags"] = ", ".join(map(str, words))
        if notes := field(extras, "notes"):
            found["mlflow.note.content"] = str(notes)
        return found

    def _experiment(self, handle: object) -> str:
        named = self.config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if named:
            return named
        folder = output_dir_of(run_context(handle)) or str(Path(output_dir_of(handle)).parent)
        return Path(folder).name or "evsys-bus"

    def _log_params(self, run: _Run, config: Mapping[str, Any], *, is_new: bool) -> None:
        params = _flattened(config)
        tags = self._tags.setdefault(run.key, {})
        if len(params) > _MAX_PARAMS:
            tags["evsys_bus.params_left_out"] = str(len(params) - _MAX_PARAMS)
        first = dict(list(params.items())[:_MAX_PARAMS])
        changed = self._client.log_params(run.id, first, is_new=is_new)
        if changed:
            tags["evsys_bus.changed_params"] = json_of(changed)

    def _add(self, run: _Run, envelope: Envelope, step: int, stream: str, metrics: object) -> None:
        """Collect the numbers of a row as metrics, and its texts as tags."""
        points = self._points.setdefault(run.key, [])
        taken: set[str] = set()
        for name, value in values_of(metrics).items():
            key = self._key(run, prefixed(stream, name), taken)
            if isinstance(value, bool | int | float):
                points.append(MetricPoint(key, finite_or_nan(float(value)), int(envelope.time * 1000), step))
            else:
                self._tags.setdefault(run.key, {})[key] = text_of(value)

    def _key(self, run: _Run, name: str, taken: set[str]) -> str:
        key = safe_key(name)
        if key in taken:
            key = safe_key(f"{key[:-9] if len(key) > _MAX_NAMES else key}-{short_digest(name)}")
        taken.add(key)
        if key != name and key not in run.renamed and len(run.renamed) < _MAX_NAMES:
            run.renamed[key] = name
            self._tags.setdefault(run.key, {})["evsys_bus.renamed"] = json_of(run.renamed)
        return key

    # -- on the loop --------------------------------------------------------------------------------------------------

    def _publish_pages(self) -> None:
        while self._opened:
            key, opened = self._opened.pop(0)
            page = self._client.page_of(opened)
            extras = {"mlflow_run_id": opened.id} | ({} if page is None else {"mlflow_url": page})
            if self.evsys_attached is not None:
                self.publish(RunAnnotated(key, extras))

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        """Make the blocking call on a thread; one that takes too long continues, and the next one waits for it.

        Raises:
            RetryLaterError: It takes too long.
        """
        if self._running is not None:
            await self._wait(self._running)
            self._running = None  # its outcome does not matter: what it sent is sent again, and changes nothing
        running = self._running = asyncio.get_running_loop().run_in_executor(None, call)
        await self._wait(running)
        self._running = None
        return running.result()

    async def _wait(self, running: "asyncio.Future[Any]") -> None:
        done, _ = await asyncio.wait({running}, timeout=self.config.timeout_seconds)
        if not done:
            raise RetryLaterError(f"{self._client.host} has not answered for {self.config.timeout_seconds:g} s")
        running.exception()  # read, so that asyncio does not log it


def _event_fields(event: Any) -> Any:
    """Return the event; of an event whose class this process lacks, its fields as attributes."""
    fields: object = getattr(event, "fields", None)
    return _Fields(cast("dict[str, Any]", fields)) if isinstance(fields, dict) else event


class _Fields:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update(fields)


def _handle_of(event: object) -> Any:
    return field(event, "state") or field(event, "ctx")


def _merged_config(ctx: object) -> dict[str, Any]:
    """Return the configuration of a run; its own entries replace those of its experiment."""
    config = config_of(ctx)
    return {**_mapping(config.get("config")), **_mapping(config.get("run_config"))}


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {} if value is None else {"config": value}


def _flattened(config: Mapping[str, Any], prefix: str = "", depth: int = 1) -> dict[str, str]:
    """Return a configuration with dotted names and texts as values."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        inner = _mapping(cast("object", value)) if isinstance(value, dict) else {}
        if inner and depth < _LEVELS_SHOWN:
            found |= _flattened(inner, f"{name}.", depth + 1)
        else:
            found[name] = text_of(cast("object", value))
    return found


class MlflowLoggerCallback(Callback):
    """Logs runs to MLflow through its own client, in a courier: the loop never waits for the server.

    A run is created once and continued by a resumed run; its id is in ``ctx.extras["mlflow_run_id"]`` of followed
    adapters, and with a server its page in ``["mlflow_url"]``. Steps and times are those of the events. While a server
    is away, events are pending, and ``evsys-bus sync`` or the next run sends them; a batch that is sent again after a
    crash changes nothing. MLflow has no way to take back a point: a step that is trained again after a resume has both.

    Names and values beyond MLflow's limits are changed or cut, and the tag ``evsys_bus.renamed`` has the original
    names. Params never change in MLflow: those with other values after a resume are in the tag
    ``evsys_bus.changed_params``. Infinities become the largest float. Texts among metrics become tags.

    Example:
        >>> MlflowLoggerCallback("my-experiment", "http://localhost:5000").config.log_every
        1

    Raises:
        ModuleNotFoundError: mlflow is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "mlflow_logger"
    Config: ClassVar[type | None] = MlflowLoggerConfig
    delivery: ClassVar[type | None] = MlflowSink
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, experiment: str | None = None, tracking_uri: str | None = None, **params: Any) -> None:
        """Validate the parameters against `MlflowLoggerConfig`."""
        params |= {"experiment": experiment, "tracking_uri": tracking_uri}
        self.config = validate_params(MlflowLoggerConfig, params)
