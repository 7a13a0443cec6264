"""An experiment file: its structure, its arms and seeds, its recipe, and its validation in one pass.

A recipe, named as ``module:function``, builds the parts of a run and is called as ``recipe(params, run)``. If its
first parameter is annotated with a msgspec Struct, a dataclass or a pydantic model, params are validated against that,
and the built object is passed; unknown keys are errors even if the class allows them. Otherwise the recipe receives an
unchecked dict.

Validation imports the plugins, callbacks and the recipe's module that the experiment names; it constructs and starts
nothing. `evsys_bus.training` runs experiments.
"""

import functools
import hashlib
import importlib
import inspect
import itertools
import math
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Final, Literal, cast

import msgspec

from evsys_bus.config.build import check_callbacks
from evsys_bus.config.params_schema import as_json, config_schema, is_config
from evsys_bus.config.registry import REGISTRY, Registry
from evsys_bus.config.spec import CallbackSpec, PathPart, combine_errors, individual_errors, join_path, split_path
from evsys_bus.config.validate import ErrorContext, check_config, param_errors
from evsys_bus.config.yaml_nodes import Document
from evsys_bus.errors import (
    BadSpecError,
    ConfigError,
    DocumentError,
    Location,
    UnknownKindError,
    UnknownParamError,
    did_you_mean,
)

Params = dict[str, Any]
"""Parameters of a run; the recipe defines them."""


class SuccessMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The metric whose mean over the seeds decides which arm is best."""

    name: str
    """``<benchmark>/<metric>`` of an evaluation after training, or the name of a training metric (its last value)."""
    mode: Literal["max", "min"] = "max"


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of a continual run; it starts from the full state that the previous stage ended with."""

    name: str
    params: Params = {}
    """These override the params of the arm."""


class ExperimentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An experiment: arms, seeds, and how to run them.

    For one arm give only ``run``. For several give ``runs`` (by name) or ``matrix`` (every combination); their params
    override those of ``run``.
    """

    name: str
    recipe: str
    """``module:function``; it takes the parameters and the plan of a run, and returns the parts for the loop."""
    output_dir: str | None = None
    """Default: ``runs/<name>``."""
    run: Params = {}
    """Parameters that all arms share."""
    runs: dict[str, Params] = {}
    """Arm -> its parameters, which override those of ``run``."""
    matrix: dict[str, list[Any]] = {}
    """Parameter -> its values; every combination is an arm."""
    continual: list[Stage] = []
    """Stages of every arm, in order, each in a run of its own."""
    n_repeats: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Runs of each arm that differ only in their seed."""
    seeds: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    """The seeds of the repeats. Default: 0, 1, 2, …"""
    max_concurrent_runs: Annotated[int, msgspec.Meta(ge=1)] = 1
    success_metric: SuccessMetric | None = None
    metadata: dict[str, Any] = {}
    """``hypothesis``, ``tags`` and anything else to store with the experiment."""
    callbacks: list[Any] = []
    """Callback specs, see `evsys_bus.config.build_callbacks`."""
    plugins: list[str] = []
    """Modules to import first, for the callbacks that they register."""
    redact: list[str] = []
    """Keys whose values are not recorded, in addition to those that look like credentials."""
    reveal: list[str] = []
    """Keys whose texts are recorded even if they look like credentials."""


EXTENSION_PREFIX: Final = "x-"
"""Keys with this prefix are ignored: they hold values that anchors repeat elsewhere, as in Compose files."""

SINGLE_ARM_NAME: Final = "run"
"""Name of the arm in an experiment with only one."""
_MAX_NAME_CHARS: Final = 80
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._=,+-]+")


class Arm(msgspec.Struct, frozen=True):
    """One configuration."""

    name: str
    """Key in ``runs``; for a ``matrix`` like ``lr=0.001,hidden=64``, safe as the name of a directory."""
    params: Params
    """The arm's own params and those of ``run`` that they do not override; mappings are not merged."""
    path: str
    """JSON path of what defines the arm."""
    param_paths: dict[str, str]
    """Param -> JSON path of its value."""


def expand_arms(config: ExperimentConfig) -> list[Arm]:
    """Return the arms: of ``matrix``, with the last key varying fastest; else of ``runs``, in order; else of ``run``.

    Example:
        >>> config = ExperimentConfig(name="x", recipe="m:f", run={"steps": 9}, matrix={"lr": [0.1, 0.2], "width": [8]})
        >>> [arm.name for arm in expand_arms(config)], expand_arms(config)[1].params
        (['lr=0.1,width=8', 'lr=0.2,width=8'], {'steps': 9, 'lr': 0.2, 'width': 8})
    """
    shared = {key: join_path("$.run", key) for key in config.run}
    if config.matrix:
        return list(_matrix_arms(config, shared))
    if not config.runs:
        return [Arm(SINGLE_ARM_NAME, dict(config.run), "$.run", shared)]
    return [
        Arm(name, config.run | params, path, shared | {key: join_path(path, key) for key in params})
        for name, params in config.runs.items()
        for path in [join_path("$.runs", name)]
    ]


def count_arms(config: ExperimentConfig) -> int:
    """Return the number of arms without building them."""
    return math.prod(map(len, config.matrix.values())) if config.matrix else max(1, len(config.runs))


def expand_seeds(config: ExperimentConfig) -> list[int]:
    """Return the seeds of every arm: the first ``n_repeats`` of ``seeds``, or 0, 1, 2 and so on."""
    return list(range(config.n_repeats)) if config.seeds is None else config.seeds[: config.n_repeats]


def _matrix_arms(config: ExperimentConfig, shared: dict[str, str]) -> Iterator[Arm]:
    keys = list(config.matrix)
    for combination in itertools.product(*(enumerate(values) for values in config.matrix.values())):
        params = {key: value for key, (_, value) in zip(keys, combination, strict=True)}
        param_paths = {
            key: join_path("$.matrix", key, index) for key, (index, _) in zip(keys, combination, strict=True)
        }
        yield Arm(_arm_name(params), config.run | params, "$.matrix", shared | param_paths)


def _arm_name(params: Params) -> str:
    """Name an arm by its params; unsafe characters are replaced, and then a digest keeps the name unique."""
    full_name = ",".join(
        f"{key}={value if isinstance(value, str) else as_json(value)}" for key, value in params.items()
    )
    safe = _UNSAFE.sub("_", full_name)
    if safe == full_name and len(full_name) <= _MAX_NAME_CHARS and not full_name.startswith("."):
        return full_name
    digest = hashlib.sha256(full_name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[: _MAX_NAME_CHARS - 9].lstrip('.')}-{digest}"


_CONTRACT: Final = "a recipe is called as recipe(params, run)"


class Recipe(msgspec.Struct, frozen=True):
    """A loaded recipe."""

    name: str
    """``module:function``."""
    function: Callable[..., Any]
    config: type[Any] | None
    """Class that params are converted to; None for an unchecked dict."""

    def params(self, values: Mapping[str, Any], *, path_of: Callable[[Sequence[PathPart]], str] | None = None) -> Any:
        """Validate params, and return the first argument for the recipe.

        Args:
            values: The params.
            path_of: Maps a path within the params to a JSON path, for errors. Default: below ``$.run``.

        Raises:
            UnknownParamError: A key that the recipe's Config does not have.
            WrongParamError: A value of the wrong type or out of range, or a required one that is missing.
            DocumentError: The Config's own code raised; the cause is chained.
            ConfigErrors: Several of these.
        """
        if self.config is None:
            return dict(values)
        path_of = path_of or (lambda path: join_path("$.run", *path))
        try:
            built, issues = check_config(self.config, values)
        except Exception as error:  # isolation: a Config may run its author's code, which may raise anything
            why = f"{type(error).__name__}: {error}"
            what = f'{self.config.__name__} of recipe "{self.name}" cannot be built'
            raise DocumentError(what, where=Location(path_of(())), why=why, fix="see the cause") from error
        if issues:
            context = ErrorContext(f'recipe "{self.name}"', config_schema(self.config), "")
            raise combine_errors(param_errors(context, values, issues, path_of))
        return built


def load_recipe(target: str | Callable[..., Any], *, at: str = "$.recipe") -> Recipe:
    """Load a recipe from ``module:function``, importing the module, or from a function.

    Raises:
        DocumentError: It cannot be imported, does not exist, is not a function, or does not take two arguments.
    """
    where = Location(at)
    if isinstance(target, str):
        name, function = target, _find_function(target, where)
    else:
        name, function = _function_name(target), target
    return Recipe(name, function, _config_class(name, function, where))


def import_module(name: str, where: Location, what: str) -> ModuleType:
    """Import a module that an experiment names.

    Raises:
        DocumentError: It does not exist, or its import raised; the cause is chained.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # isolation: the import of a module may raise anything
        absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        fix = (
            "check the name; install its package, or start from the folder that it is in"
            if absent
            else f'see the cause: python -c "import {name}"'
        )
        why = f"{type(error).__name__}: {error}"
        raise DocumentError(f'{what} "{name}" cannot be imported', where=where, why=why, fix=fix) from error


def _find_function(target: str, where: Location) -> Callable[..., Any]:
    module_name, colon, path = target.partition(":")
    if not (colon and module_name and path):
        what = f'a recipe is written as "module:function", not {target!r:.60}'
        raise DocumentError(what, where=where, fix="for example recipe: my_project.training:recipe")
    found: object = import_module(module_name, where, "the recipe's module")
    for part in path.split("."):
        if not hasattr(found, part):
            known = [
                key
                for key, value in vars(found).items()
                if _is_defined_in(value, module_name) and not key.startswith("_")
            ]
            hint = did_you_mean(part, known) or "it has no functions"
            raise DocumentError(f'module "{module_name}" has no recipe "{path}"', where=where, fix=hint)
        found = getattr(found, part)
    if not callable(found):
        what = f'recipe "{target}" is a {type(found).__name__}, not a function'
        raise DocumentError(what, where=where, why=_CONTRACT, fix="name a function")
    return found


def _is_defined_in(value: object, module: str) -> bool:
    """Whether a value is a function defined in this module, not imported into it."""
    return callable(value) and not isinstance(value, type) and getattr(value, "__module__", None) == module


def _function_name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _config_class(name: str, function: Callable[..., Any], where: Location) -> type[Any] | None:
    """Return the annotation of the first parameter, if params can be validated against it."""
    try:
        signature = inspect.signature(function)
        signature.bind(None, None)
    except ValueError:
        return None  # implemented in C, without a signature
    except TypeError as error:
        what = f'recipe "{name}" cannot be called with two arguments'
        raise DocumentError(what, where=where, why=str(error), fix="define it as def recipe(params, run)") from None
    annotation = next(iter(signature.parameters.values())).annotation
    if isinstance(annotation, str):
        annotation = _resolve_annotation(annotation, name, function, where)
    return annotation if isinstance(annotation, type) and is_config(annotation) else None


def _resolve_annotation(annotation: str, name: str, function: Callable[..., Any], where: Location) -> Any:
    """Resolve one annotation by itself: others may name classes that are imported only for type checkers."""
    inner: Any = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = cast("Any", inner.func)
    module = sys.modules.get(getattr(inner, "__module__", ""))
    names = getattr(inner, "__globals__", None) or (vars(module) if module else {})
    try:
        return typing.get_type_hints(SimpleNamespace(__annotations__={"params": annotation}), names)["params"]
    except Exception as error:  # isolation: evaluating an annotation runs its author's code
        what = f'the annotation "{annotation}" of recipe "{name}" cannot be resolved'
        fix = "define that class at the top level of the recipe's module, and import it there at run time"
        raise DocumentError(what, where=where, why=f"{type(error).__name__}: {error}", fix=fix) from error


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
        value: Mapping with the keys of `ExperimentConfig`. Keys that begin with ``x-`` are ignored.
        recipe: Replaces the recipe that ``value`` names, which then may be absent.
        registry: Where the kinds of callbacks are looked up.

    Raises:
        UnknownParamError: A key that an experiment, or the recipe's Config, does not have.
        WrongParamError: A value of the wrong type or out of range, or a required one that is missing.
        DocumentError: The recipe or a plugin cannot be loaded, or values contradict each other.
        ConfigError: An error of a callback, see `build_callbacks`.
        ConfigErrors: Several of these.
    """
    value = {key: part for key, part in value.items() if not str(key).startswith(EXTENSION_PREFIX)}
    value = {"recipe": ""} | value if recipe is not None else value
    _, issues = check_config(ExperimentConfig, value)
    context = ErrorContext("the experiment", config_schema(ExperimentConfig), "", noun="key")
    errors = param_errors(context, value, issues, lambda path: join_path("$", *path))

    invalid_keys = {issue.path[0] for issue in issues}
    valid = {key: part for key, part in value.items() if key not in invalid_keys}
    config, _ = check_config(ExperimentConfig, {"name": "unknown", "recipe": ""} | valid)
    for check in (_check_names, _check_arms, _check_seeds, _check_stages):
        errors += check(config)
    plugin_errors = list(_check_plugins(config))
    errors += plugin_errors
    if "n_repeats" not in value and config.seeds is not None and len(config.seeds) > 1:
        what = f"{len(config.seeds)} seeds, but n_repeats is not given, so only the first would be used"
        errors.append(DocumentError(what, where=Location("$.seeds"), fix=f"add n_repeats: {len(config.seeds)}"))
    try:
        check_callbacks(config.callbacks, registry=registry)
    except ConfigError as error:
        of_plugins = UnknownKindError if plugin_errors else ()  # which registered none of their kinds
        errors += [each for each in individual_errors(error) if not isinstance(each, of_plugins)]
    if recipe is not None or "recipe" in valid:
        causes = {each.why for each in plugin_errors}  # the recipe's module may be one of them
        errors += [each for each in _check_recipe(config, recipe or config.recipe) if each.why not in causes]
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
