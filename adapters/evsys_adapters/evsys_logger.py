"""`EvsysLoggerCallback`: sends all events to EvSys without blocking the loop.

The inline half creates IDs; the delivery half, `evsys_api.delivery`, sends the events.
"""

from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, cast

from evsys_adapters._params import checked
from evsys_adapters._runs import digest, is_run_of, output_dir_of, run_context, run_folder, run_id, run_key, safe_name
from evsys_adapters.evsys_api.delivery import EvsysRun, EvsysSink
from evsys_adapters.evsys_api.gateway import EvsysLoggerConfig, is_offline
from evsys_adapters.evsys_api.ids import kept_id
from evsys_bus.attached import Ranks
from evsys_bus.callback import Callback
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, LoopState, RunResult
from evsys_bus.diagnostics import log
from evsys_bus.errors import EvsysBusError
from evsys_bus.where import local_path


class EvsysLoggerCallback(Callback):
    """Logs experiments, groups, runs, metrics, checkpoints and evals to EvSys, in a courier.

    The IDs that later callbacks read (``ctx.ids["experiment_id"]``, ``["group:<name>"]``, ``["run_id"]``) are created
    immediately, as UUIDv7, and stored in ``.evsys_ids/`` in the folder of their object: a resumed run has the same IDs,
    and is the same run for EvSys. Existing IDs are kept. The server assigns its own IDs; ours is in an experiment's
    ``tags`` and in a run's ``run_config``.

    The API key is read from the environment (``EVSYS_API_KEY``) and is never a parameter. Without one nothing is sent,
    and everything is sent once there is one: by ``evsys-bus sync``, or by the next run. With ``EVSYS_OFFLINE=1``
    nothing is sent and nothing stays pending; ``evsys-bus replay RUN --to evsys_logger`` sends it from the journal.

    See `evsys_adapters.evsys_api.delivery` for what is sent when, and what a crash may duplicate.

    Example:
        >>> logger = EvsysLoggerCallback("my-project")
        >>> ctx = LogContext("/tmp/evsys-example/not-there", run_key="run")
        >>> logger.config.flush_every, logger.delivery.__name__
        (1, 'EvsysSink')

    Raises:
        ModuleNotFoundError: aiohttp is not installed; `build_callbacks` converts it to a BrokenAdapterError.
    """

    name: ClassVar[str] = "evsys_logger"
    Config: ClassVar[type | None] = EvsysLoggerConfig
    delivery: ClassVar[type | None] = EvsysSink
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, project_id: str | None = None, flush_every: int = 1, **params: Any) -> None:
        """Validate the parameters against `EvsysLoggerConfig`."""
        self.config = checked(EvsysLoggerConfig, {"project_id": project_id, "flush_every": flush_every, **params})
        self._made: dict[tuple[str, str], str] = {}
        """Our IDs, by path and key in ``ids``."""
        self._ours: set[str] = set()
        self._announced: set[str] = set()
        self._said_offline = False

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Set the experiment's ID."""
        self._put_experiment(ctx)

    def on_group_start(self, ctx: LogContext, group_name: str) -> None:
        """Set the group's ID."""
        self._put_experiment(ctx)
        self._put_group(ctx, group_name)

    def on_run_start(self, ctx: LogContext) -> None:
        """Set the run's ID, and the missing IDs of its experiment and group."""
        self._announced.add(run_id(ctx))
        self._put_run(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Set the IDs of a run without RunStart, and publish its context to the delivery half."""
        ctx = run_context(state)
        if ctx is None or run_id(state) in self._announced:
            return
        self._put_run(ctx)
        key = run_key(state)
        folder = output_dir_of(ctx)
        if not folder or key is None:
            return
        seen = LogContext(Path(folder), run_key=key, ids=dict(getattr(ctx, "ids", ())))
        for name in ("config", "run_config", "group_name"):  # the context may be of another class
            setattr(seen, name, getattr(ctx, name, None))
        with suppress(EvsysBusError):  # not attached to a bus
            self.publish(EvsysRun(key, seen))

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Forget that the run was announced."""
        del run_result, arm
        self._announced.discard(run_id(ctx))

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the experiment's IDs; a resumed one reads them from disk."""
        del result
        over = [key for key in self._made if is_run_of(key[0], ctx)]
        for key in over:
            self._ours.discard(self._made.pop(key))

    def _put_experiment(self, ctx: object) -> None:
        if is_offline() and not self._said_offline:
            self._said_offline = True
            fix = "unset EVSYS_OFFLINE; what is recorded until then: evsys-bus replay RUN --to evsys_logger"
            log().info("evsys.offline", why="EVSYS_OFFLINE is set, so nothing is sent", fix=fix)
        self._put(ctx, "experiment_id", output_dir_of(ctx), "experiment")

    def _put_group(self, ctx: object, name: str) -> None:
        self._put(ctx, f"group:{name}", output_dir_of(ctx), f"group-{safe_name(name)[:100]}-{digest(name)}")

    def _put_run(self, ctx: LogContext) -> None:
        self._put_experiment(ctx)
        group = getattr(ctx, "group_name", None)
        if group is not None:
            self._put_group(ctx, str(group))
        self._put(ctx, "run_id", run_id(ctx), "run")

    def _put(self, ctx: object, key: str, path: str, file: str) -> None:
        """Set the ID unless there is one, other than a stale ID of another run or experiment."""
        ids: object = getattr(ctx, "ids", None)
        if not isinstance(ids, MutableMapping):
            return
        written = cast("MutableMapping[str, Any]", ids)
        before, made = written.get(key), self._made.get((path, key))
        if before is not None and (before == made or before not in self._ours):
            return
        if made is None:
            made = self._made[path, key] = kept_id(_folder(ctx, path, file), file)
            self._ours.add(made)
        written[key] = made


def _folder(ctx: object, path: str, file: str) -> Path | None:
    """Return the folder in which an ID is stored."""
    if not path:
        return None
    try:
        return run_folder(ctx) if file == "run" else local_path(path, "output_dir")
    except ValueError:  # a URL
        return None
