"""`TrackingClient`: MLflow's own client within the limits of its API, with errors as sinks raise them.

All methods block; call them on a thread, one at a time. mlflow is imported with the first call.

    limits of one request        1,000 metrics, 100 params, 100 tags, 1 MB
    names                        250 characters: letters, digits, ``_ - . : /`` and spaces, as a plain relative path
    values                       params 6,000 characters, tags 8,000

What MLflow's errors become:

    no access, no such endpoint, a package is missing     ParkedError
    an invalid value, no such run                         `TrackingRefusedError`
    anything else, also no answer                         RetryLaterError
"""

import importlib
import math
import os
import posixpath
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from evsys_adapters.common.logged_values import cut_text
from evsys_bus.codec.redact import redact_text
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError
from evsys_bus.location import local_path, short_digest

MAX_METRICS: Final = 1000
MAX_PARAMS: Final = 50
"""MLflow accepts 100 in a request; with the longest values that would be most of its megabyte."""
MAX_TAGS: Final = 50
MAX_KEY: Final = 250
MAX_PARAM_VALUE: Final = 6000
MAX_TAG_VALUE: Final = 8000
RUN_TAG: Final = "evsys_bus.run"
"""The tag by which a run is found again whose creation was not confirmed."""

_NOT_ALLOWED: Final = re.compile(r"[^\w\-. :/]")
_MAX_SHOWN: Final = 300
_PARKING: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND"})
_REFUSING: Final = frozenset(
    {
        *("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "MALFORMED_REQUEST"),
        *("RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_LIMIT_EXCEEDED"),
    }
)
_CODES: Final[dict[int, str]] = {
    HTTPStatus.UNAUTHORIZED: "UNAUTHENTICATED",
    HTTPStatus.FORBIDDEN: "PERMISSION_DENIED",
    HTTPStatus.BAD_REQUEST: "BAD_REQUEST",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "BAD_REQUEST",
}
"""MLflow's codes for what a server of artifacts answers."""
_PROCESS_SETTINGS: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the courier retries; 7, the default, take minutes and show no error
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # whether usage data is sent is for the program to decide
}
"""Unless they are set, and unless the program itself uses mlflow."""

_T = TypeVar("_T")


class TrackingRefusedError(Exception):
    """MLflow rejects a request permanently."""

    def __init__(self, what: str, code: str) -> None:
        super().__init__(what)
        self.what = what
        self.code = code


class MetricPoint(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since the epoch."""
    step: int


class OpenedRun(NamedTuple):
    """A run at the server."""

    id: str
    experiment_id: str
    is_new: bool


def safe_key(name: str) -> str:
    """Return the name as MLflow accepts it; one that is too long ends in a digest of the whole."""
    parts = (part for part in _NOT_ALLOWED.sub("_", name).split("/") if part not in {"", ".", ".."})
    key = posixpath.join(*parts, "").removesuffix("/").strip() if name else ""
    key = key or "_"
    return key if len(key) <= MAX_KEY else f"{key[: MAX_KEY - 9]}-{short_digest(name)}"


def absolute_uri(uri: str) -> str:
    """Return a tracking URI whose local path is absolute: a later process may have another working directory."""
    scheme, _, path = uri.partition(":///") if uri.startswith("sqlite:///") else ("", "", "")
    if scheme:
        return f"{scheme}:///{local_path(path, 'tracking_uri')}" if path and path != ":memory:" else uri
    if urlsplit(uri).scheme in {"", "file"}:
        return local_path(uri.removeprefix("file://").removeprefix("file:"), "tracking_uri").as_uri()
    return uri


class TrackingClient:
    """The runs of one tracking server or store.

    Args:
        uri: Its URI; None for MLflow's own default.
    """

    def __init__(self, uri: str | None) -> None:
        self._uri = uri
        self._client: Any = None
        self._errors: tuple[type[Exception], ...] = (OSError,)
        self._experiment_ids: dict[str, str] = {}
        self._is_file_store = False
        self._confirmed: set[str] = set()
        """Runs whose next metrics are not in the store yet; a file store records repeats as further points."""

    @property
    def host(self) -> str:
        """Name of the server in errors, without credentials and paths."""
        parts = urlsplit(self._uri or "")
        return f"MLflow at {parts.hostname}" if parts.hostname else "MLflow's store"

    def page_of(self, run: OpenedRun) -> str | None:
        """Return the URL of a run's page; None for a store without a server."""
        parts = urlsplit(self._uri or "")
        if parts.scheme not in {"http", "https"} or "@" in parts.netloc:
            return None
        return f"{(self._uri or '').rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.id}"

    def open_run(
        self, experiment: str, run_name: str, identity: str, tags: Mapping[str, str], start_time: float
    ) -> OpenedRun:
        """Return the run with this identity; create it, and its experiment, if there is none.

        Args:
            experiment: Name of the experiment.
            run_name: Name of a new run.
            identity: What `RUN_TAG` has as its value.
            tags: Tags of a new run.
            start_time: Of a new run, in seconds since the epoch.
        """

        def opened(client: Any) -> OpenedRun:
            experiment_id = self._experiment_id(client, experiment)
            found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
            if found:
                return OpenedRun(found[0].info.run_id, experiment_id, is_new=False)
            fitted = {safe_key(key): cut_text(value, MAX_TAG_VALUE) for key, value in tags.items()}
            fitted[RUN_TAG] = identity
            info = client.create_run(
                experiment_id, int(start_time * 1000), fitted, run_name=cut_text(run_name, MAX_KEY)
            ).info
            return OpenedRun(info.run_id, experiment_id, is_new=True)

        return self._call(opened)

    def is_active(self, run_id: str) -> bool:
        """Whether the run exists and was not deleted."""
        try:
            info = self._call(lambda client: client.get_run(run_id)).info
        except TrackingRefusedError:
            return False
        return info.lifecycle_stage == "active"

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Log metrics; a point that the store has already changes nothing."""
        self._call(lambda _: None)
        if self._is_file_store and run_id not in self._confirmed:
            points = self._new_points(run_id, points)
        for start in range(0, len(points), MAX_METRICS):
            metrics = [self._entity("Metric", *point) for point in points[start : start + MAX_METRICS]]
            self._call(lambda client, metrics=metrics: client.log_batch(run_id, metrics=metrics))
        self._confirmed.add(run_id)

    def expect_repeats(self) -> None:
        """Metrics that were logged may be logged again."""
        self._confirmed.clear()

    def log_params(self, run_id: str, params: Mapping[str, str], *, is_new: bool) -> dict[str, str]:
        """Log those params that the run does not have, and return those that it has with another value.

        MLflow's params never change.
        """
        fitted = {safe_key(key): cut_text(value, MAX_PARAM_VALUE) for key, value in params.items()}
        known = {} if is_new else dict(self._call(lambda client: client.get_run(run_id)).data.params)
        missing = [each for each in fitted.items() if each[0] not in known]
        for start in range(0, len(missing), MAX_PARAMS):
            entities = [self._entity("Param", *each) for each in missing[start : start + MAX_PARAMS]]
            self._call(lambda client, entities=entities: client.log_batch(run_id, params=entities))
        return {key: value for key, value in fitted.items() if known.get(key, value) != value}

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; they replace those of the same names."""
        fitted = [(safe_key(key), cut_text(value, MAX_TAG_VALUE)) for key, value in tags.items()]
        for start in range(0, len(fitted), MAX_TAGS):
            entities = [self._entity("RunTag", *each) for each in fitted[start : start + MAX_TAGS]]
            self._call(lambda client, entities=entities: client.log_batch(run_id, tags=entities))

    def set_status(self, run_id: str, status: str, end_time: float | None = None) -> None:
        """Set the run's status; with an end time (seconds since the epoch) it has ended."""
        if end_time is None:
            self._call(lambda client: client.update_run(run_id, status=status))
        else:
            self._call(lambda client: client.set_terminated(run_id, status, int(end_time * 1000)))

    def log_file(self, run_id: str, path: Path, folder: str) -> None:
        """Copy a file, or the content of a directory, into a folder of the run's artifacts."""
        if path.is_dir():
            self._call(lambda client: client.log_artifacts(run_id, str(path), folder))
        else:
            self._call(lambda client: client.log_artifact(run_id, str(path), folder))

    def log_text(self, run_id: str, text: str, file: str) -> None:
        """Write a text as a file of the run's artifacts."""
        self._call(lambda client: client.log_text(run_id, text, file))

    def _experiment_id(self, client: Any, name: str) -> str:
        known = self._experiment_ids.get(name)
        if known is not None:
            return known
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                experiment_id = client.create_experiment(name)
            except self._errors as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment_id = client.get_experiment_by_name(name).experiment_id  # created by another run meanwhile
        elif found.lifecycle_stage != "active":
            fix = f"restore it (mlflow experiments restore -x {found.experiment_id}), or set another experiment"
            raise ParkedError(f"MLflow's experiment {name!r} was deleted", fix=fix)
        else:
            experiment_id = found.experiment_id
        self._experiment_ids[name] = experiment_id
        return experiment_id

    def _new_points(self, run_id: str, points: Sequence[MetricPoint]) -> list[MetricPoint]:
        known: set[tuple[str, int, int, str]] = set()
        for key in {each.key for each in points}:
            try:
                history = self._call(lambda client, key=key: client.get_metric_history(run_id, key))
            except TrackingRefusedError:  # no such metric yet
                continue
            known.update((key, each.timestamp, each.step, repr(float(each.value))) for each in history)
        return [each for each in points if (each.key, each.timestamp, each.step, repr(float(each.value))) not in known]

    def _entity(self, kind: str, *values: object) -> Any:
        return getattr(importlib.import_module("mlflow.entities"), kind)(*values)

    def _open(self) -> Any:
        if self._client is None:
            if "mlflow" not in sys.modules:
                for name, value in _PROCESS_SETTINGS.items():
                    os.environ.setdefault(name, value)
            mlflow: Any = importlib.import_module("mlflow")
            self._errors = (mlflow.exceptions.MlflowException, OSError)  # those of requests are OSErrors
            self._uri = self._uri or str(mlflow.get_tracking_uri())
            self._is_file_store = urlsplit(self._uri).scheme in {"", "file"}
            if self._is_file_store:
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it was asked for by its URI
            self._client = mlflow.MlflowClient(self._uri)
        return self._client

    def _call(self, request: Callable[[Any], _T]) -> _T:
        """Call the client, and convert its errors.

        Raises:
            TrackingRefusedError: The request is rejected permanently.
            ParkedError: The server, the address or the credentials have to be corrected first.
            RetryLaterError: The server is away or busy.
        """
        try:
            return request(self._open())
        except DeliveryError:
            raise
        except ImportError as error:
            fix = "pip install mlflow (the extra has the client for servers; a database needs sqlalchemy and alembic)"
            raise ParkedError(f"{self.host} needs the package {error.name}", fix=fix) from error
        except self._errors as error:
            cause = error.__context__
            status = _http_status(error) or _http_status(cause)
            if isinstance(cause, OSError) and not status:
                raise RetryLaterError(f"{self.host} cannot be reached: {type(cause).__name__}") from None
            code = str(getattr(error, "error_code", _CODES.get(status, "")))
            shown = cut_text(redact_text(" ".join(str(error).split())), _MAX_SHOWN)
            what = f"{self.host}: {type(error).__name__}: {shown}"
            if code in _PARKING:
                fix = "check MLFLOW_TRACKING_URI and MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD"
                raise ParkedError(what, fix=fix) from None
            if code in _REFUSING:
                raise TrackingRefusedError(what, code) from None
            raise RetryLaterError(what) from None


def _http_status(error: BaseException | None) -> int:
    """Return the status of the response in an error of requests, as artifacts are sent by it; 0 if there is none."""
    response: object = getattr(error, "response", None)
    status: object = getattr(response, "status_code", 0)
    return status if isinstance(status, int) else 0


def finite_or_nan(value: float) -> float:
    """Return a value that every store of MLflow takes: of an infinity, the largest number of its sign."""
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else value
