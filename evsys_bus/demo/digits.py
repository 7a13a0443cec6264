"""A small network that learns to read handwritten digits, implementing the protocols of the training loop.

Contains the data, the network and the benchmarks of the demo. scikit-learn includes the digits (1,797 images of 8x8
pixels, from the UCI repository), so nothing is downloaded; numpy does the arithmetic. The seed determines everything.
"""

import copy
from io import BytesIO
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # pyright: ignore[reportUnknownVariableType] # it has no types

from evsys_bus.context import EvalResult, LoopState, Prediction, TrainingBatch
from evsys_bus.files import replace_file
from evsys_bus.training import Benchmark, SnapshotBackend

Floats: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.int64]

BETA1: Final = 0.9
BETA2: Final = 0.999
EPSILON: Final = 1e-8
"""Adam's constants are those of its paper (Kingma and Ba, 2015)."""


class Images(NamedTuple):
    """A subset of the digits."""

    ids: Labels
    """Their indices among the 1,797."""
    pixels: Floats
    """(n, 64), from 0 to 1."""
    labels: Labels
    """(n,), from 0 to 9."""

    def select(self, indices: Labels) -> "Images":
        """Return the images at these indices."""
        return Images(self.ids[indices], self.pixels[indices], self.labels[indices])


class Split(NamedTuple):
    """The digits in three disjoint parts."""

    train: Images
    val: Images
    test: Images


def load_split(seed: int) -> Split:
    """Split the digits, shuffled by the seed: two thirds to train, one sixth to validate, one sixth to test."""
    bunch = cast("Any", load_digits())  # scikit-learn has no types
    digits = Images(np.arange(len(bunch.target)), bunch.data / 16, bunch.target)
    order = np.random.default_rng((seed, 0)).permutation(len(digits.labels))
    train, val, test = np.split(order, [len(order) * 2 // 3, len(order) * 5 // 6])
    return Split(digits.select(train), digits.select(val), digits.select(test))


class DigitBatches:
    """The batches of a run, shuffled again in each epoch; each depends only on its step index."""

    def __init__(self, images: Images, seed: int, batch_size: int = 64) -> None:
        self._images = images
        self._seed = seed
        self._size = min(batch_size, len(images.labels))
        self.steps_per_epoch = len(images.labels) // self._size

    async def build_batch(self, step_idx: int) -> TrainingBatch:
        """Return the batch of this step; a last incomplete batch of an epoch is dropped."""
        epoch, index = divmod(step_idx, self.steps_per_epoch)
        order = np.random.default_rng((self._seed, 1, epoch)).permutation(len(self._images.labels))
        chosen = order[index * self._size : (index + 1) * self._size]
        return TrainingBatch(data=self._images.select(chosen), loss_fn="cross_entropy", metrics={"epoch": epoch})


class DigitNetwork:
    """The backend: a network of two layers, trained by Adam.

    A step takes a fraction of a millisecond, so it runs on the event loop; a longer one would belong in a thread.
    """

    def __init__(self, directory: Path, seed: int, *, hidden: int = 128, lr: float = 0.003) -> None:
        generator = np.random.default_rng((seed, 2))
        self.weights: dict[str, Floats] = {
            "hidden": generator.normal(0, np.sqrt(2 / 64), (64, hidden)),
            "hidden_bias": np.zeros(hidden),
            "out": generator.normal(0, np.sqrt(2 / hidden), (hidden, 10)),
            "out_bias": np.zeros(10),
        }
        self._mean = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self._square = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self._lr = lr
        self._updates = 0
        self._gradients: dict[str, Floats] = {}
        self._directory = directory

    async def forward_backward(self, batch: TrainingBatch) -> dict[str, float]:
        """Compute the cross entropy of the batch and its gradients."""
        images: Images = batch.data
        hidden, probabilities = self._forward(images.pixels)
        rows = np.arange(len(images.labels))
        loss = _cross_entropy(probabilities, images.labels)
        accuracy = (probabilities.argmax(axis=1) == images.labels).mean()
        logit_gradient = probabilities.copy()
        logit_gradient[rows, images.labels] -= 1
        logit_gradient /= len(rows)
        hidden_gradient = (logit_gradient @ self.weights["out"].T) * (hidden > 0)
        self._gradients = {
            "hidden": images.pixels.T @ hidden_gradient,
            "hidden_bias": hidden_gradient.sum(axis=0),
            "out": hidden.T @ logit_gradient,
            "out_bias": logit_gradient.sum(axis=0),
        }
        return {"loss": loss, "accuracy": float(accuracy)}

    async def optim_step(self) -> dict[str, float]:
        """Update the weights by Adam."""
        self._updates += 1
        for name, gradient in self._gradients.items():
            mean, square = self._mean[name], self._square[name]
            mean += (1 - BETA1) * (gradient - mean)
            square += (1 - BETA2) * (gradient**2 - square)
            unbiased = mean / (1 - BETA1**self._updates), square / (1 - BETA2**self._updates)
            self.weights[name] -= self._lr * unbiased[0] / (np.sqrt(unbiased[1]) + EPSILON)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in self._gradients.values()))
        self._gradients = {}
        return {"grad_norm": float(norm)}

    async def save_state(self, name: str) -> str:
        """Save weights, both moments and the number of updates as ``<name>.state.npz``."""
        moments = {f"mean.{key}": value for key, value in self._mean.items()}
        moments |= {f"square.{key}": value for key, value in self._square.items()}
        return self._write(f"{name}.state.npz", {**self.weights, **moments, "updates": np.array(self._updates)})

    async def save_weights_for_sampler(self, name: str) -> str:
        """Save the weights as ``<name>.weights.npz``."""
        return self._write(f"{name}.weights.npz", self.weights)

    async def snapshot_for_sampler(self) -> "DigitNetwork":
        """Return a copy of the network that later training does not change."""
        snapshot = copy.copy(self)
        snapshot.weights = {name: weight.copy() for name, weight in self.weights.items()}
        return snapshot

    async def load_state(self, path: str) -> None:
        """Restore exactly what `save_state` saved."""
        with np.load(path) as saved:
            self.weights = {name: saved[name] for name in self.weights}
            self._mean = {name: saved[f"mean.{name}"] for name in self.weights}
            self._square = {name: saved[f"square.{name}"] for name in self.weights}
            self._updates = int(saved["updates"])

    def predict_probabilities(self, pixels: Floats) -> Floats:
        """Return the probability of each digit for each image, with shape (n, 10)."""
        return self._forward(pixels)[1]

    def _forward(self, pixels: Floats) -> tuple[Floats, Floats]:
        hidden = np.maximum(pixels @ self.weights["hidden"] + self.weights["hidden_bias"], 0)
        scores = hidden @ self.weights["out"] + self.weights["out_bias"]
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)

    def _write(self, name: str, arrays: "dict[str, Floats]") -> str:
        """Write atomically, so that a kill never leaves half a checkpoint."""
        path = self._directory / name
        content = BytesIO()
        np.savez(content, **arrays)  # pyright: ignore[reportArgumentType] # its keyword allow_pickle is no array
        replace_file(path, content.getvalue(), mode=0o666)
        return str(path)


class DigitBenchmark:
    """Accuracy of the network on one part of the digits: overall, per digit, and image by image."""

    def __init__(self, name: str, images: Images, *, tag: str, every: int = 0) -> None:
        self.name = name
        self.every = every
        self._images = images
        self._tag = tag

    async def evaluate(self, state: LoopState) -> Benchmark:
        """Score the backend of the state."""
        backend: SnapshotBackend = state.backend
        return self.score(cast("DigitNetwork", await backend.snapshot_for_sampler()))

    def score(self, network: DigitNetwork) -> Benchmark:
        """Compute accuracy, cross entropy and accuracy by digit, and one prediction per image."""
        ids, pixels, labels = self._images
        probabilities = network.predict_probabilities(pixels)
        outputs = probabilities.argmax(axis=1)
        correct = outputs == labels
        result = EvalResult(
            name=self.name,
            benchmark_id=f"sklearn-digits/{self._tag}",
            metrics={"accuracy": float(correct.mean()), "loss": _cross_entropy(probabilities, labels)},
            breakdowns={"digit": {str(digit): float(correct[labels == digit].mean()) for digit in range(10)}},
            tags=[self._tag],
        )
        rows = zip(ids.tolist(), labels.tolist(), outputs.tolist(), strict=True)
        return Benchmark(result, [_prediction(*row) for row in rows])


def _cross_entropy(probabilities: Floats, labels: Labels) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels] + 1e-12).mean())


def _prediction(image: int, expected: int, output: int) -> Prediction:
    return {
        "task_id": f"digit-{image:04d}",
        "instruction": f"Which digit does image {image} show?",
        "expected": str(expected),
        "output": str(output),
        "reward": float(expected == output),
    }
