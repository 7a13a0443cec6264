"""What pages show of journals, as JSON: how far each adapter is, what its errors are, how long hooks take."""

import contextlib
import time as clock
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from evsys_adapters.common.hook_arguments import fields, list_or_empty
from evsys_adapters.dashboard.details import JournalStatus, journal_in
from evsys_adapters.dashboard.pages import Json
from evsys_adapters.dashboard.records import ExperimentRecord, RunRecord, run_seconds, run_state
from evsys_adapters.dashboard.store import Store
from evsys_bus.tasks import DeliveryStatus

_MAX_STATUSES: Final = 2_000
_ENDED: Final = frozenset({"completed", "failed", "cancelled", "stopped"})


def health(store: Store, now: float | None = None) -> Json:
    """Return how far the deliveries of all journals are, those with errors first, and the figures of the database."""
    now = clock.time() if now is None else now
    records = store.catalogue.records
    rows = store.database.query(
        "SELECT journal, kind, name, time, body FROM journal_status ORDER BY time DESC LIMIT ?", _MAX_STATUSES
    )
    by_journal: dict[str, list[JournalStatus]] = {}
    for journal, kind, name, time, body in rows:
        by_journal.setdefault(journal, []).append(JournalStatus(journal, kind, name, time, msgspec.json.decode(body)))
    journals: list[Json] = []
    for journal, statuses in by_journal.items():
        folder = journal.rstrip("/").rpartition("/")[0]
        run_id = records.find("run path", folder)
        record = None if run_id is None else records.run(run_id)
        experiment_id = records.find("experiment path", folder) if record is None else record.experiment
        experiment = None if experiment_id is None else records.experiment(experiment_id)
        if any(each is not None and each.hidden is not None for each in (record, experiment)):
            continue
        journals.append(
            {
                "journal": journal,
                "run": None if record is None else {"id": record.public, "name": record.key},
                "experiment": None if experiment is None else {"id": experiment.public, "name": experiment.name},
                "state": None if record is None else run_state(record, now),
                "time": max(each.time for each in statuses),
                **_journal_rows(statuses, _runs_of(store, record, experiment), now),
            }
        )
    journals.sort(key=lambda each: (not any(row["last_error"] or row["dead"] for row in each["deliveries"]),))
    [(events, streams)] = store.database.query("SELECT CAST(COALESCE(SUM(seq), 0) AS BIGINT), COUNT(*) FROM stream")
    [(series,)] = store.database.query("SELECT COUNT(*) FROM series")
    return {
        "now": now,
        "store": store.id,
        "database": {
            "path": store.location,
            "bytes": store.database.size_bytes(),
            "events": events,
            "streams": streams,
            "series": series,
            "unreadable": store.catalogue.unreadable_events,
            "refused_points": store.series.refused,
        },
        "journals": journals,
    }


def journal_of_run(store: Store, run: RunRecord, experiment: ExperimentRecord, now: float) -> Json:
    """Return what is known of a run's own journal, else of that of its experiment; see `health`.

    Args:
        store: The store.
        run: The run.
        experiment: Its experiment.
        now: The time by which runs count as stalled.
    """
    for path, owner in ((run.path, run), (experiment.path, None)):
        journal = journal_in(path) if path else None
        statuses = [] if journal is None else store.catalogue.details.statuses([journal])
        if statuses:
            return {"journal": journal, **_journal_rows(statuses, _runs_of(store, owner, experiment), now)}
    return {"journal": None, **_journal_rows([], [run], now)}


def _runs_of(store: Store, run: RunRecord | None, experiment: ExperimentRecord | None) -> Sequence[RunRecord]:
    """Return the runs that a journal is of."""
    if run is not None:
        return [run]
    return [] if experiment is None else store.catalogue.records.runs(experiment.id)


def _journal_rows(statuses: Sequence[JournalStatus], runs: Sequence[RunRecord], now: float) -> Json:
    """Return the deliveries of a journal, the times of its hooks, and whether all of it has arrived once it is ended.

    Args:
        statuses: What couriers have reported of it.
        runs: Those that are recorded in it.
        now: The time by which runs count as stalled.
    """
    steps = sum(run.step + 1 for run in runs if run.step is not None)
    seconds = sum(run_seconds(run, now) or 0.0 for run in runs if run.step is not None)
    deliveries: list[Json] = []
    hooks: list[Json] = []
    for each in statuses:
        if each.kind == "delivery":
            deliveries.append(_delivery_row(each))
        else:
            found = map(fields, list_or_empty(each.body))
            hooks += [{"rank": each.name, **hook, "per_step": _per_step(hook, steps)} for hook in found]
    hooks.sort(key=lambda each: -(each["per_step"] or 0.0))
    receipt = None
    if runs and deliveries and all(run_state(run, now) in _ENDED for run in runs):
        receipt = {
            "complete": not any(each[name] for each in deliveries for name in ("pending", "owed", "dead", "waiting")),
            **{name: sum(each[name] for each in deliveries) for name in ("recorded", "delivered", "dead", "pending")},
            "owed": sum(each["owed"] for each in deliveries),
        }
    return {
        "deliveries": deliveries,
        "hooks": hooks,
        "receipt": receipt,
        "step_seconds": seconds / steps if steps and seconds else None,
    }


def _delivery_row(status: JournalStatus) -> Json:
    """Return a `DeliveryStatus`, with what is to be shown of its errors."""
    body = {"name": status.name, **fields(status.body)}
    try:
        delivery = msgspec.convert(body, DeliveryStatus)
    except msgspec.ValidationError:  # of another version: what fits is shown
        delivery = DeliveryStatus(name=status.name)
        for name, value in body.items():
            with contextlib.suppress(msgspec.ValidationError):
                delivery = msgspec.convert({**msgspec.to_builtins(delivery), name: value}, DeliveryStatus)
    return {
        **msgspec.to_builtins(delivery),
        "adapter": status.name,
        "time": status.time,
        "last_error": delivery.last_error,
        "suggested_fix": delivery.suggested_fix,
    }


def _per_step(hook: Mapping[str, Any], steps: int) -> float | None:
    """Return the seconds that a hook takes of each step."""
    calls, mean = hook.get("calls"), hook.get("mean_seconds")
    if not steps or not isinstance(calls, int) or not isinstance(mean, int | float):
        return None
    return calls * mean / steps
