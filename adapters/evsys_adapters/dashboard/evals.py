"""Evals, benchmarks and rollouts of runs, and their predictions, page by page.

The id of a prediction is ``eval << 24 | n``, so that the primary key holds those of one eval in their order. A long
text is stored once, however many predictions have it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, Final, Literal, NamedTuple, TypedDict, cast

import msgspec

from evsys_adapters.common.logged_values import text_of
from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.values import json_text

TABLES: Final = [
    """CREATE TABLE IF NOT EXISTS evaluation (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, rank INTEGER NOT NULL,
        kind TEXT NOT NULL, name TEXT NOT NULL, benchmark TEXT NOT NULL, step INTEGER, time REAL NOT NULL,
        predictions INTEGER NOT NULL, body TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS evaluation_of_run ON evaluation (run, step)",
    """CREATE TABLE IF NOT EXISTS prediction (id INTEGER PRIMARY KEY, task INTEGER NOT NULL, reward REAL,
        body TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS prediction_of_task ON prediction (task, id)",
    "CREATE TABLE IF NOT EXISTS long_text (digest TEXT PRIMARY KEY, body TEXT NOT NULL)",
]

EvalKind = Literal["eval", "benchmark", "rollout"]
_SHIFT: Final = 24
MAX_PREDICTIONS: Final = 1 << _SHIFT
"""Of one eval; further ones are counted only."""
_MAX_EVAL: Final = (1 << 63 - _SHIFT) - 1
"""The largest id of an eval whose predictions have ids of 64 bits."""
_MAX_INLINE: Final = 256
"""Longer texts are stored apart."""
_PREVIEW: Final = 300
_MAX_SEARCHED: Final = 50_000
_MAX_COMPARED: Final = 20_000
"""With a text, of which each comparison takes some microseconds."""
_MAX_PAIRED: Final = 20_000
"""Predictions of an eval that are compared one by one with those of another."""
_BATCH: Final = 500
_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


class EvalRow(NamedTuple):
    """An eval as stored."""

    id: int
    run: int
    rank: int
    kind: str
    name: str
    benchmark: str
    step: int | None
    time: float
    predictions: int
    body: dict[str, Any]
    """``metrics``, and of benchmarks ``breakdowns``, ``tags`` and ``eval_seconds``."""


class PredictionFilter(TypedDict, total=False):
    """Which predictions of an eval to return; all conditions must hold."""

    text: str
    """Occurs in one of the texts, in any case."""
    min_reward: float
    below_reward: float
    worse_in: int
    """Id of another eval, in which the same task has a reward below `min_reward`, or a smaller one without that."""
    kind: str


class PredictionPage(TypedDict):
    """Some predictions in their order."""

    rows: list[dict[str, Any]]
    next: int | None
    """Pass it as ``after`` for the next page; None at the end."""
    searched: int
    """How many of the eval's predictions, from the first one on, were searched up to the end of this page."""


class Evals:
    """The evals and predictions of one database."""

    def __init__(self, database: Database) -> None:
        self._database: Final = database
        self._next_id: int | None = None

    def add(
        self,
        run: int,
        rank: int,
        kind: EvalKind,
        name: str,
        step: int | None,
        time: float,
        body: Mapping[str, Any],
        predictions: Iterable[object] = (),
        benchmark: str = "",
    ) -> int:
        """Add an eval and return its id; one of the same kind, name, benchmark, rank and step is replaced."""
        is_same = "run = ? AND name = ? AND rank = ? AND kind = ? AND benchmark = ? AND "
        same: tuple[object, ...] = (run, name, rank, kind, benchmark)
        if step is None:
            self._remove(is_same + "step IS NULL", *same)
        else:
            self._remove(is_same + "step = ?", *same, step)
        id_ = self._new_id()
        count = self._add_predictions(id_, 0, predictions)
        self._database.execute(
            "INSERT INTO evaluation (id, run, rank, kind, name, benchmark, step, time, predictions, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(id_, run, rank, kind, name, benchmark, step, time, count, json_text(body)),
        )
        return id_

    def append(self, id_: int, predictions: Sequence[object]) -> int:
        """Add predictions to an eval; return the id of the first of them."""
        first = int(self._database.query("SELECT predictions FROM evaluation WHERE id = ?", id_)[0][0])
        count = self._add_predictions(id_, first, predictions)
        self._database.execute("UPDATE evaluation SET predictions = ? WHERE id = ?", first + count, id_)
        return id_ << _SHIFT | min(first, MAX_PREDICTIONS - 1)

    def _new_id(self) -> int:
        if self._next_id is None:
            self._next_id = 1 + int(self._database.query("SELECT COALESCE(MAX(id), 0) FROM evaluation")[0][0])
        self._next_id += 1
        return self._next_id - 1

    def _add_predictions(self, id_: int, first: int, predictions: Iterable[object]) -> int:
        rows: list[tuple[int, int, float | None, str]] = []
        texts: dict[str, str] = {}
        count = 0
        for prediction in predictions:
            if first + count < MAX_PREDICTIONS:
                rows.append((id_ << _SHIFT | (first + count), *_stored(prediction, texts)))
            count += 1
        if texts:
            self._database.executemany(
                "INSERT INTO long_text (digest, body) VALUES (?, ?) ON CONFLICT (digest) DO NOTHING", [*texts.items()]
            )
        if rows:
            self._database.executemany("INSERT INTO prediction (id, task, reward, body) VALUES (?, ?, ?, ?)", rows)
        return count

    def cut(self, run: int, rank: int, step: int) -> None:
        """Remove the evals of a rank from a step on, and those after training: the run is trained again from there."""
        self._remove("run = ? AND rank = ? AND (step IS NULL OR step >= ?)", run, rank, step)

    def remove_run(self, run: int) -> None:
        """Remove all evals of a run. Long texts stay until `remove_unused_texts`."""
        self._remove("run = ?", run)

    def _remove(self, where: str, *args: object) -> None:
        found = self._database.query(f"SELECT id, predictions FROM evaluation WHERE {where}", *args)  # noqa: S608 # no input
        for id_, predictions in found:
            if predictions:
                self._database.execute("DELETE FROM prediction WHERE id BETWEEN ? AND ?", *_range(id_))
            self._database.execute("DELETE FROM evaluation WHERE id = ?", id_)

    def remove_unused_texts(self) -> int:
        """Remove the long texts that no prediction has any more; return how many there were. Reads all predictions."""
        used: set[str] = set()
        after = -1
        while True:
            rows = self._database.query(
                "SELECT id, body FROM prediction WHERE id > ? ORDER BY id LIMIT ?", after, 10 * _BATCH
            )
            if not rows:
                break
            after = rows[-1][0]
            for _, body in rows:
                used.update(_decode(body).get("long", {}).values())
        stored = {digest for (digest,) in self._database.query("SELECT digest FROM long_text")}
        self._database.executemany(
            "DELETE FROM long_text WHERE digest = ?", [(digest,) for digest in sorted(stored - used)]
        )
        return len(stored - used)

    def of_run(self, run: int) -> list[EvalRow]:
        """Return the evals of a run in the order in which they came."""
        rows = self._database.query(f"{_SELECT} WHERE run = ? ORDER BY id", run)
        return [*map(_eval_row, rows)]

    def get(self, id_: int) -> EvalRow | None:
        """Return an eval, or None."""
        return next(map(_eval_row, self._database.query(f"{_SELECT} WHERE id = ?", id_)), None)

    def find(self, run: int, kind: EvalKind, step: int | None) -> EvalRow | None:
        """Return the newest eval of a kind at a step, or None."""
        at, args = ("step IS NULL", ()) if step is None else ("step = ?", (step,))
        rows = self._database.query(
            f"{_SELECT} WHERE run = ? AND kind = ? AND {at} ORDER BY id DESC LIMIT 1", *(run, kind, *args)
        )
        return next(map(_eval_row, rows), None)

    def named(self, run: int, name: str, step: int | None) -> list[EvalRow]:
        """Return the evals of a run that have this name and step."""
        at, args = ("step IS NULL", ()) if step is None else ("step = ?", (step,))
        rows = self._database.query(f"{_SELECT} WHERE run = ? AND name = ? AND {at}", run, name, *args)
        return [*map(_eval_row, rows)]

    def of_same_task(self, id_: int, eval_: int, limit: int) -> list[int]:
        """Return the ids of the first predictions of an eval for the task of a prediction, without its own."""
        rows = self._database.query(
            "SELECT id FROM prediction WHERE task = (SELECT task FROM prediction WHERE id = ?) AND id != ? "
            "AND id BETWEEN ? AND ? ORDER BY id LIMIT ?",
            *(id_, id_, *_range(eval_), limit),
        )
        return [int(other) for (other,) in rows]

    def predictions(
        self,
        id_: int,
        after: int | None = None,
        limit: int = 50,
        filter: PredictionFilter | None = None,  # noqa: A002 # what it is
    ) -> PredictionPage:
        """Return predictions of an eval, with previews of long texts.

        At most 50,000 are compared with the filter; if that is not enough for a page, ``next`` continues the search.

        Args:
            id_: The eval.
            after: ``next`` of the page before.
            limit: The largest number of rows.
            filter: Which to return.
        """
        conditions = filter or {}
        where, args = _conditions(conditions)
        text = conditions.get("text")
        search = _TextSearch(self._database, text) if text else None
        first, last = _range(id_)
        count = self._database.query(
            "SELECT COALESCE(MAX(id), ?) FROM prediction WHERE id BETWEEN ? AND ?", *(first - 1, first, last)
        )
        last = int(count[0][0])
        position = first - 1 if after is None else max(after, first - 1)
        end = min(last, position + (_MAX_SEARCHED if search is None else _MAX_COMPARED))
        size = limit if search is None else _BATCH
        rows: list[dict[str, Any]] = []
        while position < end and len(rows) < limit:
            found = self._database.query(
                f"SELECT a.id, a.body FROM prediction a WHERE a.id > ? AND a.id <= ?{where} ORDER BY a.id LIMIT ?",  # noqa: S608 # no input
                *(position, end, *args, size),
            )
            for row, body in found if search is None else search.matches(found):
                position = row
                rows.append(self._preview(row, _decode(body)))
                if len(rows) == limit:
                    break
            else:
                position = found[-1][0] if len(found) == size else end
        return {"rows": rows, "next": position if position < last else None, "searched": position - first + 1}

    def scores(self, ids: Sequence[int], evals: Sequence[int]) -> dict[int, list[float | None]]:
        """Return for each of these predictions the reward that each of these evals has for the same task, or None."""
        found: dict[int, list[float | None]] = {}
        for id_ in ids:
            [(task,)] = self._database.query("SELECT task FROM prediction WHERE id = ?", id_)
            found[id_] = []
            for each in evals:
                rows = self._database.query(
                    "SELECT reward FROM prediction WHERE task = ? AND id BETWEEN ? AND ? ORDER BY id LIMIT 1",
                    *(task, *_range(each)),
                )
                found[id_].append(rows[0][0] if rows else None)
        return found

    def agreement(self, a: EvalRow, b: EvalRow, right: float) -> dict[str, int] | None:
        """Return how many common tasks two evals have right: both, one or none of them; None for too many tasks."""
        if max(a.predictions, b.predictions) > _MAX_PAIRED:
            return None
        [row] = self._database.query(
            "SELECT COUNT(*), SUM(a.reward >= ? AND b.reward >= ?), SUM(a.reward >= ? AND b.reward < ?), "
            "SUM(a.reward < ? AND b.reward >= ?) FROM prediction a JOIN prediction b ON b.task = a.task "
            "AND b.id BETWEEN ? AND ? WHERE a.id BETWEEN ? AND ? AND a.reward IS NOT NULL AND b.reward IS NOT NULL",
            *(right,) * 6,
            *(*_range(b.id), *_range(a.id)),
        )
        tasks, both, only_a, only_b = (int(each or 0) for each in row)
        return {"tasks": tasks, "both": both, "a": only_a, "b": only_b, "none": tasks - both - only_a - only_b}

    def prediction(self, id_: int) -> dict[str, Any] | None:
        """Return a prediction with all its texts, or None."""
        rows = self._database.query("SELECT body FROM prediction WHERE id = ?", id_)
        return None if not rows else self._whole(id_, _decode(rows[0][0]))

    def whole_predictions(self, id_: int) -> Iterator[dict[str, Any]]:
        """Yield all predictions of an eval with all their texts."""
        first, last = _range(id_)
        position = first - 1
        while True:
            rows = self._database.query(
                "SELECT id, body FROM prediction WHERE id > ? AND id <= ? ORDER BY id LIMIT ?", position, last, _BATCH
            )
            for row, body in rows:
                yield self._whole(row, _decode(body))
            if len(rows) < _BATCH:
                return
            position = rows[-1][0]

    def _long_text(self, digest: str) -> str:
        rows = self._database.query("SELECT body FROM long_text WHERE digest = ?", digest)
        return str(rows[0][0]) if rows else ""

    def _preview(self, id_: int, stored: dict[str, Any]) -> dict[str, Any]:
        row = {"id": id_, **stored["fields"]}
        lengths: dict[str, int] = {}
        for name, digest in stored.get("long", {}).items():
            beginning, length = self._database.query(
                "SELECT SUBSTR(body, 1, CAST(? AS INTEGER)), LENGTH(body) FROM long_text WHERE digest = ?",
                _PREVIEW,
                digest,
            )[0]
            row[name] = beginning
            lengths[name] = length
        if lengths:
            row["lengths"] = lengths
        return row

    def _whole(self, id_: int, stored: dict[str, Any]) -> dict[str, Any]:
        row = {"id": id_, **stored["fields"]}
        encoded = stored.get("json", [])
        for name, digest in stored.get("long", {}).items():
            text = self._long_text(digest)
            row[name] = msgspec.json.decode(text) if name in encoded and text else text
        return row


class _LongTexts(msgspec.Struct):
    long: dict[str, str] = {}


_decode_long: Final = msgspec.json.Decoder(_LongTexts).decode


class _TextSearch:
    """Finds the stored predictions in which a text occurs, in any case."""

    def __init__(self, database: Database, text: str) -> None:
        self._database: Final = database
        self._text: Final = text.casefold()
        self._encoded: Final = json_text(text)[1:-1].casefold()
        """As it stands in a body."""
        self._known: Final[dict[str, bool]] = {}
        """By the digests of long texts."""

    def matches(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, str]]:
        """Yield the matching rows of a batch."""
        long = [[*_decode_long(body).long.values()] for _, body in rows]
        unknown = list(dict.fromkeys(digest for digests in long for digest in digests if digest not in self._known))
        for start in range(0, len(unknown), _BATCH):
            part = unknown[start : start + _BATCH]
            marks = ", ".join("?" * len(part))
            found = self._database.query(f"SELECT digest, body FROM long_text WHERE digest IN ({marks})", *part)  # noqa: S608 # marks only
            self._known.update((digest, self._text in body.casefold()) for digest, body in found)
        for (row, body), digests in zip(rows, long, strict=True):
            if any(self._known.get(digest) for digest in digests) or self._is_in_fields(body):
                yield row, body

    def _is_in_fields(self, body: str) -> bool:
        if self._encoded not in body.casefold():
            return False
        values = _decode(body)["fields"].values()  # it may have been the name of a field
        return any(self._text in text_of(value).casefold() for value in values)


_SELECT: Final = "SELECT id, run, rank, kind, name, benchmark, step, time, predictions, body FROM evaluation"


def _eval_row(row: tuple[Any, ...]) -> EvalRow:
    *head, body = row
    return EvalRow._make([*head, _decode(body)])


def _range(id_: int) -> tuple[int, int]:
    return id_ << _SHIFT, (id_ + 1 << _SHIFT) - 1


def _conditions(conditions: PredictionFilter) -> tuple[str, list[object]]:
    """Return the SQL of a filter, without that of its text."""
    where = ""
    args: list[object] = []
    if "min_reward" in conditions:
        where += " AND a.reward >= ?"
        args.append(float(conditions["min_reward"]))
    if "below_reward" in conditions:
        where += " AND a.reward < ?"
        args.append(float(conditions["below_reward"]))
    if "worse_in" in conditions:
        is_worse = "b.reward < ?" if "min_reward" in conditions else "b.reward < a.reward"
        where += (
            f" AND EXISTS (SELECT 1 FROM prediction b WHERE b.task = a.task AND b.id BETWEEN ? AND ? AND {is_worse})"  # noqa: S608 # one of two texts
        )
        args += _range(min(max(int(conditions["worse_in"]), 0), _MAX_EVAL))
        if "min_reward" in conditions:
            args.append(float(conditions["min_reward"]))
    return where, args


def _stored(prediction: object, texts: dict[str, str]) -> tuple[int, float | None, str]:
    """Return the task's key, the reward and the body of a prediction; long texts are added to ``texts``."""
    is_mapping = isinstance(prediction, Mapping)
    fields = dict(cast("Mapping[str, Any]", prediction)) if is_mapping else {"output": prediction}
    reward = fields.get("reward")
    number = float(reward) if isinstance(reward, int | float) and abs(reward) < inf else None
    task = fields.get("task_id")
    if task is None:
        task = fields.get("instruction")
    key = hashlib.sha256(json_text([task, fields.get("sample_idx") or 0]).encode()).digest()[:8]
    inline: dict[str, Any] = {}
    long: dict[str, str] = {}
    encoded: list[str] = []
    for name, value in fields.items():
        if isinstance(value, int | float) or value is None:
            inline[str(name)] = value
            continue
        text = value if isinstance(value, str) else json_text(value)
        if len(text) <= _MAX_INLINE:
            inline[str(name)] = value
            continue
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
        texts[digest] = text
        long[str(name)] = digest
        if not isinstance(value, str):
            encoded.append(str(name))
    body = {"fields": inline} | ({"long": long} if long else {}) | ({"json": encoded} if encoded else {})
    return int.from_bytes(key, "big") >> 1, number, json_text(body)
