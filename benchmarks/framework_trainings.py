"""Small trainings by real frameworks on a CPU, each with its bridge and with the framework's own logger beside it.

usage: python -m benchmarks.framework_trainings transformers DIR [--steps N] [--kill-at N] [--resume] [--fault NAME]

DIR/run is the run; the steps whose rows were acknowledged are appended to DIR/acknowledged, one a line, and the
nanoseconds of each log call, by logger, to DIR/costs.
"""

import os
import signal
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

from evsys_bus import Callback, build_callbacks

SAVE_EVERY: Final = 5
"""Steps from one checkpoint to the next."""


class Killer(Callback):
    """Kills the process with SIGKILL inside the publish of the n-th row, and requests a stop at a step."""

    def __init__(self, kill_at: int | None = None, stop_at: int | None = None) -> None:
        self._kill_at, self._stop_at, self._rows = kill_at, stop_at, 0

    def on_metrics(self, state: Any, step_idx: int, metrics: Any) -> None:
        """See the part of a row, before it is on record."""
        self._count_row()

    def on_step_end(self, state: Any, step_idx: int, batch: Any, metrics: Any) -> None:
        """See a row."""
        self._count_row()
        if self._stop_at is not None and step_idx >= self._stop_at:
            state.request_stop("as requested")

    def _count_row(self) -> None:
        self._rows += 1
        if self._rows == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Training:
    """What one of the trainings below is given."""

    folder: Path
    steps: int
    resume: bool
    killer: Killer
    fault: str | None = None
    workers: int = 0
    costs: dict[str, list[int]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a bridge."""
        params = {
            "csv_metrics": {"out_path": "{run_dir}/metrics.csv"},
            "tensorboard_logger": {"log_dir": str(self.folder / "tensorboard")},
        }
        loggers = [{"kind": kind, "params": each, "placement": "follow"} for kind, each in params.items()]
        return {"path": self.folder / "run", "callbacks": [self.killer, *build_callbacks(loggers)]}

    def time(self, logger: Any, method: str, *, label: str, step_of: Callable[..., int | None] | None = None) -> None:
        """Time each call of a logger's method from here on; with ``step_of`` its step counts as acknowledged."""
        original = getattr(logger, method)
        costs = self.costs.setdefault(label, [])
        acknowledged = os.open(self.folder / "acknowledged", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter_ns()
            result = original(*args, **kwargs)
            costs.append(perf_counter_ns() - started)
            step = None if step_of is None else step_of(*args, **kwargs)
            if step is not None:
                os.write(acknowledged, b"%d\n" % step)
            return result

        setattr(logger, method, timed)

    def check_fault(self, step: int) -> None:
        """Raise or be terminated in the middle of the training, if that is requested."""
        if step == self.steps // 2 and self.fault == "raise":
            raise ArithmeticError("the loss is not a number")
        if step == self.steps // 2 and self.fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)


def transformers(training: Training) -> None:
    """Hugging Face's Trainer, resumed from its last checkpoint."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging

    from evsys_adapters.bridges.transformers import EvsysBusCallback

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.seen = 0

        def forward(self, x: Any, labels: Any) -> Any:
            self.seen += 1
            training.check_fault(self.seen)
            predicted = self.layer(x).squeeze(-1)
            return {"loss": torch.nn.functional.mse_loss(predicted, labels), "logits": predicted}

    logging.set_verbosity_error()
    torch.manual_seed(0)
    data = [{"x": torch.randn(4), "labels": torch.tensor(1.0)} for _ in range(64)]
    out = training.folder / "out"
    out.mkdir(exist_ok=True)
    args = TrainingArguments(
        str(out),
        max_steps=training.steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=SAVE_EVERY,
        eval_strategy="steps",
        eval_steps=SAVE_EVERY,
        dataloader_num_workers=training.workers,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    ours, own = EvsysBusCallback(**training.options), TensorBoardCallback()
    training.time(
        ours,
        "on_log",
        label="EvsysBusCallback",
        step_of=lambda args, state, control, logs=None, **_: state.global_step if "loss" in (logs or {}) else None,
    )
    training.time(own, "on_log", label="TensorBoardCallback")
    trainer = Trainer(Model(), args, train_dataset=data, eval_dataset=data[:8], callbacks=[ours, own])
    trainer.train(resume_from_checkpoint=training.resume and get_last_checkpoint(out) is not None)
    trainer.evaluate()


def lightning(training: Training) -> None:
    """Lightning's Trainer, resumed by ``ckpt_path="last"``."""
    import logging
    import warnings

    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from evsys_adapters.bridges.lightning import EvsysBusCallback, EvsysBusLogger

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 4})
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            training.check_fault(batch_idx)
            loss = self.layer(batch).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.layer(batch).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=2, num_workers=training.workers)
    ours, own = EvsysBusLogger(**training.options), TensorBoardLogger(training.folder / "tb")
    training.time(
        ours,
        "log_metrics",
        label="EvsysBusLogger",
        step_of=lambda metrics, step=None: step if "loss" in metrics else None,
    )
    training.time(own, "log_metrics", label="TensorBoardLogger")
    trainer = Trainer(
        max_steps=training.steps,
        logger=[ours, own],
        callbacks=[
            EvsysBusCallback(),
            ModelCheckpoint(training.folder / "out", every_n_train_steps=SAVE_EVERY, save_top_k=-1, save_last="link"),
        ],
        log_every_n_steps=1,
        val_check_interval=SAVE_EVERY,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=training.folder,
    )
    trainer.fit(Module(), loader, loader, ckpt_path="last" if training.resume else None)


def accelerate(training: Training) -> None:
    """A loop with Hugging Face's Accelerator, resumed by ``load_state``."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from evsys_adapters.bridges.accelerate import register

    register()
    options = training.options
    project = ProjectConfiguration(
        str(training.folder), str(options.pop("path").parent), automatic_checkpoint_naming=True
    )
    accelerator = Accelerator(cpu=True, log_with=["evsys_bus", "tensorboard"], project_config=project)
    accelerator.init_trackers("run", {"lr": 0.01}, init_kwargs={"evsys_bus": options})
    ours, own = accelerator.trackers
    training.time(ours, "log", label="EvsysBusTracker", step_of=lambda values, step=None, **_: step)
    training.time(own, "log", label="TensorBoardTracker")

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = torch.utils.data.DataLoader(torch.randn(4 * training.steps, 4), batch_size=4, num_workers=training.workers)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    first_step = 0
    saved = len([*(training.folder / "checkpoints").glob("checkpoint_*")]) if training.resume else 0
    if saved:
        accelerator.load_state()  # the newest
        project.iteration = saved
        first_step = saved * SAVE_EVERY
    for step, batch in enumerate(accelerator.skip_first_batches(loader, first_step), first_step):
        training.check_fault(step)
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=step)
        if (step + 1) % SAVE_EVERY == 0:
            ours.checkpoint(accelerator.save_state(), step)
        if ours.bridge.stop_requested:
            break
    accelerator.end_training()


def keras(training: Training) -> None:
    """Keras' ``fit`` on torch, resumed by its ``BackupAndRestore``."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy as np

    from evsys_adapters.bridges.keras import EvsysBusCallback

    class Check(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            training.check_fault(batch)

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4 * SAVE_EVERY, 4), "float32")
    ours = EvsysBusCallback(**training.options)
    own = keras.callbacks.CSVLogger(training.folder / "keras.csv", append=True)
    training.time(ours, "on_train_batch_end", label="EvsysBusCallback", step_of=lambda *_, **__: ours.step)
    training.time(own, "on_epoch_end", label="CSVLogger (an epoch)")
    backup = keras.callbacks.BackupAndRestore(training.folder / "out", delete_checkpoint=False)
    # Ours is last: a row counts once the framework has done with its step.
    model.fit(
        x,
        x[:, :1],
        batch_size=4,
        epochs=training.steps // SAVE_EVERY,
        validation_split=0.0,
        validation_data=(x[:4], x[:4, :1]),
        verbose=0,
        callbacks=[Check(), backup, own, ours],
    )
    model.evaluate(x, x[:, :1], verbose=0, callbacks=[ours])


def stable_baselines3(training: Training) -> None:
    """Stable-Baselines3's PPO, resumed by ``load`` and ``reset_num_timesteps=False``."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import CheckpointCallback
    from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

    from evsys_adapters.bridges.stable_baselines3 import EvsysBusCallback

    rollout = 16
    saved = training.folder / "out"
    newest = max(saved.glob("*.zip"), key=lambda path: int(path.stem.split("_")[-2]), default=None)
    resumes = training.resume and newest is not None
    if resumes:
        model = PPO.load(newest, gymnasium.make("CartPole-v1"), device="cpu")
    else:
        model = PPO("MlpPolicy", "CartPole-v1", n_steps=rollout, batch_size=rollout, n_epochs=1, device="cpu", seed=0)
    own = TensorBoardOutputFormat(str(training.folder / "tb"))
    model.set_logger(Logger(None, [own]))
    ours = EvsysBusCallback(**training.options)

    class Check(CheckpointCallback):
        def _on_rollout_end(self) -> None:
            training.check_fault(self.num_timesteps // rollout)

        def _on_training_start(self) -> None:
            writer = self.model.logger.output_formats[-1]
            training.time(writer, "write", label="EvsysBusWriter", step_of=lambda _, __, step: step)
            training.time(own, "write", label="TensorBoardOutputFormat")

    model.learn(
        training.steps * rollout - model.num_timesteps,
        callback=[ours, Check(SAVE_EVERY * rollout, str(saved))],
        reset_num_timesteps=not resumes,
    )


def tensorboard(training: Training) -> None:
    """A loop that logs with SummaryWriter, resumed by its own file."""
    import tensorboardX

    from evsys_adapters.bridges.tensorboard import SummaryWriter

    options = training.options
    ours = SummaryWriter(options.pop("path"), **options)
    own = tensorboardX.SummaryWriter(str(training.folder / "tb"))
    training.time(ours, "add_scalar", label="SummaryWriter", step_of=lambda tag, value, step: step)
    training.time(own, "add_scalar", label="tensorboardX.SummaryWriter")
    for step in _own_loop(training):
        for writer in (ours, own):
            writer.add_scalar("loss", 1 / (step + 1), step)
            writer.add_scalar("acc", 0.5, step)
    ours.close()


def wandb(training: Training) -> None:
    """A loop that logs with W&B's functions, resumed by its own file; W&B's client is offline."""
    import wandb as own

    from evsys_adapters.bridges import wandb as ours

    run = ours.init(project="bench", config={"lr": 0.1}, **training.options)
    own_run = own.init(project="bench", mode="offline", dir=training.folder, settings=own.Settings(silent=True))
    training.time(run, "log", label="the bridge's log", step_of=lambda data, step: step)
    training.time(own_run, "log", label="wandb.log, offline")
    for step in _own_loop(training):
        for each in (run, own_run):
            each.log({"loss": 1 / (step + 1), "acc": 0.5}, step=step)
    run.finish()
    own_run.finish()


def _own_loop(training: Training) -> Iterator[int]:
    """Yield the steps behind the last checkpoint, which is a file with the number of the next one."""
    saved = training.folder / "out"
    for step in range(int(saved.read_text()) if training.resume and saved.exists() else 0, training.steps):
        training.check_fault(step)
        yield step
        if (step + 1) % SAVE_EVERY == 0:
            saved.write_text(str(step + 1))


def ray(training: Training) -> None:
    """Ray Tune with one trial, resumed by ``Tuner.restore``."""
    import tempfile

    os.environ |= {"TUNE_GLOBAL_CHECKPOINT_S": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    import ray as own
    from ray import tune
    from ray.tune.logger import TBXLoggerCallback

    from evsys_adapters.bridges.ray import EvsysBusLogger

    steps = training.steps

    def trainable(config: Any) -> None:
        checkpoint, first_step = tune.get_checkpoint(), 0
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                first_step = int(Path(folder, "step").read_text())
        for step in range(first_step, steps):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "step").write_text(str(step + 1))
                is_due = (step + 1) % SAVE_EVERY == 0
                tune.report(
                    {"loss": 1 / (step + 1)}, checkpoint=tune.Checkpoint.from_directory(folder) if is_due else None
                )

    options = training.options
    options.pop("path")
    ours, reference = EvsysBusLogger(training.folder, **options), TBXLoggerCallback()
    training.time(
        ours, "log_trial_result", label="EvsysBusLogger", step_of=lambda _, __, result: result["training_iteration"]
    )
    training.time(reference, "log_trial_result", label="TBXLoggerCallback")
    own.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        trainable,
        param_space={"lr": 0.1},
        tune_config=tune.TuneConfig(trial_name_creator=lambda _: "run"),
        run_config=tune.RunConfig(name="out", storage_path=str(training.folder), verbose=0),
    )
    if training.resume and [*(training.folder / "out").glob("experiment_state*")]:
        tuner = tune.Tuner.restore(str(training.folder / "out"), trainable, resume_errored=True)
    tuner._local_tuner._run_config.callbacks = [ours, reference]  # noqa: SLF001 # else those of the killed process
    tuner.fit()


TRAININGS: Final[dict[str, Callable[[Training], None]]] = {
    each.__name__: each
    for each in (transformers, lightning, accelerate, keras, stable_baselines3, tensorboard, wandb, ray)
}


def main() -> None:
    """Run one training, as the arguments request."""
    parser = ArgumentParser()
    parser.add_argument("framework", choices=TRAININGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fault", choices=["raise", "terminate"])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    training = Training(
        given.folder.absolute(),
        given.steps,
        given.resume,
        Killer(given.kill_at, given.stop_at),
        given.fault,
        given.workers,
    )
    TRAININGS[given.framework](training)
    with (training.folder / "costs").open("a", encoding="utf-8") as file:
        for label, costs in training.costs.items():
            file.writelines(f"{label}\t{each}\n" for each in costs)


if __name__ == "__main__":
    main()
