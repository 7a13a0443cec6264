"""`Creation`: creates objects at the server exactly once, despite lost responses and killed processes.

The gateway accepts no IDs from clients, so a creation whose response was lost may have happened. In that case the
server is queried first:

    an experiment     by a tag                          an eval          by benchmark, step and metrics
    a group           by its name                       a prediction     by its index, in its metadata
    a run             by an entry of its run_config     a checkpoint     by label, step and URI

That is needed if an earlier process may have created it: our IDs contain their creation time, and objects with IDs
younger than this process need no query. And it is needed if this process has lost a response.
"""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_adapters._result_fields import field, items
from evsys_adapters._runs import output_dir_of, run_context, run_id
from evsys_adapters.evsys_api.gateway import RefusedError
from evsys_adapters.evsys_api.ids import derived_id, made_at
from evsys_adapters.evsys_api.known import MOST_ENDED, Experiment, Known, Run, ServerId
from evsys_adapters.evsys_api.records import INDEX, RUN_ID, TAG, Args, experiment_args, run_args
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import BatchTooLargeError, ParkedError, RetryLaterError
from evsys_bus.events import Envelope

Call = Callable[[str, Args], Awaitable[Any]]
"""Executes an operation and returns its result."""

_MOST_LOOKED_INTO: Final = 500
"""Maximum number of rows that are requested individually, newest first, if a list lacks the needed column."""


class Scored:
    """An eval that is being sent."""

    __slots__ = ("created", "doubtful", "id", "refused", "sent")

    def __init__(self) -> None:
        self.id: ServerId | None = None
        self.created = False
        self.sent: set[int] = set()
        """Indexes of the predictions that were stored or rejected."""
        self.doubtful = False
        """Whether further predictions may have been stored."""
        self.refused: dict[int, str] = {}


class Creation:
    """Creates the objects at the server that events refer to.

    Args:
        call: Executes an operation.
        faults: Logs failed queries.
        most_ended: See `Known`.
    """

    def __init__(self, call: Call, faults: FaultLog, most_ended: int = MOST_ENDED) -> None:
        self.known: Final = Known(most_ended)
        self._call: Final = call
        self._faults: Final = faults
        self._began = time.time()
        """Objects with later IDs do not exist yet, unless this process has created them."""
        self._doubts: set[object] = set()
        """Keys of objects whose creation was not confirmed."""

    def forgets(self) -> None:
        """Bound the size of `known`; forgotten objects are looked up when they are needed again."""
        forgotten = [made for ours in self.known.prune() if (made := made_at(ours)) is not None]
        self._began = max(self._began, *forgotten) if forgotten else self._began

    # -- lookup of the experiment and run of an event ------------------------------------------------------------------

    def experiment_of(self, handle: object, envelope: Envelope) -> Experiment:
        """Return the experiment that a context or a state belongs to."""
        ctx = run_context(handle)
        path = output_dir_of(ctx) or str(Path(output_dir_of(handle)).parent)
        ours = _id_in(ctx, "experiment_id")
        known = self.known.experiments.get(ours) if ours is not None else self.known.experiment_at.get(path)
        if known is None:
            ours = ours or derived_id(envelope.time, envelope.stream, path)
            known = self.known.add_experiment(Experiment(ours, path))
        return known

    def run_of(self, handle: object, envelope: Envelope) -> Run:
        """Return the run of a context or a state, by the ID in the context if there is one."""
        ctx, path = run_context(handle), run_id(handle)
        ours = _id_in(ctx, "run_id")
        known = self.known.run_at.get(path)
        if known is not None and ours in {None, known.our_id}:
            return known
        ours = ours or derived_id(envelope.time, envelope.stream, path, "run")
        known = self.known.runs.get(ours)
        if known is None:
            known = self.known.add_run(Run(ours, path, self.experiment_of(handle, envelope).our_id))
        self.known.run_at[path] = known  # its folder may have been moved
        return known

    # -- creations ----------------------------------------------------------------------------------------------------

    async def experiment(self, experiment: Experiment, handle: object, project: str | None) -> None:
        """Create the experiment at the server unless it exists.

        Raises:
            RefusedError: The server rejects it; the same applies to the following methods.
        """
        if experiment.id is not None:
            return
        if experiment.refused is not None:
            raise RefusedError(experiment.refused)
        args = experiment_args(run_context(handle), Path(experiment.path).name, experiment.our_id, project)
        tag = f"{TAG}{experiment.our_id}"

        async def find() -> Args | None:
            rows = await self._list("list_experiments", {"project_id": project, "valid_only": False})
            one_by_one = ("tags", "get_experiment", "experiment_id")
            return await self._first(rows, *one_by_one, lambda row: tag in items(row.get("tags")))

        try:
            experiment.id, row = await self._create(experiment.our_id, "create_experiment", args, find)
        except RefusedError as refused:
            experiment.refused = f"the experiment was refused: {refused.what}"
            raise
        experiment.ended = _has_ended(row)

    async def group(self, experiment: Experiment, ctx: object, name: str) -> None:
        """Create a group of an existing experiment unless it exists."""
        if name in experiment.groups:
            return

        async def find() -> Args | None:
            rows = await self._list("list_groups", {"experiment_id": experiment.id})
            return next((row for row in rows if row.get("name") == name), None)

        args = {"experiment_id": experiment.id, "name": name}
        ours = _id_in(ctx, f"group:{name}") or experiment.our_id
        experiment.groups[name], _ = await self._create(ours, "create_group", args, find)

    async def run(self, run: Run, handle: object, project: str | None) -> None:
        """Create a run, and what it belongs to; like EvSys' client, without parents that were rejected."""
        if run.id is not None:
            return
        if run.refused is not None:
            raise RefusedError(run.refused)
        ctx = run_context(handle)
        experiment = self.known.experiments[run.experiment]
        group = getattr(ctx, "group_name", None)
        try:
            await self.experiment(experiment, handle, project)
            if group is not None:
                await self.group(experiment, ctx, str(group))
        except RefusedError as refused:
            self._faults.warn("evsys.parent_refused", run.path, run=run.path, why=refused.what)
        parents = {"experiment_id": experiment.id, "group_id": experiment.groups.get(str(group))}
        args = {**parents, **run_args(ctx, handle, run.our_id)}

        async def find() -> Args | None:
            rows = await self._list("list_runs", {"experiment_id": experiment.id})
            one_by_one = ("run_config", "get_run", "run_id")
            return await self._first(
                rows, *one_by_one, lambda row: field(_object(row.get("run_config")), RUN_ID) == run.our_id
            )

        try:
            run.id, row = await self._create(run.our_id, "create_run", args, find)
        except RefusedError as refused:
            run.refused = f"the run was refused: {refused.what}"
            raise
        run.made_here, run.ended = row is None, _has_ended(row)
        run.checkpoints = set() if row is None else None

    async def scored(self, run: Run, scored: Scored, key: object, args: Args) -> None:
        """Create an eval unless it exists.

        Args:
            run: The run of the eval.
            scored: State of the eval.
            key: Identifies its event.
            args: Arguments of the creation.
        """
        if scored.created:
            return

        async def find() -> Args | None:
            rows = await self._list("list_evals", {"run_id": run.id})
            return next((row for row in rows if _is_same_eval(row, args) and row.get("id") not in run.claimed), None)

        scored.id, row = await self._create(key, "create_eval", args, find, certain=run.made_here)
        scored.created, scored.doubtful = True, row is not None

    async def look_for_predictions(self, run: Run, scored: Scored) -> None:
        """Find the predictions that were stored already, if that is unknown."""
        if not scored.doubtful:
            return
        rows = await self._list("list_predictions", {"run_id": run.id, "kind": "eval"})
        mine = [field(row.get("metadata"), INDEX) for row in rows if row.get("eval_id") == scored.id]
        scored.sent |= {index for index in mine if type(index) is int}
        scored.doubtful = False

    async def checkpoint(self, run: Run, args: Args) -> None:
        """Create a checkpoint unless it exists."""
        key = (args["label"], args["step"], args["uri"])
        if run.checkpoints is None or (run.our_id, *key) in self._doubts:
            rows = await self._list("list_checkpoints", {"run_id": run.id})
            run.checkpoints = {(row.get("label"), row.get("step"), row.get("uri")) for row in rows}
        if key not in run.checkpoints:
            await self._once((run.our_id, *key), "add_checkpoint", {"run_id": run.id, **args})
            run.checkpoints.add(key)
        self._doubts.discard((run.our_id, *key))

    # -----------------------------------------------------------------------------------------------------------------

    async def _create(
        self,
        ours: object,
        op: str,
        args: Args,
        find: Callable[[], Awaitable[Args | None]],
        *,
        certain: bool = False,
    ) -> tuple[ServerId | None, Args | None]:
        """Return the server's ID of an object, and its row if it existed before.

        Args:
            ours: Our ID, or the key of its event.
            op: The operation that creates it.
            args: Arguments of the operation.
            find: Looks it up; returns its row, or None.
            certain: It cannot exist, unless this process has lost a response.
        """
        made = made_at(ours) if isinstance(ours, str) else None
        fresh = certain or (made is not None and made > self._began)
        if not fresh or ours in self._doubts:
            row = await find()
            if row is not None:
                self._doubts.discard(ours)
                return server_id(row), row
        found = server_id(await self._once(ours, op, args))
        if found is None:
            self._doubts.add(ours)
            raise RetryLaterError(f"{op}: the server's response has no id")
        return found, None

    async def _once(self, ours: object, op: str, args: Args) -> Any:
        """Execute an operation that must happen once; its outcome is uncertain until there is a response."""
        self._doubts.add(ours)
        try:
            result = await self._call(op, args)
        except BatchTooLargeError as error:
            self._doubts.discard(ours)
            raise RefusedError(error.what) from error
        except (RefusedError, ParkedError):
            self._doubts.discard(ours)
            raise
        self._doubts.discard(ours)
        return result

    async def _list(self, op: str, args: Args) -> list[Args]:
        try:
            found = await self._call(op, args)
        except RefusedError as refused:
            fix = "objects created just before a crash may exist twice"
            self._faults.warn("evsys.cannot_look_up", op, op=op, why=refused.what, fix=fix)
            return []
        return [cast("Args", row) for row in items(found) if isinstance(row, dict)]

    async def _first(
        self, rows: list[Args], column: str, op: str, name: str, wanted: Callable[[Args], bool]
    ) -> Args | None:
        """Return the first matching row; rows that lack the column are requested individually, newest first."""
        for row in rows:
            if column in row and wanted(row):
                return row
        for row in [each for each in reversed(rows) if column not in each][:_MOST_LOOKED_INTO]:
            whole = await self._call(op, {name: server_id(row)})
            if isinstance(whole, dict) and wanted(cast("Args", whole)):
                return cast("Args", whole)
        return None


def server_id(row: object) -> ServerId | None:
    """Return the ID in a row of the server."""
    found = field(row, "id")
    return found if isinstance(found, str | int) and found != "" and not isinstance(found, bool) else None


def _id_in(ctx: object, name: str) -> str | None:
    found = field(getattr(ctx, "ids", None), name)
    return None if found is None or found == "" else str(found)


def _has_ended(row: Args | None) -> bool:
    return row is not None and row.get("status") in {"completed", "failed", "cancelled"}


def _is_same_eval(row: Args, args: Args) -> bool:
    """Whether a row of the server equals the eval to be created."""
    names = ("benchmark_id", "step", "metrics")
    return all(row.get(name, args[name]) == args[name] for name in names)


def _object(value: Any) -> object:
    """Decode a value from a server that stores JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return None
