"""Load an experiment from a file or a mapping, and validate all of it in one pass.

Validation imports the plugins, callbacks and the recipe's module that the experiment names; it constructs and starts
nothing.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from evsys_bus.config.arms import Arm, count_arms, expand_arms
from evsys_bus.config.build import check_callbacks
from evsys_bus.config.document import Document
from evsys_bus.config.experiment import ExperimentConfig
from evsys_bus.config.issue_report import ErrorContext, param_errors
from evsys_bus.config.recipe import Recipe, import_module, load_recipe
from evsys_bus.config.registry import REGISTRY, Registry
from evsys_bus.config.schema import config_schema
from evsys_bus.config.spec import CallbackSpec, combine_errors, individual_errors, join_path, split_path
from evsys_bus.config.validate import check_config
from evsys_bus.errors import BadSpecError, ConfigError, DocumentError, Location, UnknownParamError

MAX_RUNS: Final = 10_000
"""Number of runs in one experiment: arms times seeds times stages."""


def load_experiment(document: Document, *, registry: Registry = REGISTRY) -> ExperimentConfig:
    """Load an experiment from a document.

    Args:
        document: Provides the mapping, and the position of errors in the file or on the command line.
        registry: Where the kinds of callbacks are looked up.

    Raises:
        ConfigError: Like `read_experiment`, with file, line and column.
    """
    try:
        return read_experiment(document.value, registry=registry)
    except ConfigError as error:
        errors = list(individual_errors(error))
        for each in errors:
            if each.where is not None:
                each.where = document.where(each.where.path, key=_points_at_key(each, each.where.path))
        raise combine_errors(sorted(errors, key=_sort_position)) from error.__cause__


def read_experiment(
    value: Mapping[str, Any], *, recipe: Callable[..., Any] | None = None, registry: Registry = REGISTRY
) -> ExperimentConfig:
    """Load an experiment from a mapping.

    Args:
        value: Mapping with the keys of `ExperimentConfig`.
        recipe: Replaces the recipe that ``value`` names, which then may be absent.
        registry: Where the kinds of callbacks are looked up.

    Raises:
        UnknownParamError: A key that an experiment, or the recipe's Config, does not have.
        WrongParamError: A value of the wrong type or out of range, or a required one that is missing.
        DocumentError: The recipe or a plugin cannot be loaded, or values contradict each other.
        ConfigError: An error of a callback, see `build_callbacks`.
        ConfigErrors: Several of these.
    """
    value = {"recipe": ""} | dict(value) if recipe is not None else dict(value)
    _, issues = check_config(ExperimentConfig, value)
    context = ErrorContext("the experiment", config_schema(ExperimentConfig), "", noun="key")
    errors = param_errors(context, value, issues, lambda path: join_path("$", *path))

    invalid_keys = {issue.path[0] for issue in issues}
    valid = {key: part for key, part in value.items() if key not in invalid_keys}
    config, _ = check_config(ExperimentConfig, {"name": "unknown", "recipe": ""} | valid)
    for check in (_check_names, _check_arms, _check_seeds, _check_stages, _check_plugins):
        errors += check(config)
    if "n_repeats" not in value and config.seeds is not None and len(config.seeds) > 1:
        errors.append(_missing_repeats_error(len(config.seeds)))
    try:
        check_callbacks(config.callbacks, registry=registry)
    except ConfigError as error:
        errors += individual_errors(error)
    if recipe is not None or "recipe" in valid:
        errors += _check_recipe(config, recipe or config.recipe)
    if errors:
        raise combine_errors(errors)
    return config


def _sort_position(error: ConfigError) -> tuple[int, int]:
    """Sort key of an error: its position in the file; errors of the command line come first."""
    where = error.where
    return (0, 0) if where is None or where.line is None else (where.line, where.column or 0)


def _points_at_key(error: ConfigError, path: str) -> bool:
    """Whether the key is wrong and not its value, so that the caret belongs under the key."""
    *_, last = split_path(path) or ("",)
    return isinstance(error, UnknownParamError) or (
        isinstance(error, BadSpecError) and last not in CallbackSpec.__struct_fields__
    )


def _check_names(config: ExperimentConfig) -> Iterator[ConfigError]:
    """Check that the experiment's name is valid as the name of a directory, and that the metric has a name."""
    if (
        not config.name.strip()
        or config.name in {".", ".."}
        or any(each in "/\\" or not each.isprintable() for each in config.name)
    ):
        what = f"{config.name!r:.60} is no name for an experiment"
        why = "it names the folder that results go to"
        yield DocumentError(what, where=Location("$.name"), why=why, fix="use letters, digits, - and _: name: lr-sweep")
    if config.success_metric is not None and not config.success_metric.name:
        fix = "write <benchmark>/<metric>, or the name of a training metric"
        yield DocumentError("the success metric has no name", where=Location("$.success_metric.name"), fix=fix)


def _check_arms(config: ExperimentConfig) -> Iterator[ConfigError]:
    if config.runs and config.matrix:
        what = "an experiment has either runs or a matrix, and this one has both"
        fix = "remove one; a matrix makes an arm of every combination of its values"
        yield DocumentError(what, where=Location("$.matrix"), fix=fix)
    for key, values in config.matrix.items():
        if not values:
            fix = f"give it at least one value, or remove it: {key}: [1, 2]"
            yield DocumentError(
                f'"{key}" of the matrix has no values', where=Location(join_path("$.matrix", key)), fix=fix
            )
    if "" in config.runs:
        yield DocumentError("an arm needs a name", where=Location("$.runs"), fix="write its name before the colon")
    runs = count_arms(config) * config.n_repeats * max(1, len(config.continual))
    if runs > MAX_RUNS:
        where = Location("$.matrix" if config.matrix else "$.n_repeats")
        why = f"{count_arms(config):,} arms, {config.n_repeats:,} repeats, {max(1, len(config.continual)):,} stages"
        what = f"{runs:,} runs in one experiment; at most {MAX_RUNS:,}"
        yield DocumentError(what, where=where, why=why, fix="split it into several experiments")
        return
    seen: dict[str, Arm] = {}
    for arm in expand_arms(config) if config.matrix else ():
        if arm.name in seen:
            key = next((key for key, path in arm.param_paths.items() if seen[arm.name].param_paths[key] != path), "")
            what = f'two arms are called "{arm.name}"'
            fix = "remove the duplicate value"
            yield DocumentError(what, where=Location(arm.param_paths.get(key, arm.path)), fix=fix)
            return
        seen[arm.name] = arm


def _check_seeds(config: ExperimentConfig) -> Iterator[ConfigError]:
    if config.seeds is None:
        return
    count = len(config.seeds)
    if count < config.n_repeats:
        what = f"n_repeats is {config.n_repeats}, but there are {count} seeds"
        yield DocumentError(what, where=Location("$.seeds"), fix="give a seed for every repeat, or leave seeds out")
    duplicate = next((each for index, each in enumerate(config.seeds) if each in config.seeds[:index]), None)
    if duplicate is not None:
        index = len(config.seeds) - 1 - config.seeds[::-1].index(duplicate)
        what = f"seed {duplicate} is there twice"
        why = "two runs of an arm would be the same run"
        yield DocumentError(what, where=Location(join_path("$.seeds", index)), why=why, fix="choose another")


def _missing_repeats_error(count: int) -> ConfigError:
    what = f"{count} seeds, but n_repeats is not given, so only the first would be used"
    return DocumentError(what, where=Location("$.seeds"), fix=f"add n_repeats: {count}")


def _check_stages(config: ExperimentConfig) -> Iterator[ConfigError]:
    seen: set[str] = set()
    for index, stage in enumerate(config.continual):
        where = Location(join_path("$.continual", index, "name"))
        if not stage.name:
            yield DocumentError("a stage needs a name", where=where, fix="for example name: pretrain")
        elif stage.name in seen:
            yield DocumentError(f'two stages are called "{stage.name}"', where=where, fix="rename one of them")
        seen.add(stage.name)


def _check_plugins(config: ExperimentConfig) -> Iterator[ConfigError]:
    for index, plugin in enumerate(config.plugins):
        try:
            import_module(plugin, Location(join_path("$.plugins", index)), "plugin")
        except DocumentError as error:
            yield error


def _check_recipe(config: ExperimentConfig, target: str | Callable[..., Any]) -> list[ConfigError]:
    """Return errors of the recipe, and of the params of each arm and stage, without duplicates."""
    try:
        recipe = load_recipe(target)
    except DocumentError as error:
        return [error]
    if recipe.config is None or count_arms(config) * max(1, len(config.continual)) > MAX_RUNS:
        return []
    found: dict[tuple[str, str], ConfigError] = {}
    for arm in expand_arms(config):
        for error in _param_errors(recipe, config, arm):
            found.setdefault((error.where.path if error.where else "", error.what), error)
    return list(found.values())


def _param_errors(recipe: Recipe, config: ExperimentConfig, arm: Arm) -> Iterator[ConfigError]:
    plans = [(arm.params, arm.param_paths, arm.path)]
    if config.continual:
        plans = [
            (
                arm.params | stage.params,
                arm.param_paths | {key: join_path(stage_path, key) for key in stage.params},
                arm.path,
            )
            for index, stage in enumerate(config.continual)
            for stage_path in [join_path("$.continual", index, "params")]
        ]
    for params, param_paths, default in plans:
        try:
            recipe.params(
                params,
                path_of=lambda path, param_paths=param_paths, default=default: (
                    join_path(param_paths.get(str(path[0]), default), *path[1:]) if path else default
                ),
            )
        except ConfigError as error:
            yield from individual_errors(error)
