"""The description of the routes, for programs and people: OpenAPI 3.1, served at ``/api/openapi.json``."""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

Json: TypeAlias = dict[str, Any]

_TEXT: Final[Json] = {"type": "string"}
_INTEGER: Final[Json] = {"type": "integer"}
_NUMBER: Final[Json] = {"type": "number"}
_OBJECT: Final[Json] = {"type": "object"}
_OPTIONAL_INTEGER: Final[Json] = {"type": ["integer", "null"]}


def _object(required: str = "", **properties: Json) -> Json:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _choice(*values: str) -> Json:
    return {"type": "string", "enum": list(values)}


def _parameter(name: str, place: str, schema: Json, description: str) -> Json:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "schema": schema,
        "description": description,
    }


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _answer(description: str, content: Mapping[str, Any] | None = None) -> Json:
    return {"description": description, **({} if content is None else {"content": content})}


_ERROR: Final = _json(
    _object(
        "error",
        error=_object("code message fix", code=_TEXT, message=_TEXT, fix=_TEXT),
        sequence={**_INTEGER, "description": "Of 409: the last sequence number that is stored."},
        limit={**_INTEGER, "description": "Of 413: how many bytes a body may have."},
    )
)
_IMPORT: Final = _object(
    "journal state events of error",
    journal=_TEXT,
    state=_choice("waiting", "running", "completed", "failed"),
    events=_INTEGER,
    of=_OPTIONAL_INTEGER,
    error={"type": ["string", "null"]},
    unreadable={**_INTEGER, "description": "Delivered events that could not be read."},
)
_ERRORS: Final[Json] = {
    "400": _answer("The request cannot be understood.", _ERROR),
    "401": _answer("The token is missing or wrong.", _ERROR),
    "403": _answer("The Origin is that of another server.", _ERROR),
    "408": _answer("Headers or body did not arrive in time.", _ERROR),
    "413": _answer("The body is too large, as sent or decompressed.", _ERROR),
    "421": _answer("The Host does not name this server.", _ERROR),
    "429": _answer("Too many wrong tokens from this address.", _ERROR),
    "503": _answer("The database cannot be used now; Retry-After says when to try again.", _ERROR),
}
_BINARY: Final[Json] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_COLUMNS: Final = (
    "`EVC1`, the length of the header as a little-endian u32, the header (JSON, padded with spaces so that the rest "
    "begins at a multiple of 8 bytes), then float64 columns, little-endian. The header refers to a column as [offset, "
    "length], both in numbers. NaN is a gap."
)


def _operation(
    summary: str,
    answers: Json,
    *,
    description: str = "",
    body: Json | None = None,
    parameters: list[Json] | None = None,
    is_open: bool = False,
) -> Json:
    return {
        "summary": summary,
        **({"description": description} if description else {}),
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": {"required": True, "content": body}} if body else {}),
        "responses": answers if is_open else {**answers, **_ERRORS},
        **({"security": []} if is_open else {}),
    }


_CHART: Final = _object(
    "metric",
    metric=_TEXT,
    runs={"type": ["array", "null"], "items": _TEXT, "description": "Ids of runs; null for all."},
    lines=_choice("band", "members", "both"),
    **{"from": _OPTIONAL_INTEGER, "to": _OPTIONAL_INTEGER},
    buckets={**_INTEGER, "minimum": 1, "maximum": 5000, "default": 500},
    x=_choice("step", "relative", "wall"),
    rank=_OPTIONAL_INTEGER,
)
_TOPICS: Final = _list(_object("topic", topic=_TEXT, frame=_OPTIONAL_INTEGER))
_LIVE: Final = (
    'As a WebSocket with the subprotocols `evsys` and `token.TOKEN`: send {"subscribe": [{"topic", "frame"}]}, which '
    "replaces the former subscription; each binary message is a columns container with the header {topic, frame, kind, "
    "…}. Topics: `home`, `e/ID`, `c/ID/LINES/WIDTH/METRIC`. Kinds: `data`; `refetch` and `reset`: read the view again. "
    "Without an upgrade, as described here: the frames since those numbers, as base64."
)

_OF_AN_EXPERIMENT: Final = [_parameter("id", "path", _TEXT, "The experiment.")]


def _view(summary: str, parameters: list[Json] | None = None, *, none: str = "") -> Json:
    """Describe a route that reads what a page shows."""
    answers = {
        "200": _answer("What the page shows.", _json(_OBJECT)),
        **({"404": _answer(none, _ERROR)} if none else {}),
    }
    return {"get": _operation(summary, answers, parameters=parameters)}


_VIEWS: Final[Json] = {
    "/api/experiments/{id}/runs": _view(
        "The runs of an experiment",
        [
            *_OF_AN_EXPERIMENT,
            _parameter(
                "q", "query", _TEXT, "A filter as of `evsys-bus runs --filter`; `problem` says what is wrong in it."
            ),
            _parameter("metric", "query", _TEXT, "A metric whose last and best values are wanted; may be repeated."),
            _parameter("at", "query", _TEXT, "STEP:METRIC whose values at that step are wanted; may be repeated."),
        ],
        none="No such experiment.",
    ),
    "/api/experiments/{id}/evals": _view(
        "Scores by eval and arm, and which evals have predictions", _OF_AN_EXPERIMENT, none="No such experiment."
    ),
    "/api/experiments/{id}/checkpoints": _view(
        "Checkpoints with the metrics at their steps", _OF_AN_EXPERIMENT, none="No such experiment."
    ),
    "/api/runs/{id}": _view(
        "One run: error, config, evals, checkpoints, alerts, texts, deliveries",
        [_parameter("id", "path", _TEXT, "The run.")],
        none="No such run.",
    ),
    "/api/runs/{id}/events": _view(
        "The events of a run, newest first, page by page: of its journal, else what the database keeps of them",
        [
            _parameter("id", "path", _TEXT, "The run."),
            _parameter("q", "query", _TEXT, "A filter as of the runs; `problem` says what is wrong in it."),
            _parameter("before", "query", _TEXT, "`next` of the page before."),
            _parameter("after", "query", _TEXT, "`newest` of an answer: what has come since."),
        ],
        none="No such run.",
    ),
    "/api/runs/{id}/media/{digest}": {
        "get": _operation(
            "A picture of a run, if its file is on this machine",
            {"200": _answer("PNG, JPEG, GIF or WebP.", _BINARY), "404": _answer("It is not here.", _ERROR)},
            parameters=[
                _parameter("id", "path", _TEXT, "The run."),
                _parameter("digest", "path", _TEXT, "Of its bytes."),
            ],
        )
    },
    "/api/compare": _view(
        "Several runs side by side", [_parameter("r", "query", _TEXT, "The id of a run; repeated, up to 24.")]
    ),
    "/api/compare/predictions": _view(
        "What several runs have for the same tasks of an eval, page by page",
        [
            _parameter("r", "query", _TEXT, "The id of a run; repeated. The first one is A, the second one B."),
            _parameter("eval", "query", _TEXT, "The name of the eval."),
            _parameter(
                "pick", "query", _choice("all", "a", "b"), "a: those that A has right and B wrong; b: reversed."
            ),
            _parameter("after", "query", _TEXT, "`next` of the page before."),
        ],
        none="No such run.",
    ),
    "/api/predictions": _view(
        "Predictions of an eval, page by page",
        [
            _parameter("eval", "query", _INTEGER, "The eval."),
            _parameter("after", "query", _TEXT, "`next` of the page before."),
            _parameter("filter", "query", _TEXT, "JSON: text, min_reward, below_reward, worse_in (another eval)."),
        ],
        none="No such eval.",
    ),
    "/api/predictions/{id}": _view(
        "One prediction with all its texts, and those of other runs for the same task",
        [_parameter("id", "path", _TEXT, "The prediction.")],
        none="No such prediction.",
    ),
    "/api/health": _view("How far the deliveries of all journals are, and the figures of the database"),
}
_TRASH: Final[Json] = {
    "/api/trash": _view("The experiments and runs in the trash, and after how many days they are removed", []),
    **{
        f"/api/{kind}s/{{id}}/{action}": {
            "post": _operation(
                f"{summary} {article} {kind}",
                {
                    "200": _answer("It is done.", _json(_OBJECT)),
                    "404": _answer(f"No such {kind}.", _ERROR),
                    **({"409": _answer("It is not in the trash.", _ERROR)} if action == "purge" else {}),
                },
                parameters=[_parameter("id", "path", _TEXT, f"The {kind}.")],
            )
        }
        for kind, article in (("experiment", "an"), ("run", "a"))
        for action, summary in (
            ("trash", "Hide, for 30 days,"),
            ("restore", "Take out of the trash"),
            ("purge", "Remove for good from the trash"),
        )
    },
}

DESCRIPTION: Final[Json] = {
    "openapi": "3.1.0",
    "info": {
        "title": "evsys-bus dashboard",
        "version": "1",
        "description": f"Errors are JSON with code, message and fix. Columns container: {_COLUMNS}",
    },
    "security": [{"token": []}],
    "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    "paths": {
        "/health": {
            "get": _operation(
                "What this server is",
                {
                    "200": _answer(
                        "A dashboard.",
                        _json(
                            _object(
                                "service protocol version store encodings",
                                service={"const": "evsys-bus-dashboard"},
                                protocol=_INTEGER,
                                version=_TEXT,
                                store={**_TEXT, "description": "A UUID of the database."},
                                encodings=_list(_TEXT),
                            )
                        ),
                    )
                },
                is_open=True,
            )
        },
        "/api/openapi.json": {"get": _operation("This description", {"200": _answer("OpenAPI.", _json(_OBJECT))})},
        "/api/ingest": {
            "post": _operation(
                "Store events of one stream",
                {
                    "200": _answer(
                        "Stored, and on the disk.",
                        _json(
                            _object(
                                "sequence events points store",
                                store={"type": "string", "description": "The id of the database."},
                                sequence=_INTEGER,
                                events=_INTEGER,
                                points=_INTEGER,
                                unreadable={**_INTEGER, "description": "Skipped for good; only if there are any."},
                            )
                        ),
                    ),
                    "409": _answer("Events before these are absent; `sequence` is the last that is stored.", _ERROR),
                    "415": _answer("The content encoding is not known here; /health lists those that are.", _ERROR),
                },
                description="A msgpack array of envelopes as the journal has them. Events that are stored already "
                "change nothing. One body of a stream at a time.",
                body={"application/msgpack": {"schema": {"type": "string", "format": "binary"}}},
                parameters=[
                    _parameter("stream", "query", _TEXT, "The stream."),
                    _parameter("after", "query", _INTEGER, "The last sequence number that the client knows as stored."),
                    _parameter("journal", "query", _TEXT, "Path of the journal that holds the stream."),
                    _parameter("Content-Encoding", "header", _choice("identity", "gzip", "zstd"), "Of the body."),
                ],
            )
        },
        "/api/import": {
            "get": _operation(
                "All imports since the start",
                {
                    "200": _answer(
                        "Their states; the first ones are those that the start has led to: of known journals with "
                        "events that the database lacks.",
                        _json(_object("imports", imports=_list(_IMPORT))),
                    )
                },
            ),
            "post": _operation(
                "Import a journal of the server's machine",
                {"202": _answer("It is being imported.", _json(_object("import", **{"import": _TEXT})))},
                body=_json(_object("journal", journal={**_TEXT, "description": "An absolute path."})),
            ),
        },
        "/api/import/{id}": {
            "get": _operation(
                "How far an import is",
                {
                    "200": _answer(
                        "Its state.",
                        _json(_IMPORT),
                    ),
                    "404": _answer("No such import.", _ERROR),
                },
                parameters=[_parameter("id", "path", _TEXT, "The import.")],
            )
        },
        "/api/home": {
            "get": _operation(
                "All experiments",
                {
                    "200": _answer(
                        "Their rows.",
                        _json(
                            _object(
                                "store now experiments frame",
                                store=_TEXT,
                                now=_NUMBER,
                                experiments=_list(_OBJECT),
                                frame={**_INTEGER, "description": "Live frames after it have what changes later."},
                            )
                        ),
                    )
                },
            )
        },
        "/api/experiments/{id}": {
            "get": _operation(
                "One experiment",
                {
                    "200": _answer("Its headlines, arms, runs, metrics, alerts.", _json(_OBJECT)),
                    "404": _answer("No such experiment.", _ERROR),
                },
                parameters=[_parameter("id", "path", _TEXT, "The experiment.")],
            )
        },
        **_VIEWS,
        **_TRASH,
        "/api/charts": {
            "post": _operation(
                "Several charts of an experiment",
                {
                    "200": _answer("A columns container with the header {charts, frame}.", _BINARY),
                    "404": _answer("No such experiment.", _ERROR),
                },
                body=_json(_object("experiment charts", experiment=_TEXT, charts={**_list(_CHART), "maxItems": 100})),
            )
        },
        "/api/live": {
            "get": _operation(
                "Live frames",
                {
                    "200": _answer("Frames.", _json(_list(_TEXT))),
                    "204": _answer("There are none."),
                },
                description=_LIVE,
                parameters=[
                    {
                        "name": "topics",
                        "in": "query",
                        "required": True,
                        "content": _json(_TOPICS),
                        "description": "What is viewed, and the number of the last frame of each.",
                    }
                ],
            )
        },
        "/api/dashboard/api/sdk/data/": {
            "post": _operation(
                "The gateway of the hosted service",
                {"200": _answer("The result.", _json(_object("result", result={})))},
                description="Operations of EvSys' own clients; the older routes below sdk/ are there too, with and "
                "without a slash at their end.",
                body=_json(_object("op", op=_TEXT, args=_OBJECT)),
            )
        },
    },
}
