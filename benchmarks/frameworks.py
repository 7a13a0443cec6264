"""Training frameworks as peers in the suite ``dispatch``, each through the code that its own trainer calls.

They take gigabytes to install (group ``peers``) and are left out where they are missing. Each passes its own arguments
to its hooks; the hook does nothing in all of them. None of them isolates a hook that raises.
"""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any, Final

from evsys_bus.bench.dispatch import BATCH, METRICS, Peer
from evsys_bus.bench.suite import TimedLoop

# Types of the frameworks are Any, because pyright runs where they are not installed.


@contextmanager
def transformers(k: int) -> Generator[TimedLoop, None, None]:
    """The callback list of Hugging Face's Trainer."""
    from transformers import logging as transformers_logging
    from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState

    class NoOp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Do nothing."""

    transformers_logging.set_verbosity_error()
    handler = CallbackHandler([], None, None, None, None)
    handler.callbacks = [NoOp() for _ in range(k)]

    def run(operations: int) -> int:
        args, state, control = SimpleNamespace(), TrainerState(), TrainerControl()
        started = perf_counter_ns()
        for _ in range(operations):
            handler.on_step_end(args, state, control)
        return perf_counter_ns() - started

    yield run


@contextmanager
def lightning(k: int) -> Generator[TimedLoop, None, None]:
    """The function with which Lightning's loops call every callback."""
    import lightning.pytorch as pl
    from lightning.pytorch.trainer.call import _call_callback_hooks

    class NoOp(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """Do nothing."""

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet_options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, enable_model_summary=False, accelerator="cpu", **quiet_options)
    trainer.callbacks = [NoOp() for _ in range(k)]
    module = pl.LightningModule()
    trainer.strategy._lightning_module = module  # noqa: SLF001 - there is no public way without training
    module.trainer = trainer

    def run(operations: int) -> int:
        batch, metrics = BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            _call_callback_hooks(trainer, "on_train_batch_end", metrics, batch, i)
        return perf_counter_ns() - started

    yield run


@contextmanager
def composer(k: int) -> Generator[TimedLoop, None, None]:
    """Composer's engine."""
    try:
        from composer.core import Callback, Engine, Event, State
        from composer.devices import DeviceCPU
        from composer.loggers import Logger
        from composer.models import ComposerModel
    except RuntimeError as error:  # raised by a torchvision that does not match the installed torch
        raise ImportError(str(error)) from error
    import torch
    from torch.utils.data import DataLoader

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, batch: Any) -> Any: ...

        def loss(self, outputs: Any, batch: Any) -> Any: ...

    class NoOp(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            """Do nothing."""

    state = State(
        model=Model(),
        rank_zero_seed=0,
        run_name="bench",
        device=DeviceCPU(),
        max_duration="1ep",
        device_train_microbatch_size=1,
        dataloader=DataLoader([1, 2, 3]),
        dataloader_label="train",
        callbacks=[NoOp() for _ in range(k)],
    )
    engine = Engine(state, Logger(state))
    try:

        def run(operations: int) -> int:
            started = perf_counter_ns()
            for _ in range(operations):
                engine.run_event(Event.BATCH_END)
            return perf_counter_ns() - started

        yield run
    finally:
        engine.close()


@contextmanager
def keras(k: int) -> Generator[TimedLoop, None, None]:
    """The callback list of Keras's fit."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    from keras.src.callbacks.callback_list import CallbackList

    class NoOp(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            """Do nothing."""

    callback_list = CallbackList([NoOp() for _ in range(k)], add_history=False, add_progbar=False)

    def run(operations: int) -> int:
        metrics = METRICS
        started = perf_counter_ns()
        for i in range(operations):
            callback_list.on_train_batch_end(i, metrics)
        return perf_counter_ns() - started

    yield run


FRAMEWORKS: Final = {
    "transformers": Peer(transformers, "transformers"),
    "lightning": Peer(lightning, "lightning"),
    "composer": Peer(composer, "mosaicml"),
    "keras": Peer(keras, "keras"),
}
