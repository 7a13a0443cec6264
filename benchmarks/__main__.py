"""The suites of ``evsys-bus bench`` with frameworks and experiment trackers as peers, and some more suites.

usage: uv run --group peers python -m benchmarks journal

Name the suites to run, or none for all of them. The group installs gigabytes; missing peers are left out.
"""

from collections.abc import Mapping

from benchmarks import loggers as heavy
from benchmarks.evsys_logger import EvsysLogger
from benchmarks.frameworks import FRAMEWORKS
from benchmarks.survival import Survival
from benchmarks.upload_steps import UploadSteps
from benchmarks.uploads import Uploads
from evsys_bus.bench.all_loggers import ALL_LOGGERS
from evsys_bus.bench.catching_up import CATCHING_UP
from evsys_bus.bench.costs import COSTS
from evsys_bus.bench.dispatch import LIGHT_PEERS, dispatch_question
from evsys_bus.bench.growth import GROWTH
from evsys_bus.bench.imports import IMPORTS
from evsys_bus.bench.journal import AT_LEAST, JOURNAL, Journal
from evsys_bus.bench.kills import KILLS, Kills
from evsys_bus.bench.lag import LAG
from evsys_bus.bench.lateness import LATENESS
from evsys_bus.bench.leaving import LEAVING
from evsys_bus.bench.question import Question
from evsys_bus.bench.shapes import SHAPES
from evsys_bus.cli.bench import bench_command


def _questions() -> Mapping[str, Question]:
    dispatch = dispatch_question(LIGHT_PEERS | FRAMEWORKS, {"pluggy": 8, "lightning": 30, "composer": 80})
    journal = Journal((*JOURNAL.modules, heavy.__name__), {**AT_LEAST, heavy.TENSORBOARD: 1, heavy.WANDB: 1})
    kills = Kills((*KILLS.modules, heavy.__name__))
    asked: tuple[Question, ...] = (
        dispatch,
        IMPORTS,
        COSTS,
        journal,
        SHAPES,
        kills,
        GROWTH,
        CATCHING_UP,
        LAG,
        LEAVING,
        LATENESS,
        ALL_LOGGERS,
        Survival(),
        Uploads(),
        UploadSteps(),
        EvsysLogger(),
    )
    return {question.name: question for question in asked}


if __name__ == "__main__":
    bench_command(_questions, doc="Run the suites of `evsys-bus bench` against heavier peers, and `survival`.")()
