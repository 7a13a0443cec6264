"""`Experiment`: arms, seeds and stages, each run isolated, several at a time, and a conclusion at the end.

This module owns the order of runs; `arm_run` executes a single one.

    ExperimentStart
    GroupStart            before the first run of a group
    each run              RunStart … RunEnd, then result.json, then experiment.json
    ExperimentEnd         also when it was cancelled
"""

import asyncio
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio

from evsys_bus.bus import EventBus
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, Status
from evsys_bus.diagnostics import log
from evsys_bus.errors import TrainingError, Where
from evsys_bus.events import ExperimentEnd, ExperimentStart, GroupStart
from evsys_bus.tasks import see_through
from evsys_bus.training.arm_run import ArmRun, final_state, id_text, not_run
from evsys_bus.training.folder_lock import locked
from evsys_bus.training.ledger import Ledger
from evsys_bus.training.loop import JOURNAL
from evsys_bus.training.outcome import conclude, summarise
from evsys_bus.training.plan import RecipeFunction, RunPlan, chains_of, folder_name
from evsys_bus.training.walls import LEAVE
from evsys_bus.where import local_path
from evsys_bus.wiring.build import build_callbacks
from evsys_bus.wiring.experiment import ExperimentConfig
from evsys_bus.wiring.load import read_experiment
from evsys_bus.wiring.recipe import import_module, load_recipe


class Experiment:
    """Runs every arm with every seed, and determines the best arm.

    Args:
        config: The experiment; a mapping is validated like a file.
        recipe: Replaces the recipe of the config: ``recipe(params, run)`` returns `RunParts`, or an awaitable of it.
        callbacks: Callbacks of the experiment's own bus, which records into ``<output_dir>/journal``. Default: the
            callbacks in the config.
        bus: An open bus to publish to instead. It stays open; the callbacks of the config are not used.
        resume: Continue the experiment in the directory: completed runs are skipped, others continue from their last
            full state, failed ones are retried. A completed run whose ``steps`` are raised continues to the new
            horizon.
        output_dir: Default: the config's, or ``runs/<name>``.
        only_arms: Run only these arms; the others can be run later with ``resume``.
        only_seeds: Run only these seeds.

    Raises:
        ConfigError: The config, a parameter of an arm or a callback is wrong, or a recipe, arm or seed does not exist.
        TrainingError: Both a bus and callbacks were given.
        HookError: A callback has a hook that could never be called.
        SettingError: The output directory is a URL.

    Example:
        >>> def recipe(params, run):
        ...     return RunParts(backend=Model(params, run.seed), step_builder=Batches(), num_steps=params["steps"])
        >>> config = ExperimentConfig(name="lr", recipe="", run={"steps": 10}, matrix={"lr": [0.1, 0.2]}, n_repeats=2)
        >>> Experiment(config, recipe=recipe).plans[-1].run_key
        'lr=0.2-s1'
    """

    def __init__(
        self,
        config: ExperimentConfig | Mapping[str, Any],
        *,
        recipe: RecipeFunction | None = None,
        callbacks: Iterable[object] | None = None,
        bus: EventBus | None = None,
        resume: bool = False,
        output_dir: Path | str | None = None,
        only_arms: Collection[str] | None = None,
        only_seeds: Collection[int] | None = None,
    ) -> None:
        if bus is not None and callbacks is not None:
            raise TrainingError("an experiment takes a bus or callbacks, not both", fix="give the callbacks to the bus")
        self.config = config if isinstance(config, ExperimentConfig) else read_experiment(config, recipe=recipe)
        self.recipe = load_recipe(recipe or self.config.recipe)
        given = output_dir or self.config.output_dir or Path("runs", folder_name(self.config.name))
        self.output_dir = local_path(given, "output_dir")
        self._chains = chains_of(self.config, self.output_dir, only_arms=only_arms, only_seeds=only_seeds)
        for plan in self.plans:
            self.recipe.params(plan.params)
        for index, module in enumerate(self.config.plugins):
            import_module(module, Where(f"$.plugins[{index}]"), "plugin")
        if bus is None:
            hooks = build_callbacks(self.config.callbacks) if callbacks is None else callbacks
            self._bus = EventBus(hooks, journal=self.output_dir / JOURNAL)
        else:
            self._bus = nullcontext(bus)
        self.ctx = LogContext(output_dir=self.output_dir, config=self.config)
        self.resume = resume
        self._arms: dict[str, ArmResult] = {}
        self._groups: set[str] = set()
        self._workers: set[asyncio.Task[Any]] = set()
        self._began = False
        self._at_work = 0
        self._idle = asyncio.Event()
        self._stopping = False
        self._leave: BaseException | None = None

    @property
    def plans(self) -> list[RunPlan]:
        """All runs, in the order in which they start."""
        return [plan for chain in self._chains for plan in chain]

    async def run(self) -> ExperimentResult:
        """Run the experiment; can be called once.

        On cancellation (the bus cancels on SIGTERM), active loops finish their step and save ``final``, other runs are
        cancelled, and ExperimentEnd is published before CancelledError is raised. A second cancellation aborts at once.

        Raises:
            TrainingError: The experiment was run already; or the directory cannot be used, is in use, or holds an
                experiment and ``resume`` is false.
            KeyboardInterrupt, SystemExit: From a hook or a run, after ExperimentEnd.
        """
        if self._began:
            raise TrainingError("this experiment ran already", fix="make a new Experiment, with resume=True to go on")
        self._began = True
        metadata = self.config.metadata
        hypothesis = str(metadata["hypothesis"]) if metadata.get("hypothesis") else None
        with locked(self.output_dir, "the experiment's directory"):
            ledger = Ledger(self.output_dir, self.config.name, self.plans, resume=self.resume, hypothesis=hypothesis)
            async with self._bus as bus:
                return await see_through(self._run(bus, ledger, hypothesis), on_cancel=self._stop)

    async def _run(self, bus: EventBus, ledger: Ledger, hypothesis: str | None) -> ExperimentResult:
        to_the_end = False
        try:
            bus.publish(ExperimentStart(self.ctx))
            await self._all_chains(bus, ledger)
            to_the_end = True
        except LEAVE:
            self._stopping = True
            raise
        finally:
            result = self._result(hypothesis, ledger, to_the_end=to_the_end)
            bus.publish(ExperimentEnd(self.ctx, result))
            ledger.close(result)
        if self._leave is not None:
            raise self._leave
        return result

    async def _all_chains(self, bus: EventBus, ledger: Ledger) -> None:
        """Run all sequences, at most ``max_concurrent_runs`` at a time; a worker takes the next when it is free."""
        if not self._chains:
            return
        waiting = iter(self._chains)
        async with anyio.create_task_group() as group:
            for number in range(min(self.config.max_concurrent_runs, len(self._chains))):
                self._at_work += 1
                group.start_soon(self._work, waiting, bus, ledger, name=f"evsys-bus:runs-{number}")
            try:
                await self._idle.wait()
            except asyncio.CancelledError:  # the second cancellation; the task group alone would not stop the loops
                self._stop()
                raise

    async def _work(self, chains: Iterator[Sequence[RunPlan]], bus: EventBus, ledger: Ledger) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._workers.add(task)
        try:
            for chain in chains:
                await self._chain(chain, bus, ledger)
        except (KeyboardInterrupt, SystemExit) as leave:
            # Raised from a task, these would stop the event loop itself, before the other runs could finish.
            self._leave = leave
            self._stop()
        finally:
            self._workers.discard(task)
            self._at_work -= 1
            if self._at_work == 0:
                self._idle.set()

    async def _chain(self, chain: Sequence[RunPlan], bus: EventBus, ledger: Ledger) -> None:
        begin_from: str | None = None
        broken: str | None = None
        for plan in chain:
            why_not = "the experiment was stopped" if self._stopping else broken
            arm = ledger.finished(plan)
            if arm is not None:
                log().info("run.skipped", run=plan.run_key, why="it was completed earlier")
            elif why_not is not None:
                arm = not_run(plan, why_not)
                ledger.ended(plan, arm)
            else:
                arm = await self._one(plan, begin_from, bus, ledger)
            self._arms[plan.run_key] = arm
            begin_from = final_state(arm)
            if arm.status != "completed" and broken is None:
                broken = f"stage {plan.stage} {arm.status}: {arm.error}"

    async def _one(self, plan: RunPlan, begin_from: str | None, bus: EventBus, ledger: Ledger) -> ArmResult:
        group = plan.group_name
        if group is not None and group not in self._groups:
            self._groups.add(group)
            bus.publish(GroupStart(self.ctx, group))
        ledger.began(plan)
        run = ArmRun(
            plan,
            self.recipe,
            ctx=self.ctx.for_run(plan.run_key, plan.run_config, group),
            bus=bus,
            stopping=lambda: self._stopping,
        )
        arm = await run.go(begin_from=begin_from, resume=self.resume)
        ledger.ended(plan, arm)
        return arm

    def _stop(self) -> None:
        """Cancel the active runs and start no further ones."""
        self._stopping = True
        for task in self._workers:
            task.cancel()

    def _result(self, hypothesis: str | None, ledger: Ledger, *, to_the_end: bool) -> ExperimentResult:
        """Build the result of the experiment: the runs of this session in planned order, then those of earlier ones."""
        arms = {
            plan.run_key: self._arms.get(plan.run_key)
            or ledger.finished(plan)
            or not_run(plan, "the experiment was stopped")
            for plan in self.plans
        }
        arms |= ledger.others(arms)
        # The conclusion must not depend on which runs were in which session: among equal arms, the first planned wins.
        planned = [plan.run_key for chain in chains_of(self.config, self.output_dir) for plan in chain]
        in_order = [arms[key] for key in dict.fromkeys([*planned, *arms]) if key in arms]
        success = self.config.success_metric
        verdict = conclude(summarise(in_order, success), success)
        ends = {arm.status for arm in in_order}
        status: Status = "completed"
        if self._stopping:
            status = "cancelled"
        elif "failed" in ends or not to_the_end:
            status = "failed"
        elif "cancelled" in ends:
            status = "cancelled"
        return ExperimentResult(
            name=self.config.name,
            status=status,
            arms=list(arms.values()),
            best_arm=verdict.best_arm,
            best_score=verdict.best_score,
            conclusion=verdict.conclusion,
            experiment_id=id_text(self.ctx.ids.get("experiment_id")),
            hypothesis=hypothesis,
        )
