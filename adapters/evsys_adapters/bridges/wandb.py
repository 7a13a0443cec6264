"""The interface of W&B's client, for programs with ``import wandb``; it writes a run of the bus.

    import evsys_adapters.bridges.wandb as wandb

    run = wandb.init(project="ppo", name="first", config=args)       # the run is in runs/ppo/first
    wandb.log({"loss": loss}, step=step)

Nothing is sent anywhere: loggers are given with ``init(..., callbacks=[WandbLoggerCallback("ppo")])``. A row is on
record when `log` returns. No function raises into the training, and none needs an account.

Different from W&B: a row of an earlier step is recorded as a late row, and not dropped; a run of the same name that was
killed goes on; ``val/`` and ``eval_`` at the beginning of a name make an eval of it; names of nested dicts have ``/``.
"""

# Programs give any object as config, path or setting.
# pyright: basic

import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from glob import glob as find_paths
from pathlib import Path
from secrets import choice
from string import ascii_lowercase, digits
from types import SimpleNamespace
from typing import Any, Final, Literal, Self

from evsys_adapters.bridges._arrays import to_scalar
from evsys_adapters.bridges._base import isolated, split_evals
from evsys_adapters.bridges._content import (
    Artifact,
    Audio,
    Histogram,
    Html,
    Image,
    Media,
    Plotly,
    Table,
    Video,
    is_content,
)
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_adapters.common.hook_arguments import fields, safe_name
from evsys_bus.front.mappings import RunConfig

_DEFAULT_NAME: Final = "training"
_ALERT_INTERVAL_SECONDS: Final = 60.0


class AlertLevel(Enum):
    """How urgent an alert is."""

    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


class Settings(SimpleNamespace):
    """Settings by name; `init` uses ``mode``, ``project``, ``run_name``, ``run_id``, ``run_notes``, ``run_tags``."""


class Error(Exception):
    """The base of W&B's errors, for programs that catch them; nothing here raises it."""


# -- config and summary -----------------------------------------------------------------------------------------------


class Config(RunConfig):
    """Values by name, as items or as attributes; changes are recorded."""

    def update(self, values: Any = {}, allow_val_change: Any = None, /, **more: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] # noqa: B006 # as W&B's
        """Add or change values: of a mapping, of ``argparse``, or of any object with fields."""
        more.pop("allow_val_change", None)
        super().update(values if isinstance(values, Mapping) else fields(values), **more)

    def setdefaults(self, values: Any) -> None:
        """Add the values whose names are not there yet."""
        self.update({name: value for name, value in fields(values).items() if name not in self})

    def as_dict(self) -> dict[str, Any]:
        """Return a copy as a dict."""
        return dict(self)

    def set_unrecorded(self, values: Mapping[str, Any]) -> None:
        """Change values that are on record in another way."""
        dict[str, Any].update(self, values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self[name] = value


# -- the run ----------------------------------------------------------------------------------------------------------


class Run:
    """A run, as `init` returns it."""

    def __init__(self, bridge: StepBridge, config: Any, **facts: Any) -> None:
        self.bridge: Final = bridge
        """`bridge.run` is the run of the bus."""
        self.project: str = facts["project"]
        self.entity: str = facts.get("entity") or ""
        self.group: str = facts.get("group") or ""
        self.job_type: str = facts.get("job_type") or ""
        self.id: str = facts.get("id") or ""
        self.resumed = False
        self.disabled: bool = facts["mode"] == "disabled"
        self.offline = True
        self.url: str | None = None
        self.sweep_id: str | None = None
        self.start_time = time.time()
        self.starting_step = 0
        self.step = 0
        """The step of the next row, or of the row that is collected."""
        self.config = Config(self._update_config, None)
        self.summary = Config(self._update_summary, None)
        self.settings = Settings(**facts)
        self._name: str = facts.get("name") or ""
        self._has_parts = self._has_rows = False
        self._axes: set[str] = set()
        self._alerts: dict[str, float] = {}
        self._lock = threading.RLock()
        if self.disabled:
            bridge.start(is_rank_zero=False)
        self.config.set_unrecorded(fields(config))
        self._open(facts)

    @isolated
    def _open(self, facts: Mapping[str, Any]) -> None:
        labels = {name: facts[name] for name in ("project", "entity", "group", "job_type") if facts.get(name)}
        run = self.bridge.open(config={**self.config, "wandb": labels} if labels else {**self.config})
        self.resumed = self.bridge.recorded_steps > 0
        if facts.get("resume"):
            self.starting_step = self.step = self.bridge.recorded_steps
        self.id = self.id or run.name

    @property
    def name(self) -> str:
        """The name for display."""
        return self._name or self.bridge.path.name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        self.config.update({"wandb_name": name})

    @property
    def dir(self) -> str:
        """A directory for files of the program; they stay there, and are not sent anywhere."""
        folder = self.bridge.path / "files"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    @property
    def path(self) -> str:
        """Project and id."""
        return f"{self.project}/{self.id}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Short words to find the run by; assign to change them."""
        return () if self.bridge.run is None else self.bridge.run.tags

    @tags.setter
    def tags(self, tags: Iterable[str]) -> None:
        self._set("tags", tuple(tags))

    @property
    def notes(self) -> str | None:
        """A text about the run; assign to change it."""
        return None if self.bridge.run is None else self.bridge.run.notes

    @notes.setter
    def notes(self, notes: str | None) -> None:
        self._set("notes", notes)

    @isolated
    def _set(self, name: str, value: Any) -> None:
        setattr(self.bridge.open(), name, value)

    @isolated
    def log(
        self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None, sync: Any = None
    ) -> None:
        """Record metrics, pictures, tables and so on.

        Args:
            data: Values by name; names of nested dicts are joined by ``/``.
            step: The step. None: that of the row that is collected, which is complete then unless ``commit`` is False.
            commit: Whether the row is complete. Default: only without a step; else a later step completes it.
            sync: Without effect.
        """
        with self._lock:
            is_complete = step is None if commit is None else bool(commit)
            target = self.step if step is None else int(to_scalar(step))
            is_late = target < self.step and self._has_rows
            numbers, media = _split(data)
            self.summary.set_unrecorded(numbers)
            axes = {name: numbers.pop(name) for name in self._axes.intersection(numbers)}
            if axes:  # apart, because what comes with an eval is no row
                self.bridge.log(axes, target)
            if numbers:
                self.bridge.log(numbers, target, commit=is_complete or is_late)
            is_open = self._has_parts and target == self.step
            if is_complete and (axes or is_open) and not split_evals(numbers)[0]:
                self.bridge.open().log({}, target, commit=True)
            for name, value in media:
                self._store(name, value, target)
            self._has_rows = True
            if not is_late:
                self.step = target + is_complete
                self._has_parts = not is_complete and bool(is_open or numbers or axes)

    def _store(self, name: str, value: Any, step: int | None) -> None:
        if isinstance(value, list | tuple):
            for index, each in enumerate(value):
                self._store(f"{name}/{index}" if len(value) > 1 else name, each, step)
        elif isinstance(value, Media | Table | Artifact):
            value.store(self.bridge, name, step)
        else:
            self.bridge.open().figure(name, value, step=step)

    @isolated
    def log_artifact(
        self,
        artifact_or_path: Any,
        name: str | None = None,
        type: str | None = None,  # noqa: A002 # the signature it replaces
        aliases: Sequence[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Artifact:
        """Store a copy of a file, a directory or an `Artifact`."""
        if isinstance(artifact_or_path, Artifact):
            artifact = artifact_or_path
        else:
            path = Path(artifact_or_path)
            artifact = Artifact(name or path.name, type or "file")
            (artifact.add_dir if path.is_dir() else artifact.add_file)(path)
        if artifact.has_files():
            artifact.store(self.bridge)
        about = {
            "metadata": artifact.metadata,
            "description": artifact.description,
            "aliases": [*(aliases or ())],
            "references": artifact.references,
        }
        if any(about.values()):
            filled = {key: value for key, value in about.items() if value}
            self.summary.update({f"artifact/{artifact.name}": filled})
        return artifact

    def log_model(self, path: Any, name: str | None = None, aliases: Sequence[str] | None = None) -> None:
        """Store a copy of a model's file or directory."""
        self.log_artifact(path, name, "model", aliases)

    @isolated
    def save(self, glob_str: Any = None, base_path: Any = None, *args: Any, **kwargs: Any) -> list[str]:
        """Store copies of the files that match; named relative to ``base_path``, or else by their names alone."""
        paths = sorted(path for path in find_paths(os.fspath(glob_str)) if os.path.isfile(path))  # noqa: PTH207, PTH113 # also with a drive or a root
        for path in paths:
            name = os.path.relpath(path, base_path) if base_path else Path(path).name
            self.bridge.open().artifact(name, path, type="file")
        return paths

    @isolated
    def define_metric(self, name: str, step_metric: Any = None, *args: Any, **kwargs: Any) -> None:
        """Draw a metric, or all whose names begin with ``name`` without a final ``*``, over another metric."""
        if step_metric is not None:
            self._axes.add(str(step_metric))
            self.bridge.open().define_metric(name, x=str(step_metric))

    @isolated
    def alert(
        self, title: str, text: str = "", level: Any = None, wait_duration: Any = _ALERT_INTERVAL_SECONDS
    ) -> None:
        """Record an alert, unless there was one of this title less than ``wait_duration`` seconds ago."""
        seconds = wait_duration.total_seconds() if hasattr(wait_duration, "total_seconds") else wait_duration or 0
        now = time.monotonic()
        if now - self._alerts.get(title, -float("inf")) < seconds:
            return
        self._alerts[title] = now
        word = str(getattr(level, "value", level) or "INFO").upper()
        levels: dict[str, Literal["info", "warning", "error"]] = {"INFO": "info", "ERROR": "error"}
        self.bridge.open().alert(title, text, levels.get(word, "warning"))

    def watch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: gradients and parameters are not carried, which is logged once."""
        self.bridge.warn_not_carried("wandb.watch", "gradients are logged with wandb.Histogram")

    def unwatch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_code(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the commit and its changes are on record."""

    def mark_preempting(self) -> None:
        """Do nothing: a run that is preempted continues when the program is started again."""

    def get_url(self) -> str | None:
        """Return None: W&B's address of the run is known to the logger that sends it there."""
        return self.url

    def project_name(self) -> str:
        """Return the project."""
        return self.project

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        """Complete the run, or fail it with an exit code that is not 0."""
        self._finish(exit_code)
        if _process.run is self:
            _process.run = None

    join = finish

    @isolated
    def _finish(self, exit_code: int | None) -> None:
        if exit_code:
            self.bridge.finish_failed(exit_code)
        else:
            self.bridge.complete()

    @isolated
    def _fail(self, error: BaseException) -> None:
        self.bridge.finish(error)

    @isolated
    def _update_config(self, changed: dict[str, Any]) -> None:
        self.bridge.update_config(changed)

    @isolated
    def _update_summary(self, changed: dict[str, Any]) -> None:
        plain = {name: to_scalar(value) for name, value in changed.items()}
        self.bridge.open().summary.update(plain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is not None:
            self._fail(error)
        self.finish()
        return False

    def __getattr__(self, name: str) -> Any:
        """Raises: AttributeError: It names what is there."""
        raise AttributeError(
            _missing(f"a run of {__name__}", name, {*dir(type(self)), *vars(self)}), name=name, obj=self
        )

    def __repr__(self) -> str:
        return f"<Run {self.name!r} in {str(self.bridge.path)!r}>"


def _split(data: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the metrics, by flat names, and the rest by name."""
    numbers: dict[str, Any] = {}
    media: list[tuple[str, Any]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            inner_numbers, inner_media = _split(value, f"{name}/")
            numbers |= inner_numbers
            media += inner_media
        elif is_content(value):
            media.append((name, value))
        else:
            numbers[name] = to_scalar(value)
    return numbers, media


# -- the module -------------------------------------------------------------------------------------------------------


class _Process:
    """What the functions of the module refer to: the run of the last `init` that has not ended."""

    def __init__(self) -> None:
        self.run: Run | None = None


_process: Final = _Process()
__all__ = [
    "AlertLevel",
    "Artifact",
    "Audio",
    "Error",
    "Histogram",
    "Html",
    "Image",
    "Plotly",
    "Run",
    "Settings",
    "Table",
    "Video",
    "alert",
    "config",
    "define_metric",
    "finish",
    "init",
    "join",
    "log",
    "log_artifact",
    "log_code",
    "log_model",
    "login",
    "mark_preempting",
    "run",
    "save",
    "setup",
    "summary",
    "teardown",
    "termlog",
    "termwarn",
    "unwatch",
    "util",
    "watch",
]
__version__: Final = "0.31.0"
"""The version of W&B's client whose interface this is."""


def init(
    entity: str | None = None,
    project: str | None = None,
    dir: Any = None,  # noqa: A002 # the signature it replaces
    id: str | None = None,  # noqa: A002
    name: str | None = None,
    notes: str | None = None,
    tags: Sequence[str] | None = None,
    config: Any = None,
    config_exclude_keys: Sequence[str] | None = None,
    config_include_keys: Sequence[str] | None = None,
    allow_val_change: bool | None = None,
    group: str | None = None,
    job_type: str | None = None,
    mode: str | None = None,
    force: bool | None = None,
    reinit: Any = None,
    resume: Any = None,
    *args: Any,
    settings: Any = None,
    path: Any = None,
    callbacks: Iterable[object] = (),
    environment: bool = True,
    output: bool = True,
    **kwargs: Any,
) -> Run:
    """Open a run, in ``<dir>/<project>/<id or name>``; one of this directory that was killed is continued.

    Args:
        entity: Recorded with the config, as are ``group`` and ``job_type``.
        project: Default: ``WANDB_PROJECT``, else ``uncategorized``.
        dir: Default: ``WANDB_DIR``, else ``runs``.
        id: Default: ``WANDB_RUN_ID``, else the name.
        name: Default: ``WANDB_NAME``, else ``training``.
        notes: A text about the run.
        tags: Short words to find the run by.
        config: A mapping, an ``argparse.Namespace`` or any object with fields.
        config_exclude_keys: Names that are left out of the config.
        config_include_keys: The only names of the config.
        allow_val_change: Without effect: values may change.
        group: See ``entity``.
        job_type: See ``entity``.
        mode: ``disabled`` records nothing; all others are the same. Default: ``WANDB_MODE``.
        force: Without effect.
        reinit: ``True`` or ``finish_previous``: complete the open run first. ``create_new``: leave it open. Else the
            open run is returned.
        resume: If given, rows without a step follow those that are on record; otherwise they begin at 0 again, and
            replace them. ``must`` and ``never``: nothing is recorded unless there is a run to go on with, or none.
        args: Without effect.
        settings: A `Settings` or a dict.
        path: The run's directory, in place of one below ``dir``. Default: ``EVSYS_BUS_RUN_DIR``.
        callbacks: Callbacks of the run, as of `evsys_bus.run`.
        environment: As of `evsys_bus.run`.
        output: As of `evsys_bus.run`.
        kwargs: Without effect.
    """
    previous = _process.run
    if previous is not None and reinit in {True, "finish_previous"}:
        previous.finish()
    elif previous is not None and reinit != "create_new":
        return previous
    given: dict[str, Any] = {key: value for key, value in fields(settings).items() if value is not None}
    variables = os.environ
    project = project or given.get("project") or variables.get("WANDB_PROJECT") or "uncategorized"
    name = name or given.get("run_name") or variables.get("WANDB_NAME")
    run_id = id or given.get("run_id") or variables.get("WANDB_RUN_ID")
    resume = resume or variables.get("WANDB_RESUME")
    root = dir or given.get("root_dir") or variables.get("WANDB_DIR") or "runs"
    options: dict[str, Any] = {
        "callbacks": callbacks,
        "tags": [tags]
        if isinstance(tags, str)
        else tags or given.get("run_tags") or variables.get("WANDB_TAGS", "").replace(",", " ").split(),
        "notes": notes or given.get("run_notes") or variables.get("WANDB_NOTES"),
        "resume": resume if resume in {"must", "never"} else "auto",
        "environment": environment,
        "output": output,
    }
    bridge = StepBridge(path, **options)
    bridge.default_path = Path(root, safe_name(str(project)), safe_name(str(run_id or name or _DEFAULT_NAME)))
    plain = {
        key: value
        for key, value in fields(config).items()
        if key not in (config_exclude_keys or ()) and (config_include_keys is None or key in config_include_keys)
    }
    run = Run(
        bridge,
        plain,
        entity=entity or given.get("entity") or variables.get("WANDB_ENTITY"),
        project=project,
        id=run_id,
        name=name,
        group=group or given.get("run_group") or variables.get("WANDB_RUN_GROUP"),
        job_type=job_type or given.get("run_job_type") or variables.get("WANDB_JOB_TYPE"),
        mode=(mode or given.get("mode") or variables.get("WANDB_MODE") or "online").lower(),
        resume=resume,
    )
    if reinit != "create_new":
        _process.run = run
    return run


run: Run | None  # these three are made on access, by `__getattr__`
config: Config
summary: Config


def _of_run(method: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _process.run is None:
            raise Error(f"call wandb.init() before wandb.{method}()")
        return getattr(_process.run, method)(*args, **kwargs)

    call.__name__ = method
    call.__doc__ = f"Call `Run.{method}` of the run of the last `init`. Raises: Error: there is none."
    return call


log: Final = _of_run("log")
alert: Final = _of_run("alert")
save: Final = _of_run("save")
define_metric: Final = _of_run("define_metric")
log_artifact: Final = _of_run("log_artifact")
log_code: Final = _of_run("log_code")
log_model: Final = _of_run("log_model")
mark_preempting: Final = _of_run("mark_preempting")
watch: Final = _of_run("watch")
unwatch: Final = _of_run("unwatch")


def finish(exit_code: int | None = None, quiet: bool | None = None) -> None:
    """Complete the run of the last `init`, if there is one."""
    if _process.run is not None:
        _process.run.finish(exit_code, quiet)


join = finish


def login(*args: Any, **kwargs: Any) -> bool:
    """Do nothing: no account is needed."""
    return True


def setup(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def teardown(exit_code: int | None = None) -> None:
    """Complete the run."""
    finish(exit_code)


def termlog(string: str = "", newline: bool = True, *args: Any, **kwargs: Any) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"wandb: {string}" + "\n" * newline)


termwarn = termlog


def _generate_id(length: int = 8) -> str:
    return "".join(choice(ascii_lowercase + digits) for _ in range(length))


util: Final = SimpleNamespace(generate_id=_generate_id)


def _missing(owner: str, name: str, names: Iterable[str]) -> str:
    there = ", ".join(sorted(each for each in names if not each.startswith("_")))
    return f"{owner} has no {name!r}; it has {there}"


def __getattr__(name: str) -> Any:
    """Return ``run``, ``config`` or ``summary`` of the run of the last `init`.

    Raises:
        AttributeError: There is nothing of this name; it names what is there.
    """
    if name == "run":
        return _process.run
    if name in {"config", "summary"}:
        if _process.run is None:
            raise Error(f"call wandb.init() before wandb.{name}")
        return getattr(_process.run, name)
    raise AttributeError(_missing(f"module {__name__!r}", name, __all__))


def __dir__() -> list[str]:
    return [*__all__]
