"""`EvsysLoggerCallback`: sends all events to a dashboard or to EvSys without blocking the loop.

The inline half creates IDs; the delivery half, `evsys_api.delivery`, sends the events.
"""

import os
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from evsys_adapters.common.hook_arguments import (
    is_run_of,
    output_dir_of,
    run_context,
    run_folder,
    run_id,
    run_key,
    safe_name,
)
from evsys_adapters.common.params import validate_params
from evsys_adapters.evsys_api.creation import persistent_id
from evsys_adapters.evsys_api.dashboard import is_same_server
from evsys_adapters.evsys_api.delivery import EvsysRun, EvsysSink
from evsys_adapters.evsys_api.gateway import EvsysLoggerConfig, has_api_key, is_offline
from evsys_bus.adapter import Ranks
from evsys_bus.callback import Callback
from evsys_bus.config import build_callbacks
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, LoopState, RunResult
from evsys_bus.diagnostics import log
from evsys_bus.errors import EvsysBusError
from evsys_bus.location import local_path, short_digest

if TYPE_CHECKING:
    from evsys_bus.cli.output.screen import Screen


class EvsysLoggerCallback(Callback):
    """Shows experiments, runs, metrics, checkpoints and evals in the dashboard, or logs them to EvSys, in a courier.

    The IDs that later callbacks read (``ctx.ids["experiment_id"]``, ``["group:<name>"]``, ``["run_id"]``) are created
    immediately, as UUIDv7, and stored in ``.evsys_ids/`` in the folder of their object: a resumed run has the same IDs,
    and is the same run for EvSys. Existing IDs remain. The server assigns its own IDs; ours is in an experiment's
    ``tags`` and in a run's ``run_config``.

    Without a URL and an API key, events go to the running dashboard of this user (``evsys-bus dash``); while there is
    none nothing is pending, and a dashboard that is started during the run imports what it has missed. A server at
    ``url`` may be a dashboard or EvSys' service. The API key of the service, or the token of a dashboard on another
    machine, is read from the environment (``EVSYS_API_KEY``) and is never a parameter. Where the service is to be used
    and there is no key, everything is sent once there is one: by ``evsys-bus sync``, or by the next run. With
    ``EVSYS_OFFLINE=1`` nothing is sent and nothing stays pending; ``evsys-bus replay RUN --to evsys_logger`` sends it
    from the journal.

    See `evsys_adapters.evsys_api.hosted` for what the service is sent when, and what a crash may duplicate there.
    A dashboard stores every event once.

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
        self.config = validate_params(
            EvsysLoggerConfig, {"project_id": project_id, "flush_every": flush_every, **params}
        )
        self._ids: dict[tuple[str, str], str] = {}
        """Our IDs, by path and key in ``ids``."""
        self._own_ids: set[str] = set()
        self._announced: set[str] = set()
        self._offline_logged = False

    @staticmethod
    def open_dashboard(callbacks: Sequence[object], screen: "Screen") -> list[object]:
        """Show the runs of ``evsys-bus run --dash`` in the dashboard, which is found or started, and opened.

        Args:
            callbacks: Those of the experiment.
            screen: Where its URL is shown.

        Returns:
            The callback to add; empty if one of the experiment sends the events there.

        Raises:
            DashboardError: The dashboard could not be started.
        """
        from evsys_adapters.commands.dash import open_for_run

        state = open_for_run(screen)
        if is_offline():
            screen.note("EVSYS_OFFLINE is set: it gets nothing of this run until that is unset")
            return []
        own = [each.config for each in callbacks if isinstance(each, EvsysLoggerCallback)]
        if any(_goes_to(each, state.url) for each in own):
            return []
        # By its URL where the environment names another server; else by its state file, also after a restart.
        params = {} if _goes_to(EvsysLoggerConfig(), state.url) else {"url": state.url}
        spec = {"kind": EvsysLoggerCallback.name, "params": params, **({"name": "dashboard"} if own else {})}
        return list(build_callbacks([spec]))

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Set the experiment's ID."""
        self._set_experiment_id(ctx)

    def on_group_start(self, ctx: LogContext, group_name: str) -> None:
        """Set the group's ID."""
        self._set_experiment_id(ctx)
        self._set_group_id(ctx, group_name)

    def on_run_start(self, ctx: LogContext) -> None:
        """Set the run's ID, and the missing IDs of its experiment and group."""
        self._announced.add(run_id(ctx))
        self._set_run_id(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Set the IDs of a run without RunStart, and publish its context to the delivery half."""
        ctx = run_context(state)
        if ctx is None or run_id(state) in self._announced:
            return
        self._set_run_id(ctx)
        key = run_key(state)
        folder = output_dir_of(ctx)
        if not folder or key is None:
            return
        context = LogContext(Path(folder), run_key=key, ids=dict(getattr(ctx, "ids", ())))
        for name in ("config", "run_config", "group_name"):  # the context may be of another class
            setattr(context, name, getattr(ctx, name, None))
        with suppress(EvsysBusError):  # not attached to a bus
            self.publish(EvsysRun(key, context))

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Forget that the run was announced."""
        del run_result, arm
        self._announced.discard(run_id(ctx))

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the experiment's IDs; a resumed one reads them from disk."""
        del result
        ended = [key for key in self._ids if is_run_of(key[0], ctx)]
        for key in ended:
            self._own_ids.discard(self._ids.pop(key))

    def _set_experiment_id(self, ctx: object) -> None:
        if is_offline() and not self._offline_logged:
            self._offline_logged = True
            fix = "unset EVSYS_OFFLINE; what is recorded until then: evsys-bus replay RUN --to evsys_logger"
            log().info("evsys.offline", why="EVSYS_OFFLINE is set, so nothing is sent", fix=fix)
        self._set_id(ctx, "experiment_id", output_dir_of(ctx), "experiment")

    def _set_group_id(self, ctx: object, name: str) -> None:
        self._set_id(ctx, f"group:{name}", output_dir_of(ctx), f"group-{safe_name(name)[:100]}-{short_digest(name)}")

    def _set_run_id(self, ctx: LogContext) -> None:
        self._set_experiment_id(ctx)
        group = getattr(ctx, "group_name", None)
        if group is not None:
            self._set_group_id(ctx, str(group))
        self._set_id(ctx, "run_id", run_id(ctx), "run")

    def _set_id(self, ctx: object, key: str, path: str, file: str) -> None:
        """Set the ID unless there is one, other than a stale ID of another run or experiment."""
        ids: object = getattr(ctx, "ids", None)
        if not isinstance(ids, MutableMapping):
            return
        ids_mapping = cast("MutableMapping[str, Any]", ids)
        existing, own_id = ids_mapping.get(key), self._ids.get((path, key))
        if existing is not None and (existing == own_id or existing not in self._own_ids):
            return
        if own_id is None:
            own_id = self._ids[path, key] = persistent_id(_folder(ctx, path, file), file)
            self._own_ids.add(own_id)
        ids_mapping[key] = own_id


def _folder(ctx: object, path: str, file: str) -> Path | None:
    """Return the folder in which an ID is stored."""
    if not path:
        return None
    try:
        return run_folder(ctx) if file == "run" else local_path(path, "output_dir")
    except ValueError:  # a URL
        return None


def _goes_to(config: EvsysLoggerConfig, dashboard_url: str) -> bool:
    """Whether events of a callback with these parameters go to the running dashboard of this user."""
    url = config.url or os.environ.get("EVSYS_API_URL", "").strip()
    return is_same_server(url, dashboard_url) if url else not has_api_key(config)
