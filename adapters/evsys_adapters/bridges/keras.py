"""`EvsysBusCallback`: Keras' ``fit`` and ``evaluate`` on the bus, with any backend.

model.fit(..., callbacks=[EvsysBusCallback("runs/first"), keras.callbacks.BackupAndRestore("runs/first/backup")])
"""

# The checks run without the framework, whose types are unknown then.
# pyright: basic, reportMissingImports=false

from typing import Any

import keras

from evsys_adapters.bridges._base import RunBridge, isolated, split_evals


class EvsysBusCallback(keras.callbacks.Callback):
    """Writes batches, epochs and evals to a run; a step is a batch, counted from 0 over all epochs.

    Args:
        path: The run's directory.
        log_every: Batches from one row to the next.
        options: Passed to `evsys_bus.run`.
    """

    def __init__(self, path: Any = None, *, log_every: int = 1, **options: Any) -> None:
        super().__init__()
        self.bridge = RunBridge(path, **options)
        self._log_every = log_every
        self._is_started = False
        self._first_of_epoch = 0
        self.step = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_started = False

    @isolated
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        steps, epochs = self.params.get("steps"), self.params.get("epochs", 1)
        self._first_of_epoch = epoch * steps if steps else int(self.model.optimizer.iterations)
        if not self._is_started:  # only here: `BackupAndRestore` sets the first epoch as late as `on_train_begin`
            self._is_started = True
            config = {"optimizer": self.model.optimizer.get_config()}
            self.bridge.start(self._first_of_epoch, config=config, num_steps=epochs * steps if steps else None)

    @isolated
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.step = self._first_of_epoch + batch
        if self.step % self._log_every == 0:
            self.bridge.log(logs or {}, self.step, commit=True)
        if self.bridge.stop_requested:
            self.model.stop_training = True

    @isolated
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        metrics, evals = split_evals(logs or {})
        for name, values in evals.items():
            self.bridge.eval(name, values, self.step)
        if self.bridge.run is not None:
            self.bridge.run.epoch_end(epoch, metrics)

    @isolated
    def on_test_end(self, logs: Any = None) -> None:
        if not self.bridge.is_training:  # else they come with the end of the epoch
            self.bridge.eval("test", logs or {}, self.step)

    @isolated
    def on_train_end(self, logs: Any = None) -> None:
        self.bridge.end()
