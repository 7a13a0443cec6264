"""What EvSys' own clients speak to the hosted service, answered from the database of the dashboard.

`call` answers the gateway, ``POST sdk/data/``; `rest` answers the older routes below ``sdk/`` as well. A client may
raise a 4xx in the user's program, so it comes only for what could not be meant: an unknown operation or route, a
missing argument, a step that is no number. Unknown fields are kept, unknown ids are created, steps stay as they were
sent.
"""

import math
import time as clock
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast
from urllib.parse import unquote

import msgspec

from evsys_adapters.common.hook_arguments import fields, list_or_empty
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.records import ExperimentRecord, RunRecord
from evsys_adapters.dashboard.series import MAX_STEP
from evsys_adapters.dashboard.store import Store
from evsys_adapters.dashboard.values import UNREADABLE, clean
from evsys_bus.context import to_int
from evsys_bus.errors import did_you_mean

Args = dict[str, Any]
Answer = tuple[int, dict[str, Any]]

PREFIX: Final = "/api/dashboard/api/"
_CREATIONS: Final = frozenset(
    {"create_project", "set_goal", "create_experiment", "create_group", "create_run", "create_eval", "add_checkpoint"}
    | {"create_dataset", "create_benchmark"}
)
"""Operations whose row gets an id."""
_REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "get_project": ("project_id",),
    "delete_project": ("project_id",),
    "set_goal": ("project_id",),
    "list_goals": ("project_id",),
    "current_goal": ("project_id",),
    "get_experiment": ("experiment_id",),
    "update_experiment": ("experiment_id",),
    "delete_experiment": ("experiment_id",),
    "experiment_detail": ("experiment_id",),
    "create_group": ("name",),
    "list_groups": ("experiment_id",),
    "get_run": ("run_id",),
    "update_run": ("run_id",),
    "log_metric": ("run_id", "step", "name", "value"),
    "log_metrics": ("run_id", "step", "metrics"),
    "get_metrics": ("run_id",),
    "create_eval": ("run_id",),
    "list_evals": ("run_id",),
    "add_prediction": ("run_id",),
    "list_predictions": ("run_id",),
    "add_checkpoint": ("run_id",),
    "list_checkpoints": ("run_id",),
    "add_dataset_rows": ("dataset_id",),
    "add_benchmark_rows": ("benchmark_id",),
    "get_dataset": ("dataset_id",),
    "get_dataset_rows": ("dataset_id",),
    "get_benchmark": ("benchmark_id",),
    "get_benchmark_rows": ("benchmark_id",),
}
_NAMED_METRICS: Final = ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_sec")
"""Metrics that a client may send beside the others."""
_IDS: Final = ("project_id", "experiment_id", "group_id", "run_id", "eval_id", "dataset_id", "benchmark_id")


class HostedError(Exception):
    """A call that cannot be answered.

    Attributes:
        status: Of HTTP: 400 or 404.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status: Final = status
        self.message: Final = message


def call(
    store: Store, op: str, args: Mapping[str, Any], changes: Changes | None = None, now: float | None = None
) -> Any:  # JSON, of a shape that depends on the operation
    """Answer an operation of the gateway with its ``result``.

    Args:
        store: The database. A call that changes something is a transaction, or joins the one that is open.
        op: The operation.
        args: Its arguments.
        changes: Receives what the call changes.
        now: The time of the call.

    Raises:
        HostedError: The operation is unknown, or an argument is missing or cannot be used.
        StoreError: The disk refused the transaction.
    """
    read, operations = _READS.get(op), store.catalogue.hosted.operations
    if read is None and op not in operations and op != "add_prediction":
        names = sorted({*_READS, *operations, "add_prediction"})
        raise HostedError(400, f"unknown op {op!r:.80}; {did_you_mean(op, names) or 'known are ' + ', '.join(names)}")
    given = _valid_unicode(args)
    for name in _REQUIRED.get(op, ()):
        if given.get(name) is None:
            raise HostedError(400, f"{op} needs {name}")
    for name in _IDS:
        if name in given and given[name] is not None:
            given[name] = str(given[name])
    _read_step(op, given)
    try:
        if read is not None:
            return read(store, given)
        return _write(store, op, given, changes, clock.time() if now is None else now)
    except UNREADABLE as error:
        raise HostedError(400, f"{op} cannot be carried out: {type(error).__name__}: {error!s:.200}") from error


def rest(
    store: Store, path: str, body: Mapping[str, Any], changes: Changes | None = None, now: float | None = None
) -> Answer:
    """Answer a POST below the prefix: its HTTP status, and its JSON.

    Args:
        store: As of `call`.
        path: The path, with or without the prefix and the slashes at its ends.
        body: The JSON object that was sent.
        changes: As of `call`.
        now: As of `call`.

    Raises:
        HostedError: There is no such route; or as of `call`.
        StoreError: The disk refused the transaction.
    """
    parts = [unquote(part) for part in path.removeprefix(PREFIX.rstrip("/")).split("/") if part]

    def do(op: str, args: Mapping[str, Any]) -> Any:
        return call(store, op, args, changes, now)

    match parts:
        case ["sdk", "data"]:
            return 200, {"result": do(str(body.get("op")), fields(body.get("args")))}
        case ["sdk", ("experiments" | "runs") as kind]:
            noun = kind.removesuffix("s")
            return 201, {noun: do(f"create_{noun}", body)}
        case ["sdk", ("experiments" | "runs") as kind, public]:
            noun = kind.removesuffix("s")
            do(f"update_{noun}", {f"{noun}_id": public, "patch": body})
            return 200, {f"{noun}_id": public, "patched": [*body]}
        case ["sdk", "runs", public, ("metrics" | "evals" | "checkpoints" | "predictions") as part]:
            return _add_to_run(do, part, {**body, "run_id": public})
        case _:
            raise HostedError(404, f"there is no route {path!r:.120}")


def _add_to_run(do: Callable[[str, Args], Any], part: str, args: Args) -> Answer:
    if part == "metrics":
        named = {name: args[name] for name in _NAMED_METRICS if args.get(name) is not None}
        do("log_metrics", {**args, "metrics": {**named, **fields(args.get("metrics"))}})
        return 200, {"ok": True}
    if part == "predictions":
        rows = list_or_empty(args.get("predictions"))
        do("add_predictions", {"run_id": args["run_id"], "predictions": rows})
        return 201, {"ok": True, "inserted": len(rows)}
    noun = part.removesuffix("s")
    row = do("create_eval" if part == "evals" else "add_checkpoint", args)
    return 201, {"ok": True, "id": row["id"], noun: row}


def _valid_unicode(args: Mapping[str, Any]) -> Args:
    """Return a copy of the arguments, without the half characters that JSON can have and no database takes."""
    try:
        msgspec.json.encode(args)
    except (UnicodeEncodeError, TypeError):
        return clean(args)
    return {**args}


def _read_step(op: str, args: Args) -> None:
    """Make an int of the step, which may be a whole float or the text of a number."""
    step = args.get("step")
    if step is None:
        return
    try:
        args["step"] = step if type(step) is int else int(step) if isinstance(step, str) else to_int(step)
    except (TypeError, ValueError) as error:
        raise HostedError(400, f"the step of {op} is {step!r:.60}, which is no whole number") from error
    if abs(args["step"]) >= MAX_STEP:
        raise HostedError(400, f"the step of {op} is {step!r:.60}, which has more than 53 bits")


def _write(store: Store, op: str, args: Args, changes: Changes | None, now: float) -> Any:
    catalogue = store.catalogue
    if op in _CREATIONS:
        args["id"] = str(uuid.uuid4())
    if op == "create_experiment" and args.get("project_id"):
        _ensure_project(store, str(args["project_id"]), now)
    failure: Exception | None = None
    result: Any = None
    collected = Changes() if changes is None else changes
    with store.transaction() as changed:
        try:
            if op == "add_prediction":
                (id_,) = catalogue.call(
                    "add_predictions", {"run_id": args["run_id"], "predictions": [args]}, now, changed
                )["ids"]
                result = {**args, "id": str(id_)}
            else:
                result = catalogue.call(op, args, now, changed)
        except UNREADABLE as error:  # an error inside the block would cost the store
            failure = error
    collected.update(changed)
    if failure is not None:
        raise failure
    return result


def _ensure_project(store: Store, public: str, now: float) -> None:
    if store.catalogue.hosted.row("project", public) is None:
        with store.transaction() as changed:
            store.catalogue.call("create_project", {"id": public, "name": public}, now, changed)


# -- what is read


def _experiment(store: Store, args: Args) -> ExperimentRecord | None:
    known = store.catalogue.experiment_id(str(args.get("experiment_id")))
    record = None if known is None else store.catalogue.records.experiment(known)
    return None if record is None or record.hidden is not None else record


def _run(store: Store, args: Args) -> RunRecord | None:
    known = store.catalogue.run_id(str(args.get("run_id")))
    return None if known is None else store.catalogue.records.run(known)


def _get_project(store: Store, args: Args) -> Any:
    return store.catalogue.hosted.row("project", args["project_id"])


def _list_projects(store: Store, _: Args) -> Any:
    return store.catalogue.hosted.rows("project")


def _list_goals(store: Store, args: Args) -> Any:
    return store.catalogue.hosted.rows("goal", args["project_id"])


def _current_goal(store: Store, args: Args) -> Any:
    return next(reversed(store.catalogue.hosted.rows("goal", args["project_id"])), None)


def _get_experiment(store: Store, args: Args) -> Any:
    record = _experiment(store, args)
    return None if record is None else store.catalogue.hosted.experiment_row(record)


def _list_experiments(store: Store, args: Args) -> Any:
    """Return the experiments, newest first."""
    rows = [store.catalogue.hosted.experiment_row(each) for each in store.catalogue.records.experiments()]
    project = args.get("project_id")
    chosen = [row for row in rows if project is None or row.get("project_id") == project]
    if args.get("valid_only"):
        chosen = [row for row in chosen if row.get("is_valid") is not False]
    return sorted(chosen, key=lambda row: -(row["_created_at"] or 0.0))


def _experiment_detail(store: Store, args: Args) -> Any:
    record = _experiment(store, args)
    if record is None:
        return None
    with_metrics = args.get("include_metrics", True)
    groups = [{**group, "runs": list[Any]()} for group in _list_groups(store, args)]
    by_id = {group["id"]: group for group in groups}
    by_name = {group["name"]: group for group in groups}
    ungrouped: list[Any] = []
    for run in store.catalogue.records.runs(record.id):
        row = store.catalogue.hosted.run_row(run)
        given = {"run_id": run.public}
        row["metrics"] = _get_metrics(store, given) if with_metrics else []
        row["evals"] = _list_evals(store, given)
        row["checkpoints"] = _list_checkpoints(store, given)
        kinds = store.catalogue.evals.of_run(run.id)
        counts: dict[str, int] = {}
        for each in kinds:
            kind = "train" if each.kind == "rollout" else "eval"
            counts[kind] = counts.get(kind, 0) + each.predictions
        row["rollout_counts"] = {kind: count for kind, count in counts.items() if count}
        group = by_id.get(row["group_id"]) or by_name.get(run.group)
        (ungrouped if group is None else group["runs"]).append(row)
    return {
        "experiment": store.catalogue.hosted.experiment_row(record),
        "groups": groups,
        "ungrouped_runs": ungrouped,
    }


def _list_groups(store: Store, args: Args) -> Any:
    rows = store.catalogue.hosted.rows("group", args["experiment_id"])
    record = _experiment(store, args)
    named = {row["name"] for row in rows}
    more = [] if record is None else [name for name in record.groups if name not in named]
    return [*rows, *({"id": name, "name": name, "description": None} for name in more)]


def _get_run(store: Store, args: Args) -> Any:
    run = _run(store, args)
    return None if run is None or run.hidden is not None else store.catalogue.hosted.run_row(run)


def _list_runs(store: Store, args: Args) -> Any:
    catalogue = store.catalogue
    if args.get("experiment_id") is not None:
        record = _experiment(store, args)
        experiments = [] if record is None else [record]
    else:
        experiments = catalogue.records.experiments()
    rows = [catalogue.hosted.run_row(run) for each in experiments for run in catalogue.records.runs(each.id)]
    group = args.get("group_id")
    return [row for row in rows if group is None or row["group_id"] == group]


def _get_metrics(store: Store, args: Args) -> Any:
    """Return the points of a run by step: ``step``, ``name``, ``value`` and ``split``."""
    run = _run(store, args)
    if run is None:
        return []
    called = store.catalogue.hosted.metrics_of(run.id)
    rows: list[Args] = []
    for info in store.series.names(run.id):
        name, split = called.get(info.name) or _name_and_split(info.name)
        if args.get("name") not in {None, name} or args.get("split") not in {None, split}:
            continue
        line = store.series.read([info.id], width=1).lines[0]
        rows += [
            {"step": int(step), "name": name, "value": float(value), "split": split}
            for step, value in zip(line.x, line.last, strict=True)
            if math.isfinite(value)
        ]
    return sorted(rows, key=lambda row: row["step"])


def _name_and_split(series: str) -> tuple[str, str]:
    """Return what the hosted service would call a series of ours."""
    head, _, rest_of_name = series.partition("/")
    return (rest_of_name, "train") if head == "train" else (series, "val")


def _list_evals(store: Store, args: Args) -> Any:
    run = _run(store, args)
    if run is None:
        return []
    rows = [each for each in store.catalogue.evals.of_run(run.id) if each.kind == "benchmark"]
    return [store.catalogue.hosted.eval_row(each, run) for each in rows]


def _list_predictions(store: Store, args: Args) -> Any:
    run, catalogue = _run(store, args), store.catalogue
    if run is None:
        return []
    rows: Iterable[Args] = (
        catalogue.hosted.prediction_row(each, row, run)
        for row in catalogue.evals.of_run(run.id)
        for each in catalogue.evals.whole_predictions(row.id)
    )
    return [row for row in rows if args.get("kind") in {None, row["kind"]}]


def _list_checkpoints(store: Store, args: Args) -> Any:
    run = _run(store, args)
    if run is None:
        return []
    found: list[Args] = []
    for row in store.catalogue.details.checkpoints(run.id):
        uri = row.get("uri") or row.get("sampler_path") or row.get("state_path")
        more = {key: value for key, value in row.items() if key not in {"name", "rank", "time", "sampler_path"}}
        defaults = {"id": f"{run.public}-{row['name']}", "label": row["name"], "base_model": None, "is_final": False}
        found.append({**defaults, **more, "run_id": run.public, "uri": uri})
    return found


def _rows_of(kind: str, key: str) -> Callable[[Store, Args], Any]:
    def read(store: Store, args: Args) -> Any:
        limit, offset = args.get("limit"), args.get("offset")
        return store.catalogue.hosted.rows(
            f"{kind} row", args[key], 100 if limit is None else int(limit), int(offset or 0)
        )

    return read


def _row_of(kind: str, key: str) -> Callable[[Store, Args], Any]:
    return lambda store, args: store.catalogue.hosted.row(kind, args[key])


def _list_of(kind: str) -> Callable[[Store, Args], Any]:
    return lambda store, args: store.catalogue.hosted.rows(kind, cast("str | None", args.get("project_id")))


_READS: Final[Mapping[str, Callable[[Store, Args], Any]]] = {
    "get_project": _get_project,
    "list_projects": _list_projects,
    "list_goals": _list_goals,
    "current_goal": _current_goal,
    "get_experiment": _get_experiment,
    "list_experiments": _list_experiments,
    "experiment_summaries": _list_experiments,
    "experiment_detail": _experiment_detail,
    "list_groups": _list_groups,
    "get_run": _get_run,
    "list_runs": _list_runs,
    "get_metrics": _get_metrics,
    "list_evals": _list_evals,
    "list_predictions": _list_predictions,
    "list_checkpoints": _list_checkpoints,
    "get_dataset": _row_of("dataset", "dataset_id"),
    "list_datasets": _list_of("dataset"),
    "get_dataset_rows": _rows_of("dataset", "dataset_id"),
    "get_benchmark": _row_of("benchmark", "benchmark_id"),
    "list_benchmarks": _list_of("benchmark"),
    "get_benchmark_rows": _rows_of("benchmark", "benchmark_id"),
}
