"""Small parts of a training: a backend, a step builder and an evaluator."""

import json
from pathlib import Path
from typing import Any

from evsys_bus import TrainingBatch


class NumberBackend:
    """A backend with one number, which grows by the rate at each step; its states are JSON files in ``folder``."""

    def __init__(self, folder: Path, rate: float = 0.5) -> None:
        self.value, self.rate, self.folder = 0.0, rate, folder

    async def forward_backward(self, batch: TrainingBatch) -> dict[str, float]:
        return {"value": self.value}

    async def optim_step(self) -> None:
        self.value += self.rate

    async def save_state(self, name: str) -> str:
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(self.value))
        path.with_suffix(".part").replace(path)
        return str(path)

    async def save_weights_for_sampler(self, name: str) -> None:
        return None

    async def load_state(self, path: str) -> None:
        self.value = json.loads(Path(path).read_text())  # noqa: ASYNC240 # a small file


class IndexBatches:
    """Builds batches that contain the index of their step."""

    async def build_batch(self, step_idx: int) -> TrainingBatch:
        return TrainingBatch(data=[step_idx])


class FixedEvaluator:
    """An evaluator that returns this score; an exception is raised."""

    def __init__(self, name: str, every: int, score: Any) -> None:
        self.name, self.every, self.score = name, every, score

    async def evaluate(self, state: object) -> Any:
        if isinstance(self.score, BaseException):
            raise self.score
        return self.score
