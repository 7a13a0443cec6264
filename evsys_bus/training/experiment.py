"""`Experiment`: arms, seeds and stages, each run isolated, several at a time, and a conclusion at the end.

This module owns the order of runs; `RunExecutor` executes a single one.

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

from evsys_bus.bus import EventBus, Health
from evsys_bus.codec.redact import Redaction
from evsys_bus.config.build import build_callbacks
from evsys_bus.config.experiment import ExperimentConfig, import_module, load_recipe, read_experiment
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, Status
from evsys_bus.diagnostics import log
from evsys_bus.errors import Location, TrainingError
from evsys_bus.events import ExperimentEnd, ExperimentStart, GroupStart
from evsys_bus.location import local_path
from evsys_bus.run_files import journal_directory, lock_folder
from evsys_bus.tasks import Receipt, run_to_completion
from evsys_bus.training.experiment_store import ExperimentStore
from evsys_bus.training.loop import EXIT
from evsys_bus.training.plan import RecipeFunction, RunPlan, run_sequences, safe_folder_name
from evsys_bus.training.run_executor import RunExecutor, final_state_path, id_text, skipped_result
from evsys_bus.training.summary import conclude, summarise


class Experiment:
    """Runs every arm with every seed, and determines the best arm.

    Args:
        config: The experiment; a mapping is validated like a file.
        recipe: Replaces the recipe of the config: ``recipe(params, run)`` returns `RunComponents`, or an awaitable of
            it.
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
        ...     return RunComponents(backend=Model(params, run.seed), step_builder=Batches(), num_steps=params["steps"])
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
        directory = output_dir or self.config.output_dir or Path("runs", safe_folder_name(self.config.name))
        self.output_dir = local_path(directory, "output_dir")
        self._sequences = run_sequences(self.config, self.output_dir, only_arms=only_arms, only_seeds=only_seeds)
        for plan in self.plans:
            self.recipe.params(plan.params)
        for index, module in enumerate(self.config.plugins):
            import_module(module, Location(f"$.plugins[{index}]"), "plugin")
        if bus is None:
            hooks = build_callbacks(self.config.callbacks) if callbacks is None else callbacks
            self._bus = EventBus(
                hooks, journal=journal_directory(self.output_dir), redact=self.config.redact, reveal=self.config.reveal
            )
        else:
            self._bus = bus
        self._is_own_bus = bus is None
        self.ctx = LogContext(output_dir=self.output_dir, config=self.config)
        self.resume = resume
        self._results: dict[str, ArmResult] = {}
        self._started_groups: set[str] = set()
        self._workers: set[asyncio.Task[Any]] = set()
        self._started = False
        self._active_workers = 0
        self._idle = asyncio.Event()
        self._is_stopping = False
        self._exit_error: BaseException | None = None

    @property
    def plans(self) -> list[RunPlan]:
        """All runs, in the order in which they start."""
        return [plan for sequence in self._sequences for plan in sequence]

    @property
    def receipt(self) -> Receipt | None:
        """The receipt of the experiment's bus; None until that bus has closed."""
        return self._bus.receipt

    def health(self) -> Health:
        """Return the current counts of the experiment's bus; callable from any thread."""
        return self._bus.health()

    async def run(self) -> ExperimentResult:
        """Run the experiment; can be called once.

        On cancellation (the bus cancels on SIGTERM), active loops finish their step and save ``final``, other runs are
        cancelled, and ExperimentEnd is published before CancelledError is raised. A second cancellation aborts at once.

        Raises:
            TrainingError: The experiment was run already; or the directory cannot be used, is in use, or holds an
                experiment and ``resume`` is false.
            KeyboardInterrupt, SystemExit: From a hook or a run, after ExperimentEnd.
        """
        if self._started:
            raise TrainingError("this experiment ran already", fix="make a new Experiment, with resume=True to go on")
        self._started = True
        metadata = self.config.metadata
        hypothesis = str(metadata["hypothesis"]) if metadata.get("hypothesis") else None
        with lock_folder(self.output_dir, "the experiment's directory"):
            redaction = Redaction.of(self.config.redact, self.config.reveal)
            store = ExperimentStore(
                self.output_dir,
                self.config.name,
                self.plans,
                resume=self.resume,
                hypothesis=hypothesis,
                redaction=redaction,
            )
            async with self._bus if self._is_own_bus else nullcontext(self._bus) as bus:
                return await run_to_completion(self._run(bus, store, hypothesis), on_cancel=self._stop)

    async def _run(self, bus: EventBus, store: ExperimentStore, hypothesis: str | None) -> ExperimentResult:
        is_complete = False
        try:
            bus.publish(ExperimentStart(self.ctx))
            await self._run_all(bus, store)
            is_complete = True
        except EXIT:
            self._is_stopping = True
            raise
        finally:
            result = self._build_result(hypothesis, store, is_complete=is_complete)
            bus.publish(ExperimentEnd(self.ctx, result))
            store.mark_finished(result)
        if self._exit_error is not None:
            raise self._exit_error
        return result

    async def _run_all(self, bus: EventBus, store: ExperimentStore) -> None:
        """Run all sequences, at most ``max_concurrent_runs`` at a time; a worker takes the next when it is free."""
        if not self._sequences:
            return
        pending = iter(self._sequences)
        async with anyio.create_task_group() as group:
            for number in range(min(self.config.max_concurrent_runs, len(self._sequences))):
                self._active_workers += 1
                group.start_soon(self._run_worker, pending, bus, store, name=f"evsys-bus:runs-{number}")
            try:
                await self._idle.wait()
            except asyncio.CancelledError:  # the second cancellation; the task group alone would not stop the loops
                self._stop()
                raise

    async def _run_worker(self, sequences: Iterator[Sequence[RunPlan]], bus: EventBus, store: ExperimentStore) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._workers.add(task)
        try:
            for sequence in sequences:
                await self._run_sequence(sequence, bus, store)
        except (KeyboardInterrupt, SystemExit) as exit_error:
            # Raised from a task, these would stop the event loop itself, before the other runs could finish.
            self._exit_error = exit_error
            self._stop()
        finally:
            self._workers.discard(task)
            self._active_workers -= 1
            if self._active_workers == 0:
                self._idle.set()

    async def _run_sequence(self, sequence: Sequence[RunPlan], bus: EventBus, store: ExperimentStore) -> None:
        initial_state_path: str | None = None
        failure: str | None = None
        for plan in sequence:
            skip_reason = "the experiment was stopped" if self._is_stopping else failure
            arm = store.completed_result(plan)
            if arm is not None:
                log().info("run.skipped", run=plan.run_key, why="it was completed earlier")
            elif skip_reason is not None:
                arm = skipped_result(plan, skip_reason)
                store.mark_ended(plan, arm)
            else:
                arm = await self._run_one(plan, initial_state_path, bus, store)
            self._results[plan.run_key] = arm
            initial_state_path = final_state_path(arm)
            if arm.status != "completed" and failure is None:
                failure = f"stage {plan.stage} {arm.status}: {arm.error}"

    async def _run_one(
        self, plan: RunPlan, initial_state_path: str | None, bus: EventBus, store: ExperimentStore
    ) -> ArmResult:
        group = plan.group_name
        if group is not None and group not in self._started_groups:
            self._started_groups.add(group)
            bus.publish(GroupStart(self.ctx, group))
        store.mark_started(plan)
        executor = RunExecutor(
            plan,
            self.recipe,
            ctx=self.ctx.for_run(plan.run_key, plan.run_config, group),
            bus=bus,
            is_stopping=lambda: self._is_stopping,
        )
        arm = await executor.run(initial_state_path=initial_state_path, resume=self.resume)
        store.mark_ended(plan, arm)
        return arm

    def _stop(self) -> None:
        """Cancel the active runs and start no further ones."""
        self._is_stopping = True
        for task in self._workers:
            task.cancel()

    def _build_result(self, hypothesis: str | None, store: ExperimentStore, *, is_complete: bool) -> ExperimentResult:
        """Build the result of the experiment: the runs of this session in planned order, then those of earlier ones."""
        arms = {
            plan.run_key: self._results.get(plan.run_key)
            or store.completed_result(plan)
            or skipped_result(plan, "the experiment was stopped")
            for plan in self.plans
        }
        arms |= store.other_results(arms)
        # The conclusion must not depend on which runs were in which session: among equal arms, the first planned wins.
        planned = [plan.run_key for sequence in run_sequences(self.config, self.output_dir) for plan in sequence]
        ordered = [arms[key] for key in dict.fromkeys([*planned, *arms]) if key in arms]
        success = self.config.success_metric
        conclusion = conclude(summarise(ordered, success), success)
        statuses = {arm.status for arm in ordered}
        status: Status = "completed"
        if self._is_stopping:
            status = "cancelled"
        elif "failed" in statuses or not is_complete:
            status = "failed"
        elif "cancelled" in statuses:
            status = "cancelled"
        return ExperimentResult(
            name=self.config.name,
            status=status,
            arms=list(arms.values()),
            best_arm=conclusion.best_arm,
            best_score=conclusion.best_score,
            conclusion=conclusion.conclusion,
            experiment_id=id_text(self.ctx.ids.get("experiment_id")),
            hypothesis=hypothesis,
        )
