"""What clients of the hosted service have sent, as the records of the dashboard.

What a client refers to by an id that is not known, because the database is a new one, is created. Fields without a
place of their own are kept in ``extra``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from evsys_adapters.common.hook_arguments import fields, list_or_empty
from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.details import Details
from evsys_adapters.dashboard.evals import EvalKind, EvalRow, Evals
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.records import ExperimentRecord, Records, RunRecord, digest_id
from evsys_adapters.dashboard.values import MAX_NAME_CHARS, json_text

POINT_OPS: Final = frozenset({"log_metric", "log_metrics", "create_eval"})
"""Operations that add points."""
TABLES: Final = [
    """CREATE TABLE IF NOT EXISTS hosted_row (kind TEXT NOT NULL, public TEXT NOT NULL, parent TEXT NOT NULL,
        position INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, public))""",
    "CREATE INDEX IF NOT EXISTS hosted_row_of_parent ON hosted_row (kind, parent, position)",
    """CREATE TABLE IF NOT EXISTS hosted_metric (run INTEGER NOT NULL, series TEXT NOT NULL, name TEXT NOT NULL,
        split TEXT NOT NULL, PRIMARY KEY (run, series))""",
]

_MAX_ROWS: Final = (1 << 63) - 1
"""The largest integer of a column."""
_STATUSES: Final = frozenset({"pending", "running", "completed", "failed", "cancelled"})
_UNGROUPED: Final = "hosted runs"
"""Name of the experiment of runs that were created without one."""
_SEED_SUFFIX: Final = re.compile(r"__s\d+$")
_EXPERIMENT_FIELDS: Final = ("hypothesis", "conclusion", "best_score")
_RUN_FIELDS: Final = ("experiment_id", "group_id", "run_config", "seed", "status", "id")
_EVAL_FIELDS: Final = ("id", "run_id", "step")


class HostedRecords:
    """The rows that clients of the hosted service write and read.

    Args:
        database: Has `TABLES`.
        records: The experiments and runs.
        evals: Their evals and predictions.
        details: Their checkpoints.
    """

    def __init__(self, database: Database, records: Records, evals: Evals, details: Details) -> None:
        self._database: Final = database
        self._records: Final = records
        self._evals: Final = evals
        self._details: Final = details
        self._series: Final[dict[tuple[int, str, str], str]] = {}
        self.operations: Final[dict[str, Callable[[dict[str, Any], float, Changes], Any]]] = {
            "create_experiment": self._create_experiment,
            "update_experiment": self._update_experiment,
            "delete_experiment": self._delete_experiment,
            "create_group": self._create_group,
            "create_run": self._create_run,
            "update_run": self._update_run,
            "log_metrics": self._log_metrics,
            "log_metric": self._log_metrics,
            "create_eval": self._create_eval,
            "add_predictions": self._add_predictions,
            "add_checkpoint": self._add_checkpoint,
            "create_project": self._create_project,
            "delete_project": self._delete_project,
            "set_goal": self._set_goal,
            "create_dataset": self._create_dataset,
            "create_benchmark": self._create_benchmark,
            "add_dataset_rows": self._add_dataset_rows,
            "add_benchmark_rows": self._add_benchmark_rows,
        }
        """By their names; those that change something."""

    # Experiments, groups and runs.

    def ensure_experiment(self, public: str | None, time: float) -> ExperimentRecord:
        """Return the experiment with this id, a new one if there is none; that of single runs if it is None."""
        public = public or digest_id(_UNGROUPED)
        known = self._records.find("experiment", public)
        record = None if known is None else self._records.experiment(known)
        if record is None:
            name = _UNGROUPED if public == digest_id(_UNGROUPED) else public
            record = ExperimentRecord(self._records.next_id("experiment"), public, name, started=time)
            self._records.add_experiment(record)
        return record

    def ensure_run(self, public: str, time: float) -> RunRecord:
        """Return the run with this id, a new one if there is none."""
        known = self._records.find("run", public)
        record = None if known is None else self._records.run(known)
        return record or self._new_run(public, self.ensure_experiment(None, time), public, time)

    def _new_run(self, public: str, experiment: ExperimentRecord, key: str, time: float) -> RunRecord:
        run = RunRecord(self._records.next_id("run"), experiment.id, public, key, started=time, last=time)
        self._records.add_run(run)
        return run

    def _create_experiment(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        record = self.ensure_experiment(str(args["id"]), time)
        record.name = str(args.get("experiment_name") or record.name)[:MAX_NAME_CHARS]
        record.config = fields(args.get("config"))
        success = fields(record.config.get("success_metric"))
        record.success_metric = str(success["name"]) if success.get("name") else None
        record.success_mode = success.get("mode") if success.get("mode") in {"min", "max"} else None
        self._patch_experiment(record, {k: v for k, v in args.items() if k not in {"id", "experiment_name"}}, time)
        changes.experiments.add(record.id)
        return self.experiment_row(record)

    def _update_experiment(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        record = self.ensure_experiment(str(args["experiment_id"]), time)
        self._patch_experiment(record, fields(args.get("patch")), time)
        changes.experiments.add(record.id)
        return self.experiment_row(record)

    def _patch_experiment(self, record: ExperimentRecord, patch: Mapping[str, Any], time: float) -> None:
        record.last = time
        extra = dict(record.extra)
        for name, value in patch.items():
            if name == "status":
                record.status = _status(value)
                record.ended = time if record.status in {"completed", "failed", "cancelled"} else None
            elif name == "tags":
                record.tags = [str(each) for each in list_or_empty(value)]
            elif name == "error_message":
                record.error = None if value is None else str(value)
            elif name == "best_score":
                record.best_score = float(value) if isinstance(value, int | float) else None
            elif name in _EXPERIMENT_FIELDS:
                setattr(record, name, None if value is None else str(value))
            elif name != "config":
                extra[name] = value
        record.extra = extra
        self._records.touch(record)

    def _create_group(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        experiment = self.ensure_experiment(args.get("experiment_id"), time)
        name = str(args.get("name"))
        experiment.groups += [] if name in experiment.groups else [name]
        self._records.touch(experiment)
        changes.experiments.add(experiment.id)
        return self._add_row("group", experiment.public, {**args, "description": args.get("description")})

    def _create_run(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        experiment = self.ensure_experiment(args.get("experiment_id"), time)
        config = fields(args.get("run_config"))
        group = self.row("group", str(args.get("group_id"))) or {}
        key = str(config.get("name") or f"run-{self._records.next_id('run')}")[:MAX_NAME_CHARS]
        run = self._new_run(str(args["id"]), experiment, key, time)
        run.config = config
        seed = args.get("seed", config.get("seed"))
        run.seed = seed if type(seed) is int else None
        run.group = group.get("name")
        arm = config.get("arm") or run.group or _SEED_SUFFIX.sub("", key)
        run.arm = str(arm)[:MAX_NAME_CHARS]
        run.status = _status(args.get("status") or "pending")
        run.extra = {name: value for name, value in args.items() if name not in _RUN_FIELDS}
        if args.get("group_id"):
            run.extra["group_id"] = args["group_id"]
        url = args.get("wandb_run_url")
        run.extras = {"wandb_url": url} if url else {}
        changes.runs.add(run.id)
        changes.experiments.add(experiment.id)
        return self.run_row(run)

    def _update_run(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        run = self.ensure_run(str(args["run_id"]), time)
        run.last = time
        extra = dict(run.extra)
        for name, value in fields(args.get("patch")).items():
            if name == "status":
                run.status = _status(value)
                run.ended = time if run.status in {"completed", "failed", "cancelled"} else None
            elif name == "error_message":
                run.error = None if value is None else str(value)
            elif name == "summary":
                run.summary = run.summary | fields(value)
            elif name == "run_config":
                run.config = fields(value)
            else:
                extra[name] = value
        run.extra = extra
        self._records.touch(run)
        self._records.touch_progress(run)
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        return self.run_row(run)

    def _delete_experiment(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        known = self._records.find("experiment", str(args["experiment_id"]))
        record = None if known is None else self._records.experiment(known)
        if record is not None:
            record.hidden, record.expired = time, None
            self._records.touch(record)
            changes.experiments.add(record.id)
        return {"deleted": record is not None}

    def experiment_row(self, record: ExperimentRecord) -> dict[str, Any]:
        """Return an experiment as the hosted service would."""
        runs = self._records.runs(record.id)
        return {
            **record.extra,
            "id": record.public,
            "experiment_name": record.name,
            "status": record.status or "running",
            "hypothesis": record.hypothesis,
            "conclusion": record.conclusion,
            "tags": record.tags,
            "best_score": record.best_score,
            "error_message": record.error,
            "config": record.config,
            "trigger": record.config.get("trigger"),
            "n_runs": len(runs),
            "_created_at": record.started,
        }

    def run_row(self, run: RunRecord) -> dict[str, Any]:
        """Return a run as the hosted service would."""
        experiment = self._records.experiment(run.experiment)
        return {
            "group_id": None,
            **run.extra,
            "id": run.public,
            "experiment_id": None if experiment is None else experiment.public,
            "run_config": run.config,
            "seed": run.seed,
            "status": run.status or "running",
            "error_message": run.error,
            "summary": run.summary,
            "_created_at": run.started,
        }

    # Metrics, evals, predictions, checkpoints.

    def _log_metrics(self, args: dict[str, Any], time: float, changes: Changes) -> list[Any]:
        run = self.ensure_run(str(args["run_id"]), time)
        if run.status == "pending":
            run.status = None
            self._records.touch(run)
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        return []

    def series_name(self, run: RunRecord, name: str, split: str) -> str:
        """Return the series of a metric, and keep what it is called by the client."""
        known = self._series.get((run.id, name, split))
        if known is not None:
            return known
        series = name if "/" in name else f"{split}/{name}"
        rows = self._database.query(
            "SELECT name, split FROM hosted_metric WHERE run = ? AND series = ?", run.id, series
        )
        while rows and rows[0] != (name, split):  # another metric has it
            series = f"{split}/{series}"
            rows = self._database.query(
                "SELECT name, split FROM hosted_metric WHERE run = ? AND series = ?", run.id, series
            )
        self._database.execute(
            "INSERT INTO hosted_metric (run, series, name, split) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (run, series) DO NOTHING",
            *(run.id, series, name, split),
        )
        if split != "train" and series not in run.eval_names:
            run.eval_names.append(series)
            self._records.touch(run)
        self._series[run.id, name, split] = series
        return series

    def metrics_of(self, run: int) -> dict[str, tuple[str, str]]:
        """Return the names and splits of a run's metrics, by series."""
        rows = self._database.query("SELECT series, name, split FROM hosted_metric WHERE run = ?", run)
        return {series: (name, split) for series, name, split in rows}

    def _create_eval(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        run = self.ensure_run(str(args["run_id"]), time)
        benchmark, step = args.get("benchmark_id"), args.get("step")
        name = str(benchmark or "eval")
        body = {key: value for key, value in args.items() if key not in _EVAL_FIELDS}
        body.setdefault("metrics", {})
        at = step if type(step) is int else None
        replaced = [
            each for each in self._evals.of_run(run.id) if (each.name, each.step, each.kind) == (name, at, "benchmark")
        ]
        id_ = self._evals.add(run.id, 0, "benchmark", name, at, time, {**body, "id": str(args["id"])}, (), name)
        for each in replaced:  # a call that was repeated: rows for the first one belong to this one
            self._records.name("eval", str(each.body.get("id")), id_)
        self._records.name("eval", str(args["id"]), id_)
        run.last = time
        values = {f"{name}/{key}": value for key, value in fields(body["metrics"]).items() if _is_number(value)}
        run.eval_names += [each for each in values if each not in run.eval_names]
        if at is None:
            run.finals = run.finals | {key: float(value) for key, value in values.items()}
        self._records.touch(run)
        self._records.touch_progress(run)
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        found = self._evals.get(id_)
        assert found is not None
        return self.eval_row(found, run)

    def eval_row(self, row: EvalRow, run: RunRecord) -> dict[str, Any]:
        """Return an eval as the hosted service would."""
        return {
            "breakdowns": None,
            "checkpoint_id": None,
            "benchmark_id": row.name,
            "id": self.eval_public_id(row),
            **row.body,
            "run_id": run.public,
            "step": row.step,
        }

    def eval_public_id(self, row: EvalRow) -> str:
        """Return the id of an eval as clients know it."""
        return str(row.body.get("id") or row.id)

    def find_eval(self, public: str) -> EvalRow | None:
        """Return an eval by the id that clients know."""
        known = self._records.find("eval", public)
        if known is None and public.isdecimal():
            known = int(public)
        return None if known is None else self._evals.get(known)

    def _add_predictions(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        """Add the rows in ``predictions``, of one run."""
        run = self.ensure_run(str(args["run_id"]), time)
        ids: list[int] = []
        for row in list_or_empty(args.get("predictions")):
            values = {key: value for key, value in fields(row).items() if key not in {"id", "run_id", "eval_id"}}
            kind, step = str(values.get("kind") or "eval"), values.get("step")
            at = step if type(step) is int else None
            known = self.find_eval(str(values.get("eval_id") or fields(row).get("eval_id") or ""))
            if known is None:
                kind_of_eval: EvalKind = "benchmark" if kind == "eval" else "rollout"
                known = self._evals.find(run.id, kind_of_eval, at)
                if known is None or known.name != kind:
                    id_ = self._evals.add(run.id, 0, kind_of_eval, kind, at, time, {"metrics": {}})
                    known = self._evals.get(id_)
            assert known is not None
            if values.get("model_output") is not None:
                values.setdefault("output", values.pop("model_output"))
            ids.append(self._evals.append(known.id, [values]))
        run.last = time
        self._records.touch_progress(run)
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        return {"ids": ids}

    def prediction_row(self, row: Mapping[str, Any], eval_row: EvalRow, run: RunRecord) -> dict[str, Any]:
        """Return a prediction as the hosted service would."""
        found = dict(row)
        if "output" in found:
            found.setdefault("model_output", found.pop("output"))
        defaults = dict.fromkeys(("task_id", "instruction", "model_output", "expected", "reward", "metadata"))
        is_rollout = eval_row.kind == "rollout"
        more = {"kind": "train" if is_rollout else "eval", "step": eval_row.step, "sample_idx": 0}
        found["id"] = str(row["id"])
        return {
            **(defaults | more | found),
            "run_id": run.public,
            "eval_id": None if is_rollout else self.eval_public_id(eval_row),
        }

    def _add_checkpoint(self, args: dict[str, Any], time: float, changes: Changes) -> dict[str, Any]:
        run = self.ensure_run(str(args["run_id"]), time)
        step = args.get("step")
        at = step if type(step) is int else 0
        name = str(args.get("label") or (f"step_{at}" if step is not None else "checkpoint"))
        body = {**args, "sampler_path": args.get("uri"), "run_id": run.public}
        run.checkpoints = self._details.add_checkpoint(run.id, 0, name, at, time, body)
        run.last = time
        self._records.touch(run)
        self._records.touch_progress(run)
        changes.runs.add(run.id)
        changes.experiments.add(run.experiment)
        return {"label": None, "step": None, "base_model": None, "is_final": False, **args, "run_id": run.public}

    # Rows that the dashboard only keeps: projects, goals, data sets and benchmarks.

    def _add_row(self, kind: str, parent: str, body: Mapping[str, Any]) -> dict[str, Any]:
        position = body.get("idx")
        if position is None:
            of_parent = "SELECT COUNT(*) FROM hosted_row WHERE kind = ? AND parent = ?"
            position = self._database.query(of_parent, kind, parent)[0][0]
        self._database.execute(
            "INSERT INTO hosted_row (kind, public, parent, position, body) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, public) DO UPDATE SET body = excluded.body",
            *(kind, str(body["id"]), parent, int(position), json_text(body)),
        )
        return dict(body)

    def row(self, kind: str, public: str) -> dict[str, Any] | None:
        """Return a row, or None."""
        found = self._database.query("SELECT body FROM hosted_row WHERE kind = ? AND public = ?", kind, public)
        return msgspec.json.decode(found[0][0]) if found else None

    def rows(self, kind: str, parent: str | None = None, limit: int = -1, offset: int = 0) -> list[dict[str, Any]]:
        """Return the rows of a kind in their order, all or those of a parent."""
        where, args = ("", ()) if parent is None else (" AND parent = ?", (parent,))
        page = _MAX_ROWS if limit < 0 else min(limit, _MAX_ROWS), min(max(offset, 0), _MAX_ROWS)
        found = self._database.query(
            f"SELECT body FROM hosted_row WHERE kind = ?{where} ORDER BY position, public LIMIT ? OFFSET ?",  # noqa: S608 # no input
            *(kind, *args, *page),
        )
        return [msgspec.json.decode(body) for (body,) in found]

    def _create_project(self, args: dict[str, Any], time: float, _: Changes) -> dict[str, Any]:
        return self._add_row("project", "", {"description": None, **args, "_created_at": time})

    def _delete_project(self, args: dict[str, Any], time: float, _: Changes) -> dict[str, Any]:
        del time
        public = str(args["project_id"])
        is_known = self.row("project", public) is not None
        self._database.execute("DELETE FROM hosted_row WHERE kind = 'project' AND public = ?", public)
        return {"deleted": is_known}

    def _set_goal(self, args: dict[str, Any], time: float, _: Changes) -> dict[str, Any]:
        return self._add_row("goal", str(args["project_id"]), {**args, "_created_at": time})

    def _create_dataset(self, args: dict[str, Any], time: float, _: Changes) -> dict[str, Any]:
        return self._add_row("dataset", str(args.get("project_id") or ""), {**args, "_created_at": time})

    def _create_benchmark(self, args: dict[str, Any], time: float, _: Changes) -> dict[str, Any]:
        return self._add_row("benchmark", str(args.get("project_id") or ""), {**args, "_created_at": time})

    def _add_dataset_rows(self, args: dict[str, Any], _: float, __: Changes) -> list[dict[str, Any]]:
        return self._add_rows("dataset", str(args["dataset_id"]), list_or_empty(args.get("rows")), args)

    def _add_benchmark_rows(self, args: dict[str, Any], _: float, __: Changes) -> list[dict[str, Any]]:
        return self._add_rows("benchmark", str(args["benchmark_id"]), list_or_empty(args.get("rows")), args)

    def _add_rows(self, kind: str, parent: str, rows: Sequence[Any], args: Mapping[str, Any]) -> list[dict[str, Any]]:
        start = args.get("start_idx")
        first = start if type(start) is int else 0
        found: list[dict[str, Any]] = []
        for position, each in enumerate(rows, start=first):
            body = fields(each) or {"value": each}
            found.append({**body, "id": f"{parent}-{position}", f"{kind}_id": parent, "idx": position})
        for each in found:
            self._add_row(f"{kind} row", parent, each)
        return found

    def remove_experiment(self, experiment: int) -> None:
        """Remove the groups of an experiment."""
        record = self._records.experiment(experiment)
        if record is not None:
            self._database.execute("DELETE FROM hosted_row WHERE kind = 'group' AND parent = ?", record.public)

    def remove_run(self, run: int) -> None:
        """Remove the names of a run's metrics and evals, as long as the evals exist."""
        for row in self._evals.of_run(run):
            self._records.forget("eval", row.id)
        self._database.execute("DELETE FROM hosted_metric WHERE run = ?", run)
        self._series.clear()


def metrics_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a call: of ``log_metrics``, or the single one of ``log_metric``."""
    metrics = {str(args["name"]): args.get("value")} if "name" in args else fields(args.get("metrics"))
    return {name[:MAX_NAME_CHARS]: value for name, value in metrics.items()}


def _status(value: object) -> str | None:
    """Return a status as records have it: None for a run in progress."""
    return str(value) if value in _STATUSES and value != "running" else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
