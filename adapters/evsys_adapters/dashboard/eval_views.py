"""What the pages of evals and checkpoints show, as JSON: scores by arm, predictions page by page, checkpoints."""

import math
import time as clock
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from evsys_adapters.dashboard import pages
from evsys_adapters.dashboard.evals import EvalRow, PredictionFilter
from evsys_adapters.dashboard.pages import Json
from evsys_adapters.dashboard.records import RunRecord
from evsys_adapters.dashboard.store import Store
from evsys_adapters.dashboard.views import (
    MAX_COMPARED,
    NO_UPLOAD,
    NotFoundError,
    RunValues,
    find_experiment,
    find_run,
    shown_arm,
    shown_arms,
    uploads_of,
    values_at,
)
from evsys_bus.context import spread_of

PAGE_ROWS: Final = 50
_MAX_EVAL_NAMES: Final = 500
_MAX_SETS: Final = 400
_MAX_CHECKPOINTS: Final = 5_000
_MAX_SIBLINGS: Final = 24
_EVAL_BITS: Final = 24
"""Of the id of a prediction, those that count within its eval."""
RIGHT: Final = 0.5
"""The reward from which on an answer is right."""

Pick = Literal["all", "a", "b"]
"""All tasks, those that A has right and B wrong, or the other way round."""


def evals(store: Store, public_id: str, now: float | None = None) -> Json:
    """Return the scores of an experiment by eval and arm, its metrics of evals, and which evals have predictions.

    Raises:
        NotFoundError: There is no such experiment.
    """
    record = find_experiment(store, public_id)
    page = pages.experiment(store, public_id, now)
    assert page is not None
    runs = store.catalogue.records.runs(record.id)
    known = dict.fromkeys(name for run in runs for name in run.eval_names)
    headlines = [each["name"] for each in page["headlines"] if each["name"] in known]
    names = list(dict.fromkeys([*headlines, *known]))[:_MAX_EVAL_NAMES]
    values = {run.id: RunValues(run, store.series.names(run.id)) for run in runs}
    by_arm: dict[str, list[RunRecord]] = {name: [] for name in shown_arms(record, runs)}
    for run in runs:
        by_arm.setdefault(shown_arm(run), []).append(run)
    rows: list[Json] = []
    for name in names:
        cells = [_cell(values[run.id].last(name) for run in arm) for arm in by_arm.values()]
        direction = _direction(page, name)
        rows.append({"name": name, "direction": direction, "cells": cells, "best": _best(cells, direction)})
    sets: list[Json] = [
        {
            "id": each.id,
            "name": each.name,
            "kind": each.kind,
            "step": each.step,
            "predictions": each.predictions,
            "run": run.public,
            "run_name": run.key,
            "arm": shown_arm(run),
            "seed": run.seed,
        }
        for run in runs
        for each in store.catalogue.evals.of_run(run.id)
        if each.predictions
    ]
    sets.sort(key=lambda each: (each["step"] is not None, -(each["step"] or 0), each["name"]))
    shown = {*names}
    return {
        "id": record.public,
        "name": record.name,
        "state": page["state"],
        "now": clock.time() if now is None else now,
        "baseline": page["baseline"],
        "arms": [*by_arm],
        "rows": rows,
        "metrics": [each for each in page["metrics"] if each["name"] in shown],
        "sets": sets[:_MAX_SETS],
    }


def predictions(
    store: Store, id_: int, after: int | None, conditions: PredictionFilter, limit: int = PAGE_ROWS
) -> Json:
    """Return some predictions of an eval, and how to continue; see `Evals.predictions`.

    Raises:
        NotFoundError: There is no such eval.
    """
    if store.catalogue.evals.get(id_) is None:
        raise NotFoundError(id_)
    page = store.catalogue.evals.predictions(id_, after, limit, conditions)
    following = page["next"]
    return {
        "rows": [_encodable(row) for row in page["rows"]],
        "next": None if following is None else str(following),
        "searched": page["searched"],
    }


def prediction(store: Store, id_: int) -> Json:
    """Return a prediction with all its texts, and those of other evals of the experiment for the same task.

    Raises:
        NotFoundError: There is no such prediction.
    """
    found = store.catalogue.evals.prediction(id_)
    own = store.catalogue.evals.get(id_ >> _EVAL_BITS)
    run = None if own is None else store.catalogue.records.run(own.run)
    if found is None or own is None or run is None or run.hidden is not None:
        raise NotFoundError(id_)
    others = _same_task(store, id_, own, run)
    return {"prediction": {"id": id_, **_encodable(found), **_origin(own, run)}, "others": others}


def checkpoints(store: Store, public_id: str, now: float | None = None) -> Json:
    """Return the checkpoints of an experiment, the newest first, with the metrics at their steps.

    Raises:
        NotFoundError: There is no such experiment.
    """
    record = find_experiment(store, public_id)
    page = pages.experiment(store, public_id, now)
    assert page is not None
    catalogue = store.catalogue
    shown = [each["name"] for each in page["headlines"]]
    runs = catalogue.records.runs(record.id)
    uploads = uploads_of(store, runs)
    rows: list[Json] = []
    for run in runs:
        series = RunValues(run, store.series.names(run.id)).series
        of_run = catalogue.details.checkpoints(run.id)
        rows += [
            {
                **{name: each.get(name) for name in ("name", "step", "rank", "time", "epoch", "stopped")},
                "path": each.get("state_path") or each.get("sampler_path"),
                "sampler": each.get("sampler_path"),
                "run": run.public,
                "run_name": run.key,
                "arm": shown_arm(run),
                "seed": run.seed,
                **uploads.get((run.key, each["name"]), NO_UPLOAD),
                "values": [],
            }
            for each in of_run
        ]
        recent = rows[len(rows) - len(of_run) :]
        for name in shown:
            at = values_at(store, series.get(name), [row["step"] for row in recent])
            for row, value in zip(recent, at, strict=True):
                row["values"].append(value)
    rows.sort(key=lambda row: -row["time"])
    has_values = [any(row["values"][place] is not None for row in rows) for place in range(len(shown))]
    for row in rows:
        row["values"] = [value for value, has_value in zip(row["values"], has_values, strict=True) if has_value]
    return {
        "id": record.public,
        "name": record.name,
        "state": page["state"],
        "now": clock.time() if now is None else now,
        "arms": shown_arms(record, runs),
        "shown": [
            {"name": each["name"], "direction": each["direction"]}
            for each, has_value in zip(page["headlines"], has_values, strict=True)
            if has_value
        ],
        "total": len(rows),
        "rows": rows[:_MAX_CHECKPOINTS],
    }


def _cell(values: Iterable[float | None]) -> Json:
    spread = spread_of(values)
    return {"mean": spread.mean, "sd": spread.sd, "n": spread.n, "nonfinite": spread.nonfinite}


def _direction(page: Json, name: str) -> pages.Direction | None:
    known = next((each["direction"] for each in page["headlines"] if each["name"] == name), None)
    return known or pages.direction_of(name)


def _best(cells: Sequence[Json], direction: pages.Direction | None) -> int | None:
    """Return the place of the best cell; None if that is not known, or several are."""
    means = [cell["mean"] for cell in cells if cell["mean"] is not None]
    if direction is None or len(means) < 2:  # noqa: PLR2004 # nothing to compare
        return None
    best = min(means) if direction == "min" else max(means)
    places = [place for place, cell in enumerate(cells) if cell["mean"] == best]
    return places[0] if len(places) == 1 else None


def _encodable(row: Mapping[str, Any]) -> Json:
    """Return a row whose integers a browser reads exactly: ids of predictions are texts."""
    return {key: str(value) if key == "id" else value for key, value in row.items()}


def _origin(row: EvalRow, run: RunRecord) -> Json:
    return {
        "of": {
            "eval": row.name,
            "step": row.step,
            "run": run.public,
            "run_name": run.key,
            "arm": shown_arm(run),
            "seed": run.seed,
        }
    }


def _same_task(store: Store, id_: int, own: EvalRow, run: RunRecord) -> list[Json]:
    """Return the predictions for the same task in evals of the same name and step, of other runs of the experiment."""
    evals = store.catalogue.evals
    runs = {each.id: each for each in store.catalogue.records.runs(run.experiment)}
    rows = sorted((row for each in runs for row in evals.named(each, own.name, own.step)), key=lambda row: row.id)
    others: list[Json] = []
    for row in rows:
        if len(others) == _MAX_SIBLINGS:
            break
        for other in evals.of_same_task(id_, row.id, _MAX_SIBLINGS - len(others)):
            found = evals.prediction(other)
            assert found is not None
            others.append({"id": str(other), **_encodable(found), **_origin(row, runs[row.run])})
    return others


def paired(store: Store, public_ids: Sequence[str], name: str, pick: Pick = "all", after: int | None = None) -> Json:
    """Return what several runs have for the same tasks, page by page: the scores of each in the newest eval of a name.

    Args:
        store: The store.
        public_ids: The runs; the first one is A, the second one B.
        name: The eval; if no run has predictions of it, the first one of which several have.
        pick: Which tasks; an answer is right from a reward of 0.5 on.
        after: ``next`` of the page before.

    Returns:
        ``names``, the evals of which at least two runs have predictions; ``evals``, that of each run or None; ``rows``,
        each with the task and the ``scores`` of the runs; ``next``; and ``counts`` of A and B, None for too many tasks.

    Raises:
        NotFoundError: There is no such run.
    """
    runs = [find_run(store, each) for each in dict.fromkeys(public_ids)][:MAX_COMPARED]
    newest: list[dict[str, EvalRow]] = []
    for run in runs:
        of_run = [each for each in store.catalogue.evals.of_run(run.id) if each.predictions]
        of_run.sort(key=lambda each: math.inf if each.step is None else each.step)
        newest.append({each.name: each for each in of_run})
    counts = Counter(each for found in newest for each in found)
    names = [each for each, count in counts.items() if count > 1]
    chosen = name if name in names else next(iter(names), "")
    evals = [found.get(chosen) for found in newest]
    answer: Json = {
        "names": names,
        "name": chosen,
        "evals": [None if each is None else {"id": each.id, "step": each.step} for each in evals],
    }
    known = [each for each in evals if each is not None]
    if not known:
        return {**answer, "rows": [], "next": None, "searched": 0, "of": 0, "counts": None}
    a, b = (known[0], known[1]) if pick != "b" else (known[1], known[0])
    conditions: PredictionFilter = {} if pick == "all" else {"min_reward": RIGHT, "worse_in": b.id}
    page = store.catalogue.evals.predictions(a.id, after, PAGE_ROWS, conditions)
    scores = store.catalogue.evals.scores([row["id"] for row in page["rows"]], [each.id for each in known])
    places = {each.id: place for place, each in enumerate(known)}
    rows = [
        {
            **_encodable(row),
            "scores": [None if each is None else scores[row["id"]][places[each.id]] for each in evals],
        }
        for row in page["rows"]
    ]
    return {
        **answer,
        "rows": rows,
        "next": None if page["next"] is None else str(page["next"]),
        "searched": page["searched"],
        "of": a.predictions,
        "counts": store.catalogue.evals.agreement(known[0], known[1], RIGHT),
    }


def decode_filter(text: str) -> PredictionFilter:
    """Decode the conditions of a request.

    Raises:
        ValueError: They are no conditions.
    """
    try:
        return msgspec.json.decode(text or "{}", type=PredictionFilter)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error
