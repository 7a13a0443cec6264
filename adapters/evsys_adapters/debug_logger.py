"""`DebugLoggerCallback`: logs every hook with its bounded arguments, to find out which hooks run when."""

import logging
import reprlib
from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

import msgspec

from evsys_adapters.common.hook_arguments import field, list_or_empty, run_id
from evsys_adapters.common.params import validate_params
from evsys_adapters.common.terminal import printable
from evsys_bus.callback import Callback
from evsys_bus.context import (
    ArmResult,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Prediction,
    RunResult,
    TrainingBatch,
)
from evsys_bus.diagnostics import LOGGER_NAME, log

_MAX_ITEMS: Final = 30
"""Maximum number of entries of a mapping or sequence, so that a long text is not built only to be cut."""


_FIELDS: Final = {
    "state": ("step", "num_steps", "stop_requested", "stop_reason", "error"),
    "ctx": ("output_dir", "run_key", "group_name", "ids"),
    "batch": ("loss_fn", "metrics", "data"),
    "arm": ("name", "status", "group_name", "run_id", "metrics", "eval_metrics", "error"),
    "result": ("name", "status", "best_arm", "best_score", "conclusion", "arms"),
}
"""The fields shown of hook arguments with these names."""


class DebugLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `DebugLoggerCallback`."""

    max_len: Annotated[int, msgspec.Meta(ge=10)] = 400
    """Maximum number of characters of one argument."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 3
    """Maximum number of predictions shown of a benchmark."""


class DebugLoggerCallback(Callback):
    """Logs every hook and its arguments at DEBUG, in the logger ``evsys_bus``.

    Arguments may contain arbitrary user data in metrics and predictions, so they are shown only at DEBUG, cut to
    ``max_len`` characters; configs, which may contain credentials, are not shown. If the logger's level is above DEBUG,
    nothing is formatted, and one WARNING explains how to see the lines.
    """

    name: ClassVar[str] = "debug_logger"
    Config: ClassVar[type | None] = DebugLoggerConfig
    ranks = "rank0"

    def __init__(self, max_len: int = 400, max_pred_rows: int = 3) -> None:
        config = validate_params(DebugLoggerConfig, {"max_len": max_len, "max_pred_rows": max_pred_rows})
        self._max_pred_rows = config.max_pred_rows
        self._max_len = config.max_len
        self._short_repr = _ShortRepr(config.max_len)
        self._warned = False

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Log the call."""
        self._log("on_experiment_start", ctx=ctx)

    def on_group_start(self, ctx: LogContext, group_name: str) -> None:
        """Log the call."""
        self._log("on_group_start", ctx=ctx, group_name=group_name)

    def on_run_start(self, ctx: LogContext) -> None:
        """Log the call."""
        self._log("on_run_start", ctx=ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Log the call."""
        self._log("on_train_start", state=state)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the call."""
        self._log("on_step_end", state=state, step_idx=step_idx, batch=batch, metrics=metrics)

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Log the call."""
        self._log("on_checkpoint", state=state, row=row)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Log the call."""
        self._log("on_eval", state=state, step_idx=step_idx, eval_name=eval_name, metrics=metrics)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Log the call, and the first predictions on separate lines."""
        rows = list_or_empty(predictions)
        self._log("on_benchmark_eval", ctx=ctx, eval_result=eval_result, predictions=len(rows), step=step)
        for index, row in enumerate(rows[: self._max_pred_rows]):
            self._log("on_benchmark_eval", prediction=index, row=row)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Log the call."""
        self._log("on_train_end", state=state, artifacts=artifacts)

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Log the call."""
        self._log("on_run_end", ctx=ctx, run_result=run_result, arm=arm)

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Log the call."""
        self._log("on_experiment_end", ctx=ctx, result=result)

    def _log(self, hook: str, **arguments: object) -> None:
        if logging.getLogger(LOGGER_NAME).isEnabledFor(logging.DEBUG):
            log().debug(
                "hook.called", hook=hook, **{name: self._format(name, each) for name, each in arguments.items()}
            )
        elif not self._warned:
            self._warned = True
            fix = f"logging.basicConfig(); logging.getLogger({LOGGER_NAME!r}).setLevel('DEBUG')"
            log().warning(
                "debug_logger.not_shown", why="its lines are logged at DEBUG, which the log level hides", fix=fix
            )

    def _format(self, name: str, value: object) -> str:
        """Format an argument as one line of at most ``max_len`` characters, even if its repr raises."""
        try:
            text = self._short_repr.argument(name, value)
        except Exception as error:  # a foreign repr
            text = f"<{type(value).__name__}: {type(error).__name__} in its repr>"
        text = text if len(text) <= self._max_len else f"{text[: self._max_len - 1]}…"
        return printable(text)


class _ShortRepr(reprlib.Repr):
    """Bounded reprs in which handles and results show their identifying fields, and no config.

    `reprlib.Repr` calls a method ``repr_X`` for values whose type is named X, also inside containers.
    """

    def __init__(self, max_len: int) -> None:
        super().__init__()
        self.maxlevel = 5
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = _MAX_ITEMS
        self.maxstring = self.maxother = self.maxlong = max_len

    def argument(self, name: str, value: object) -> str:
        """Format the hook argument with this name."""
        if value is None or name not in _FIELDS or (name == "batch" and isinstance(value, Mapping)):
            return self.repr(value)
        run = {"run": run_id(value)} if name == "state" else {}
        return self._fields(value, self.maxlevel, *_FIELDS[name], **run)

    def repr_instance(self, x: object, level: int) -> str:
        """Like `reprlib.Repr.repr_instance`, but hides the config of nested results."""
        if hasattr(x, "run_config"):
            return self._fields(x, level, *_FIELDS["ctx" if hasattr(x, "output_dir") else "arm"])
        return super().repr_instance(x, level)

    def repr_ArmResult(self, arm: ArmResult, level: int) -> str:  # noqa: N802  # reprlib's naming
        return self._fields(arm, level, *_FIELDS["arm"])

    def _fields(self, value: object, level: int, *names: str, **first: object) -> str:
        shown = first | {name: field(value, name) for name in names}
        pairs = ", ".join(f"{name}={self.repr1(each, level - 1)}" for name, each in shown.items())
        return f"{type(value).__name__}({pairs})"
