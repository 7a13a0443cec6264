"""`EvsysBusCallback`: Keras' ``fit`` and ``evaluate`` on the bus, with any backend.

    model.fit(..., callbacks=[EvsysBusCallback("runs/first"), keras.callbacks.BackupAndRestore("runs/first/backup")])
"""

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
        self._first_of_epoch = 0
        self._step = 0

    @isolated
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        self._first_of_epoch = epoch * steps if steps else int(self.model.optimizer.iterations)
        if not self.bridge.is_training:  # only here: `BackupAndRestore` sets the first epoch as late as `on_train_begin`
            num_steps = epochs * steps if epochs and steps else None
            self.bridge.start(self._first_of_epoch, config={"optimizer": self.model.optimizer.get_config()}, num_steps=num_steps)

    @isolated
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step = self._first_of_epoch + batch
        if self._step % self._log_every == 0:
            self.bridge.log(logs or {}, self._step, commit=True)
        if self.bridge.stop_requested:
            self.model.stop_training = True

    @isolated
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        metrics, evals = split_evals(logs or {})
        for name, values in evals.items():
            self.bridge.eval(name, values, self._step)
        if self.bridge.run is not None:
            self.bridge.run.epoch_end(epoch, metrics)

    @isolated
    def on_test_end(self, logs: Any = None) -> None:
        if not self.bridge.is_training:  # else they come with the end of the epoch
            self.bridge.eval("test", logs or {}, self._step)

    @isolated
    def on_train_end(self, logs: Any = None) -> None:
        self.bridge.end()
