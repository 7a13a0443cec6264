"""`EvsysLoggerCallback`: everything that happens goes to EvSys, and the loop waits for none of it.

It owns the inline half, which makes ids; the delivery half, which sends, is `evsys_api.delivery`.
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
    """Logs experiments, groups, runs, metrics, checkpoints and evals to EvSys, by a courier.

    The ids that later callbacks read (``ctx.ids["experiment_id"]``, ``["group:<name>"]``, ``["run_id"]``) are made on
    the spot, UUIDv7, and kept in ``.evsys_ids/`` in the folder of what they name: a resumed run has the ones that it
    had, and is the same run for EvSys. An id that is there already stays. The server has ids of its own; ours is in an
    experiment's ``tags`` and in a run's ``run_config``.

    The key is in the environment (``EVSYS_API_KEY``) and never among params. Without one nothing is sent, and all is as
    soon as there is one: ``evsys-bus sync``, or the next run. With ``EVSYS_OFFLINE=1`` nothing is sent nor owed; the
    journal has it, and ``evsys-bus replay RUN --to evsys_logger`` sends it.

    What is sent when, and what a crash may double, is told in `evsys_adapters.evsys_api.delivery`.

    Example:
        >>> logger = EvsysLoggerCallback("my-project")
        >>> ctx = LogContext("/tmp/evsys-example/not-there", run_key="run")
        >>> logger.config.flush_every, logger.delivery.__name__
        (1, 'EvsysSink')

    Raises:
        ModuleNotFoundError: aiohttp is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "evsys_logger"
    Config: ClassVar[type | None] = EvsysLoggerConfig
    delivery: ClassVar[type | None] = EvsysSink
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, project_id: str | None = None, flush_every: int = 1, **params: Any) -> None:
        """Any: as `EvsysLoggerConfig` has them; they are checked."""
        self.config = checked(EvsysLoggerConfig, {"project_id": project_id, "flush_every": flush_every, **params})
        self._made: dict[tuple[str, str], str] = {}
        """Our ids, by what they name: a path, and the key in ``ids``."""
        self._ours: set[str] = set()
        self._announced: set[str] = set()
        self._said_offline = False

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Give the experiment its id."""
        self._put_experiment(ctx)

    def on_group_start(self, ctx: LogContext, group_name: str) -> None:
        """Give the group its id."""
        self._put_experiment(ctx)
        self._put_group(ctx, group_name)

    def on_run_start(self, ctx: LogContext) -> None:
        """Give the run its id, and whatever it belongs to that has none."""
        self._announced.add(run_id(ctx))
        self._put_run(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Give ids to a run that had no RunStart, and have it known to the delivery half what the run is."""
        ctx = run_context(state)
        if ctx is None or run_id(state) in self._announced:
            return
        self._put_run(ctx)
        key = run_key(state)
        folder = output_dir_of(ctx)
        if not folder or key is None:
            return
        seen = LogContext(Path(folder), run_key=key, ids=dict(getattr(ctx, "ids", ())))
        for name in ("config", "run_config", "group_name"):  # it may be of another class
            setattr(seen, name, getattr(ctx, name, None))
        with suppress(EvsysBusError):  # called without a bus
            self.publish(EvsysRun(key, seen))

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """The run is over."""
        del run_result, arm
        self._announced.discard(run_id(ctx))

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the experiment; what is resumed finds its ids where they are kept."""
        del result
        over = [key for key in self._made if is_run_of(key[0], ctx)]
        for key in over:
            self._ours.discard(self._made.pop(key))

    def _put_experiment(self, ctx: object) -> None:
        if is_offline() and not self._said_offline:
            self._said_offline = True
            fix = "unset EVSYS_OFFLINE; what is recorded until then: evsys-bus replay RUN --to evsys_logger"
            log().info("evsys.offline", why="EVSYS_OFFLINE is set, and nothing is sent", fix=fix)
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
        """Write the id, unless there is one, which is not of another run or experiment of ours."""
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
    """Where an id is kept."""
    if not path:
        return None
    try:
        return run_folder(ctx) if file == "run" else local_path(path, "output_dir")
    except ValueError:  # a URL
        return None
