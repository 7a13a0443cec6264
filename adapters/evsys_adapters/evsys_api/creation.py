"""`ServerObjectCreator`: creates objects at the server exactly once, despite lost responses and killed processes.

The gateway accepts no IDs from clients, so a creation whose response was lost may have happened. In that case the
server is queried first:

    an experiment     by a tag                          an eval          by benchmark, step and metrics
    a group           by its name                       a prediction     by its index, in its metadata
    a run             by an entry of its run_config     a checkpoint     by label, step and URI

That is needed if an earlier process may have created it: our IDs contain their creation time, and objects with IDs
younger than this process need no query. And it is needed if this process has lost a response.

Our own IDs are UUIDv7. An ID is stored in a small file beside the object that it identifies, so that resumed runs and
experiments have the same IDs:

    <output_dir>/.evsys_ids/experiment
                            group-<name>-<digest>
    <output_dir>/<run_key>/.evsys_ids/run
"""

import dataclasses
import hashlib
import os
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_adapters.common.hook_arguments import field, list_or_empty, output_dir_of, run_context, run_id
from evsys_adapters.evsys_api.gateway import OperationRefusedError
from evsys_adapters.evsys_api.records import INDEX, RUN_ID, TAG, Args, experiment_args, run_args
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BatchTooLargeError, ParkedError, RetryLaterError
from evsys_bus.events import Envelope
from evsys_bus.files import create_file, load_file

IDS_FOLDER: Final = ".evsys_ids"
_VERSION: Final = 7 << 76
_VARIANT: Final = 2 << 62
_RANDOM: Final = ~(0xF << 76 | 3 << 62) & ((1 << 80) - 1)


def derived_id(seconds: float, *parts: str) -> str:
    """Return a deterministic UUIDv7 of a time and some texts.

    Args:
        seconds: Seconds since the epoch; the ID's creation time.
        parts: Texts that distinguish it from other IDs of that time.
    """
    return _uuid7(seconds, hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=10).digest())


def id_time(text: str) -> float | None:
    """Return the creation time in the ID, in seconds since the epoch; None if it is not a UUIDv7."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        return None
    return (found.int >> 80) / 1000 if found.version == 7 else None  # noqa: PLR2004


def persistent_id(folder: Path | None, name: str) -> str:
    """Return the ID stored in a folder under a name, or create and store a new one.

    If the disk refuses it, logs a WARNING; the ID is then valid for this process only.

    Args:
        folder: The folder of the experiment or the run; None if there is none.
        name: One path component.
    """
    fresh_id = _uuid7(time.time(), os.urandom(10))
    if folder is None:
        return fresh_id
    path = folder / IDS_FOLDER / name
    try:
        stored_id = load_file(path, _id_of, quarantine=True)
        if stored_id is None and not create_file(path, f"{fresh_id}\n".encode(), mode=0o666):
            stored_id = load_file(path, _id_of, quarantine=False)  # created by another process meanwhile
    except OSError as error:
        fix = "make the folder writable; without the stored id, a resumed run is another run for EvSys"
        log().warning("evsys.id_not_kept", path=str(path), error=str(error), fix=fix)
        stored_id = None
    return stored_id or fresh_id


def _uuid7(seconds: float, random: bytes) -> str:
    milliseconds = max(0, int(seconds * 1000)) & ((1 << 48) - 1)
    low = int.from_bytes(random, "big") & _RANDOM
    return str(uuid.UUID(int=milliseconds << 80 | _VERSION | _VARIANT | low))


def _id_of(data: bytes) -> str:
    text = data.decode("ascii").strip()
    if id_time(text) is None:
        raise ValueError("it holds no id")
    return text


MAX_ENDED: Final = 500
"""Ended runs and experiments that are remembered; an older one is looked up when it continues."""
MAX_EVAL_IDS: Final = 64
"""Maximum number of remembered eval IDs of a run, the newest."""
MAX_NAMES: Final = 50

ServerId = str | int


@dataclasses.dataclass(slots=True)
class Experiment:
    """One experiment."""

    our_id: str
    path: str
    """Its folder; identifies the experiment of events without IDs."""
    id: ServerId | None = None
    """The server's ID; None before it is created, and if that was rejected."""
    ended: bool = False
    groups: dict[str, ServerId | None] = dataclasses.field(default_factory=dict[str, ServerId | None])
    """Group IDs by name; None for a group without an ID."""
    refused: str | None = None


@dataclasses.dataclass(slots=True)
class Run:
    """One run."""

    our_id: str
    path: str
    experiment: str
    """Our ID of its experiment."""
    id: ServerId | None = None
    announced: bool = False
    """Whether it has a RunStart, and so will have a RunEnd."""
    ended: bool = False
    last_step: int = -1
    evals: dict[str, list[int]] = dataclasses.field(default_factory=dict[str, list[int]])
    """Steps of the stored evals, by name; for evals after training, -2 minus the last step."""
    claimed: list[ServerId] = dataclasses.field(default_factory=list[ServerId])
    """The server's IDs of the newest evals."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Number of values of each metric that JSON cannot represent."""
    summary: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Values of the run as a whole, sent at its end."""
    refused: str | None = None
    made_here: bool = False
    """Whether this process has created it, and so knows all its objects."""
    checkpoints: set[tuple[Any, Any, Any]] | None = None
    """Stored checkpoints by label, step and URI; None if unknown."""


_NOT_STORED: Final = frozenset({"refused", "made_here", "checkpoints"})


class KnownObjects:
    """The known experiments and runs.

    Args:
        max_ended: How many ended runs and experiments are remembered.
    """

    def __init__(self, max_ended: int = MAX_ENDED) -> None:
        self._max_ended: Final = max_ended
        self.experiments: dict[str, Experiment] = {}
        self.runs: dict[str, Run] = {}
        self.experiment_at: dict[str, Experiment] = {}
        """The newest experiment in each folder."""
        self.run_at: dict[str, Run] = {}

    def add_experiment(self, experiment: Experiment) -> Experiment:
        """Add an experiment."""
        self.experiments[experiment.our_id] = self.experiment_at[experiment.path] = experiment
        return experiment

    def add_run(self, run: Run) -> Run:
        """Add a run."""
        self.runs[run.our_id] = self.run_at[run.path] = run
        return run

    def prune(self) -> list[str]:
        """Forget the oldest ended objects once there are twice as many as the limit; returns our IDs of them."""
        runs = [run for run in self.runs.values() if run.ended]
        runs = [] if len(runs) < 2 * self._max_ended else runs[: -self._max_ended]
        for run in runs:
            del self.runs[run.our_id]
            if self.run_at.get(run.path) is run:
                del self.run_at[run.path]
        used = {run.experiment for run in self.runs.values()}
        idle = [each for each in self.experiments.values() if each.ended and each.our_id not in used]
        idle = [] if len(idle) < 2 * self._max_ended else idle[: -self._max_ended]
        for each in idle:
            del self.experiments[each.our_id]
            if self.experiment_at.get(each.path) is each:
                del self.experiment_at[each.path]
        return [each.our_id for each in (*runs, *idle)]

    def to_builtins(self) -> dict[str, Any]:
        """Return the objects with server IDs as plain data."""
        return {
            "experiments": [_to_builtins(each) for each in self.experiments.values() if each.id is not None],
            "runs": [_to_builtins(each) for each in self.runs.values() if each.id is not None],
        }

    def load(self, stored: dict[str, Any]) -> None:
        """Add the objects of `to_builtins`; unknown keys of newer versions are ignored."""
        for each in stored.get("experiments", ()):
            self.add_experiment(msgspec.convert(each, Experiment))
        for each in stored.get("runs", ()):
            self.add_run(msgspec.convert(each, Run))


def _to_builtins(entry: Experiment | Run) -> dict[str, Any]:
    return msgspec.to_builtins({name: getattr(entry, name) for name in entry.__slots__ if name not in _NOT_STORED})


Call = Callable[[str, Args], Awaitable[Any]]
"""Executes an operation and returns its result."""

_MAX_LOOKUPS: Final = 500
"""Maximum number of rows that are requested individually, newest first, if a list lacks the needed column."""


class PendingEval:
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


class ServerObjectCreator:
    """Creates the objects at the server that events refer to.

    Args:
        call: Executes an operation.
        faults: Logs failed queries.
        max_ended: See `KnownObjects`.
    """

    def __init__(self, call: Call, faults: FaultLog, max_ended: int = MAX_ENDED) -> None:
        self.known: Final = KnownObjects(max_ended)
        self._call: Final = call
        self._faults: Final = faults
        self._start_time = time.time()
        """Objects with later IDs do not exist yet, unless this process has created them."""
        self._uncertain: set[object] = set()
        """Keys of objects whose creation was not confirmed."""

    def prune(self) -> None:
        """Bound the size of `known`; forgotten objects are looked up when they are needed again."""
        forgotten_times = [created_at for our_id in self.known.prune() if (created_at := id_time(our_id)) is not None]
        self._start_time = max(self._start_time, *forgotten_times) if forgotten_times else self._start_time

    def experiment_of(self, handle: object, envelope: Envelope) -> Experiment:
        """Return the experiment that a context or a state belongs to."""
        ctx = run_context(handle)
        path = output_dir_of(ctx) or str(Path(output_dir_of(handle)).parent)
        our_id = _id_in(ctx, "experiment_id")
        known = self.known.experiments.get(our_id) if our_id is not None else self.known.experiment_at.get(path)
        if known is None:
            our_id = our_id or derived_id(envelope.time, envelope.stream, path)
            known = self.known.add_experiment(Experiment(our_id, path))
        return known

    def run_of(self, handle: object, envelope: Envelope) -> Run:
        """Return the run of a context or a state, by the ID in the context if there is one."""
        ctx, path = run_context(handle), run_id(handle)
        our_id = _id_in(ctx, "run_id")
        known = self.known.run_at.get(path)
        if known is not None and our_id in {None, known.our_id}:
            return known
        our_id = our_id or derived_id(envelope.time, envelope.stream, path, "run")
        known = self.known.runs.get(our_id)
        if known is None:
            known = self.known.add_run(Run(our_id, path, self.experiment_of(handle, envelope).our_id))
        self.known.run_at[path] = known  # its folder may have been moved
        return known

    async def ensure_experiment(self, experiment: Experiment, handle: object, project: str | None) -> None:
        """Create the experiment at the server unless it exists.

        Raises:
            RefusedError: The server rejects it; the same applies to the following methods.
        """
        if experiment.id is not None:
            return
        if experiment.refused is not None:
            raise OperationRefusedError(experiment.refused)
        args = experiment_args(run_context(handle), Path(experiment.path).name, experiment.our_id, project)
        tag = f"{TAG}{experiment.our_id}"

        async def find() -> Args | None:
            rows = await self._list("list_experiments", {"project_id": project, "valid_only": False})
            one_by_one = ("tags", "get_experiment", "experiment_id")
            return await self._first(rows, *one_by_one, lambda row: tag in list_or_empty(row.get("tags")))

        try:
            experiment.id, row = await self._find_or_create(experiment.our_id, "create_experiment", args, find)
        except OperationRefusedError as refused:
            experiment.refused = f"the experiment was refused: {refused.what}"
            raise
        experiment.ended = _has_ended(row)

    async def ensure_group(self, experiment: Experiment, ctx: object, name: str) -> None:
        """Create a group of an existing experiment unless it exists."""
        if name in experiment.groups:
            return

        async def find() -> Args | None:
            rows = await self._list("list_groups", {"experiment_id": experiment.id})
            return next((row for row in rows if row.get("name") == name), None)

        args = {"experiment_id": experiment.id, "name": name}
        our_id = _id_in(ctx, f"group:{name}") or experiment.our_id
        experiment.groups[name], _ = await self._find_or_create(our_id, "create_group", args, find)

    async def ensure_run(self, run: Run, handle: object, project: str | None) -> None:
        """Create a run, and what it belongs to; like EvSys' client, without parents that were rejected."""
        if run.id is not None:
            return
        if run.refused is not None:
            raise OperationRefusedError(run.refused)
        ctx = run_context(handle)
        experiment = self.known.experiments[run.experiment]
        group = getattr(ctx, "group_name", None)
        try:
            await self.ensure_experiment(experiment, handle, project)
            if group is not None:
                await self.ensure_group(experiment, ctx, str(group))
        except OperationRefusedError as refused:
            self._faults.warn("evsys.parent_refused", run.path, run=run.path, why=refused.what)
        parents = {"experiment_id": experiment.id, "group_id": experiment.groups.get(str(group))}
        args = {**parents, **run_args(ctx, handle, run.our_id)}

        async def find() -> Args | None:
            rows = await self._list("list_runs", {"experiment_id": experiment.id})
            one_by_one = ("run_config", "get_run", "run_id")
            return await self._first(
                rows, *one_by_one, lambda row: field(_decode_object(row.get("run_config")), RUN_ID) == run.our_id
            )

        try:
            run.id, row = await self._find_or_create(run.our_id, "create_run", args, find)
        except OperationRefusedError as refused:
            run.refused = f"the run was refused: {refused.what}"
            raise
        run.made_here, run.ended = row is None, _has_ended(row)
        run.checkpoints = set() if row is None else None

    async def ensure_eval(self, run: Run, pending: PendingEval, key: object, args: Args) -> None:
        """Create an eval unless it exists.

        Args:
            run: The run of the eval.
            pending: State of the eval.
            key: Identifies its event.
            args: Arguments of the creation.
        """
        if pending.created:
            return

        async def find() -> Args | None:
            for row in await self._list("list_evals", {"run_id": run.id}):
                is_same = all(row.get(name, args[name]) == args[name] for name in ("benchmark_id", "step", "metrics"))
                if is_same and row.get("id") not in run.claimed:
                    return row
            return None

        pending.id, row = await self._find_or_create(key, "create_eval", args, find, is_new=run.made_here)
        pending.created, pending.doubtful = True, row is not None

    async def find_predictions(self, run: Run, pending: PendingEval) -> None:
        """Find the predictions that were stored already, if that is unknown."""
        if not pending.doubtful:
            return
        rows = await self._list("list_predictions", {"run_id": run.id, "kind": "eval"})
        indexes = [field(row.get("metadata"), INDEX) for row in rows if row.get("eval_id") == pending.id]
        pending.sent |= {index for index in indexes if type(index) is int}
        pending.doubtful = False

    async def ensure_checkpoint(self, run: Run, args: Args) -> None:
        """Create a checkpoint unless it exists."""
        key = (args["label"], args["step"], args["uri"])
        if run.checkpoints is None or (run.our_id, *key) in self._uncertain:
            rows = await self._list("list_checkpoints", {"run_id": run.id})
            run.checkpoints = {(row.get("label"), row.get("step"), row.get("uri")) for row in rows}
        if key not in run.checkpoints:
            await self._call_once((run.our_id, *key), "add_checkpoint", {"run_id": run.id, **args})
            run.checkpoints.add(key)
        self._uncertain.discard((run.our_id, *key))

    async def _find_or_create(
        self,
        key: object,
        op: str,
        args: Args,
        find: Callable[[], Awaitable[Args | None]],
        *,
        is_new: bool = False,
    ) -> tuple[ServerId | None, Args | None]:
        """Return the server's ID of an object, and its row if it existed before.

        Args:
            key: Our ID, or the key of its event.
            op: The operation that creates it.
            args: Arguments of the operation.
            find: Looks it up; returns its row, or None.
            is_new: It cannot exist, unless this process has lost a response.
        """
        created_at = id_time(key) if isinstance(key, str) else None
        cannot_exist = is_new or (created_at is not None and created_at > self._start_time)
        if not cannot_exist or key in self._uncertain:
            row = await find()
            if row is not None:
                self._uncertain.discard(key)
                return server_id(row), row
        found = server_id(await self._call_once(key, op, args))
        if found is None:
            self._uncertain.add(key)
            raise RetryLaterError(f"{op}: the server's response has no id")
        return found, None

    async def _call_once(self, key: object, op: str, args: Args) -> Any:
        """Execute an operation that must happen once; its outcome is uncertain until there is a response."""
        self._uncertain.add(key)
        try:
            result = await self._call(op, args)
        except BatchTooLargeError as error:
            self._uncertain.discard(key)
            raise OperationRefusedError(error.what) from error
        except (OperationRefusedError, ParkedError):
            self._uncertain.discard(key)
            raise
        self._uncertain.discard(key)
        return result

    async def _list(self, op: str, args: Args) -> list[Args]:
        try:
            found = await self._call(op, args)
        except OperationRefusedError as refused:
            fix = "objects created just before a crash may exist twice"
            self._faults.warn("evsys.cannot_look_up", op, op=op, why=refused.what, fix=fix)
            return []
        return [cast("Args", row) for row in list_or_empty(found) if isinstance(row, dict)]

    async def _first(
        self, rows: list[Args], column: str, op: str, name: str, matches: Callable[[Args], bool]
    ) -> Args | None:
        """Return the first matching row; rows that lack the column are requested individually, newest first."""
        for row in rows:
            if column in row and matches(row):
                return row
        for row in [each for each in reversed(rows) if column not in each][:_MAX_LOOKUPS]:
            whole = await self._call(op, {name: server_id(row)})
            if isinstance(whole, dict) and matches(cast("Args", whole)):
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


def _decode_object(value: Any) -> object:
    """Decode a value from a server that stores JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError:
        return None
