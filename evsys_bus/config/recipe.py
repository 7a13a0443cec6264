"""`AdapterRef`: the function that builds the parts of a run, and the validation of its params.

A recipe is called as ``recipe(params, run)``. If its first parameter is annotated with a msgspec Struct, a dataclass or
a pydantic model, params are validated against that, and the built object is passed; unknown keys are errors even if the
class allows them. Otherwise the recipe receives an unchecked dict.
"""

import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Final, cast

import msgspec

from evsys_bus.config.config_fields import is_config
from evsys_bus.config.issue_report import ErrorContext, param_errors
from evsys_bus.config.schema import config_schema
from evsys_bus.config.spec import PathPart, combine_errors, join_path
from evsys_bus.config.validate import check_config
from evsys_bus.errors import DocumentError, Location, did_you_mean

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
            "check the name; install its package, or start from the folder that it is in with PYTHONPATH=."
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
