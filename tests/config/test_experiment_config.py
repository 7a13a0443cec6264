"""`load_experiment`: an experiment file as a whole, every error in one pass, each with its line, in full text."""

import dataclasses
import functools
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evsys_bus.callback import Callback
from evsys_bus.config import (
    ExperimentConfig,
    Registry,
    SuccessMetric,
    expand_arms,
    expand_seeds,
    load_experiment,
    load_recipe,
    read_document,
    read_experiment,
    with_overrides,
)
from evsys_bus.errors import ConfigError, ConfigErrors, DocumentError, UnknownParamError, WrongParamError

RECIPES = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated
import msgspec
if TYPE_CHECKING:
    from nowhere import RunPlan

class Net(msgspec.Struct):
    lr: float = 0.1
    hidden: Annotated[int, msgspec.Meta(ge=1)] = 16

def train(params: Net, run: RunPlan):
    return params, run

def free(params, run):
    return params, run

def alone(params: Net): ...

number = 3
"""


class Shout(Callback):
    class Config(msgspec.Struct):
        every: int = 1

    built: ClassVar[int] = 0

    def __init__(self, every: int = 1) -> None:
        type(self).built += 1


@pytest.fixture
def recipes(tmp_path: Path) -> Iterator[Path]:
    """A folder with the module ``my_recipes`` in it, on the path."""
    (tmp_path / "my_recipes.py").write_text(RECIPES)
    (tmp_path / "my_broken.py").write_text("import sys\nsys.exit(3)\n")
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in ("my_recipes", "my_broken"):
        sys.modules.pop(name, None)


@pytest.fixture
def registry() -> Registry:
    made = Registry(entry_points=lambda: ())
    made.register("shout")(Shout)
    return made


def load(folder: Path, registry: Registry, text: str, *sets: str) -> ExperimentConfig:
    file = folder / "sweep.yaml"
    file.write_text(textwrap.dedent(text).lstrip())
    return load_experiment(with_overrides(read_document(file), sets), registry=registry)


def refused(folder: Path, registry: Registry, text: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, registry, text, *sets)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_right_one(recipes, registry):
    config = load(
        recipes,
        registry,
        """
        name: sweep
        recipe: my_recipes:train
        run: {lr: 1e-3}
        runs:
          baseline: {}
          wide: {hidden: 64}
        n_repeats: 2
        success_metric: {name: val/acc}
        callbacks:
          - {kind: shout, params: {every: 2}}
        """,
        "runs.wide.hidden=128",
    )
    assert config.success_metric == SuccessMetric("val/acc", "max")
    assert [(arm.name, arm.params) for arm in expand_arms(config)] == [
        ("baseline", {"lr": 0.001}),
        ("wide", {"lr": 0.001, "hidden": 128}),
    ]
    assert expand_seeds(config) == [0, 1]
    assert Shout.built == 0, "checking constructs nothing"


def test_every_error_in_one_pass_in_the_order_of_the_file(recipes, registry):
    assert refused(
        recipes,
        registry,
        """
        name: sweep
        recipe: my_recipes:train
        runz: {}
        run:
          lr: fast
        runs:
          wide:
            hiden: 64
        success_metric: {name: val/acc, mode: maxx}
        callbacks:
          - kind: shuot
        """,
        "n_repeats=0",
    ) == (
        'error[EB103]: "n_repeats" of the experiment must be an integer >= 1, not 0\n'
        " --> --set n_repeats=0   $.n_repeats\n"
        "why: Expected `int` >= 1\n"
        "fix: for example n_repeats: 1\n"
        "\n"
        'error[EB102]: the experiment has no key "runz"\n'
        " --> sweep.yaml:3:1   $.runz\n  |\n3 | runz: {}\n  | ^^^^\n"
        'fix: did you mean "run"?   (a mapping; for example run: {})\n'
        "\n"
        'error[EB103]: "lr" of recipe "my_recipes:train" must be a number, not "fast"\n'
        " --> sweep.yaml:5:7   $.run.lr\n  |\n5 |   lr: fast\n  |       ^^^^\n"
        "why: Expected `float`, got `str`\n"
        "fix: for example lr: 0.1\n"
        "\n"
        'error[EB102]: recipe "my_recipes:train" has no param "hiden"\n'
        " --> sweep.yaml:8:5   $.runs.wide.hiden\n  |\n8 |     hiden: 64\n  |     ^^^^^\n"
        'fix: did you mean "hidden"?   (an integer >= 1; for example hidden: 16)\n'
        "\n"
        'error[EB103]: "success_metric.mode" of the experiment must be one of "max", "min", not "maxx"\n'
        " --> sweep.yaml:9:39   $.success_metric.mode\n  |\n"
        "9 | success_metric: {name: val/acc, mode: maxx}\n"
        "  |                                       ^^^^\n"
        "why: Invalid enum value 'maxx'\n"
        'fix: did you mean "max"?   for example mode: "max"\n'
        "\n"
        'error[EB101]: unknown callback kind "shuot"\n'
        " --> sweep.yaml:11:11   $.callbacks[0].kind\n   |\n11 |   - kind: shuot\n   |           ^^^^^\n"
        'fix: did you mean "shout"?   all kinds: evsys-bus adapters'
    )


HEAD = "name: sweep\nrecipe: my_recipes:train\n"

WRONG = {
    "runs_and_matrix": (
        HEAD + "runs: {a: {}}\nmatrix: {lr: [1.0]}\n",
        (
            "error[EB107]: an experiment has either runs or a matrix, and this one has both\n"
            " --> sweep.yaml:4:1   $.matrix\n  |\n4 | matrix: {lr: [1.0]}\n  | ^^^^^^\n"
            "fix: remove one; a matrix makes an arm of every combination of its values"
        ),
    ),
    "an_empty_list_in_the_matrix": (
        HEAD + "matrix: {lr: []}\n",
        (
            'error[EB107]: "lr" of the matrix has no values\n'
            " --> sweep.yaml:3:10   $.matrix.lr\n  |\n3 | matrix: {lr: []}\n  |          ^^\n"
            "fix: give it at least one value, or remove it: lr: [1, 2]"
        ),
    ),
    "a_wrong_value_in_the_matrix": (
        HEAD + "matrix: {lr: [0.1, 0.2, x], hidden: [1, 2]}\n",
        (
            'error[EB103]: "lr" of recipe "my_recipes:train" must be a number, not "x"\n'
            " --> sweep.yaml:3:25   $.matrix.lr[2]\n  |\n"
            "3 | matrix: {lr: [0.1, 0.2, x], hidden: [1, 2]}\n"
            "  |                         ^\n"
            "why: Expected `float`, got `str`\n"
            "fix: for example lr: 0.1"
        ),
    ),
    "a_value_twice_in_the_matrix": (
        HEAD + "matrix: {lr: [0.1, 0.2], hidden: [1, 2, 1]}\n",
        (
            'error[EB107]: two arms are called "lr=0.1,hidden=1"\n'
            " --> sweep.yaml:3:41   $.matrix.hidden[2]\n  |\n"
            "3 | matrix: {lr: [0.1, 0.2], hidden: [1, 2, 1]}\n"
            "  |                                         ^\n"
            "fix: remove the duplicate value"
        ),
    ),
    "a_matrix_that_explodes": (
        HEAD + "matrix: {a: &v [1,2,3,4,5,6,7,8,9,0], b: *v, c: *v, d: *v, e: *v, f: *v, g: *v}\n",
        (
            "error[EB107]: 10,000,000 runs in one experiment; at most 10,000\n"
            " --> sweep.yaml:3:1   $.matrix\n  |\n"
            "3 | matrix: {a: &v [1,2,3,4,5,6,7,8,9,0], b: *v, c: *v, d: *v, e: *v, f: *v, g: *v}\n"
            "  | ^^^^^^\n"
            "why: 10,000,000 arms, 1 repeats, 1 stages\n"
            "fix: split it into several experiments"
        ),
    ),
    "too_few_seeds": (
        HEAD + "n_repeats: 3\nseeds: [1, 2]\n",
        (
            "error[EB107]: n_repeats is 3, but there are 2 seeds\n"
            " --> sweep.yaml:4:1   $.seeds\n  |\n4 | seeds: [1, 2]\n  | ^^^^^\n"
            "fix: give a seed for every repeat, or leave seeds out"
        ),
    ),
    "seeds_that_would_not_be_used": (
        HEAD + "seeds: [1, 2]\n",
        (
            "error[EB107]: 2 seeds, but n_repeats is not given, so only the first would be used\n"
            " --> sweep.yaml:3:1   $.seeds\n  |\n3 | seeds: [1, 2]\n  | ^^^^^\n"
            "fix: add n_repeats: 2"
        ),
    ),
    "a_seed_twice": (
        HEAD + "n_repeats: 2\nseeds: [1, 2, 1]\n",
        (
            "error[EB107]: seed 1 is there twice\n"
            " --> sweep.yaml:4:15   $.seeds[2]\n  |\n4 | seeds: [1, 2, 1]\n  |               ^\n"
            "why: two runs of an arm would be the same run\n"
            "fix: choose another"
        ),
    ),
    "two_stages_of_one_name": (
        HEAD + "continual:\n  - name: a\n  - name: a\n",
        (
            'error[EB107]: two stages are called "a"\n'
            " --> sweep.yaml:5:11   $.continual[1].name\n  |\n5 |   - name: a\n  |           ^\n"
            "fix: rename one of them"
        ),
    ),
    "a_wrong_param_of_a_stage": (
        HEAD + "continual:\n  - name: a\n    params: {lrr: 1}\n",
        (
            'error[EB102]: recipe "my_recipes:train" has no param "lrr"\n'
            " --> sweep.yaml:5:14   $.continual[0].params.lrr\n  |\n5 |     params: {lrr: 1}\n  |              ^^^\n"
            'fix: did you mean "lr"?   (a number; for example lr: 0.1)'
        ),
    ),
    "a_name_that_is_no_folder": (
        "name: ../up\nrecipe: my_recipes:train\n",
        (
            "error[EB107]: '../up' is no name for an experiment\n"
            " --> sweep.yaml:1:7   $.name\n  |\n1 | name: ../up\n  |       ^^^^^\n"
            "why: it names the folder that results go to\n"
            "fix: use letters, digits, - and _: name: lr-sweep"
        ),
    ),
    "no_recipe": (
        "name: sweep\n",
        (
            'error[EB103]: the experiment needs "recipe": a string\n'
            " --> sweep.yaml:1:1   $\n  |\n1 | name: sweep\n  | ^^^^\n"
            'fix: add recipe: "..."'
        ),
    ),
    "a_recipe_without_a_colon": (
        "name: sweep\nrecipe: my_recipes.train\n",
        (
            "error[EB107]: a recipe is written as \"module:function\", not 'my_recipes.train'\n"
            " --> sweep.yaml:2:9   $.recipe\n  |\n2 | recipe: my_recipes.train\n  |         ^^^^^^^^^^^^^^^^\n"
            "fix: for example recipe: my_project.training:recipe"
        ),
    ),
    "a_misspelt_recipe": (
        "name: sweep\nrecipe: my_recipes:trian\n",
        (
            'error[EB107]: module "my_recipes" has no recipe "trian"\n'
            " --> sweep.yaml:2:9   $.recipe\n  |\n2 | recipe: my_recipes:trian\n  |         ^^^^^^^^^^^^^^^^\n"
            'fix: did you mean "train"?'
        ),
    ),
    "a_recipe_in_a_module_that_is_not_there": (
        "name: sweep\nrecipe: my_recipez:train\n",
        (
            'error[EB107]: the recipe\'s module "my_recipez" cannot be imported\n'
            " --> sweep.yaml:2:9   $.recipe\n  |\n2 | recipe: my_recipez:train\n  |         ^^^^^^^^^^^^^^^^\n"
            "why: ModuleNotFoundError: No module named 'my_recipez'\n"
            "fix: check the name; install its package, or start from the folder that it is in"
        ),
    ),
    "a_recipe_that_is_no_function": (
        "name: sweep\nrecipe: my_recipes:number\n",
        (
            'error[EB107]: recipe "my_recipes:number" is a int, not a function\n'
            " --> sweep.yaml:2:9   $.recipe\n  |\n2 | recipe: my_recipes:number\n  |         ^^^^^^^^^^^^^^^^^\n"
            "why: a recipe is called as recipe(params, run)\n"
            "fix: name a function"
        ),
    ),
    "a_recipe_with_one_argument": (
        "name: sweep\nrecipe: my_recipes:alone\n",
        (
            'error[EB107]: recipe "my_recipes:alone" cannot be called with two arguments\n'
            " --> sweep.yaml:2:9   $.recipe\n  |\n2 | recipe: my_recipes:alone\n  |         ^^^^^^^^^^^^^^^^\n"
            "why: too many positional arguments\n"
            "fix: define it as def recipe(params, run)"
        ),
    ),
    "a_plugin_that_ends_the_program": (
        HEAD + "plugins: [my_broken]\n",
        (
            'error[EB107]: plugin "my_broken" cannot be imported\n'
            " --> sweep.yaml:3:11   $.plugins[0]\n  |\n3 | plugins: [my_broken]\n  |           ^^^^^^^^^\n"
            "why: SystemExit: 3\n"
            'fix: see the cause: python -c "import my_broken"'
        ),
    ),
    "a_misspelt_param_of_a_callback": (
        HEAD + "callbacks:\n  - kind: shout\n    params:\n      evry: 2\n",
        (
            'error[EB102]: callback "shout" has no param "evry"\n'
            " --> sweep.yaml:6:7   $.callbacks[0].params.evry\n  |\n6 |       evry: 2\n  |       ^^^^\n"
            'fix: did you mean "every"?   (an integer; for example every: 1)   all params: evsys-bus adapters shout'
        ),
    ),
    "a_param_beside_the_kind": (
        HEAD + "callbacks:\n  - kind: shout\n    every: 2\n",
        (
            'error[EB104]: a callback spec has no key "every"\n'
            " --> sweep.yaml:5:5   $.callbacks[0].every\n  |\n5 |     every: 2\n  |     ^^^^^\n"
            "fix: known: kind, max_staleness_seconds, name, on_failure, params, placement, ranks, required, "
            "stop_after_seconds   the callback's own parameters go under params: {every: ...}"
        ),
    ),
    "an_arm_of_nothing": (
        HEAD + "runs:\n  baseline:\n  wide: {hidden: 2}\n",
        (
            'error[EB103]: "runs.baseline" of the experiment must be a mapping, not null\n'
            " --> sweep.yaml:4:3   $.runs.baseline\n  |\n4 |   baseline:\n  |   ^^^^^^^^\n"
            "why: Expected `object`, got `null`\n"
            "fix: for example baseline: {}"
        ),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_its_line(recipes, registry, case):
    text, error = WRONG[case]
    assert refused(recipes, registry, text) == error


def test_an_arms_error_from_the_command_line_says_so(recipes, registry):
    assert refused(recipes, registry, HEAD + "run: {lr: 1.0}\n", "run.lrr=3") == (
        'error[EB102]: recipe "my_recipes:train" has no param "lrr"\n'
        " --> --set run.lrr=3   $.run.lrr\n"
        'fix: did you mean "lr"?   (a number; for example lr: 0.1)'
    )


def test_an_error_that_all_arms_share_is_told_once(recipes, registry):
    text = HEAD + "run: {lr: x}\nruns: {a: {}, b: {}, c: {lr: 1}}\nn_repeats: 3\n"
    assert refused(recipes, registry, text).count("error[") == 1


def test_a_recipe_without_a_config_takes_any_params(recipes, registry):
    config = load(recipes, registry, "name: x\nrecipe: my_recipes:free\nrun: {a: {b: 1}}\n")
    assert load_recipe(config.recipe).params(config.run) == {"a": {"b": 1}}


def test_a_python_recipe_takes_the_place_of_the_named_one(registry):
    def recipe(params: Mapping[str, Any], run: object) -> None: ...

    assert read_experiment({"name": "x"}, recipe=recipe, registry=registry).recipe == ""
    with pytest.raises(ConfigErrors) as caught:
        read_experiment({"name": "x", "seeds": [-1, -2]}, registry=registry)
    assert [str(error.where) for error in caught.value.errors] == [" --> $", " --> $.seeds[0]", " --> $.seeds[1]"]


class StructNet(msgspec.Struct):
    lr: float
    hidden: Annotated[int, msgspec.Meta(ge=1)] = 1


@dataclasses.dataclass
class DataNet:
    lr: float
    hidden: Annotated[int, msgspec.Meta(ge=1)] = 1


class ModelNet(pydantic.BaseModel, extra="allow"):
    lr: float
    hidden: int = pydantic.Field(1, ge=1)


@pytest.mark.parametrize("config", [StructNet, DataNet, ModelNet])
def test_params_are_built_and_unknown_ones_refused_whatever_the_config_says(config):
    def recipe(params, run): ...

    recipe.__annotations__["params"] = config
    loaded = load_recipe(recipe)
    built = loaded.params({"lr": 1})
    assert isinstance(built, config)
    assert (built.lr, built.hidden) == (1.0, 1)
    with pytest.raises(UnknownParamError):
        loaded.params({"lr": 1, "hiden": 2})
    with pytest.raises(WrongParamError):
        loaded.params({})
    with pytest.raises(ConfigErrors):
        loaded.params({"lr": "1", "hidden": 0})


class Picky(msgspec.Struct):
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")
        if self.low < 0:
            raise RuntimeError("on fire")


def test_params_that_do_not_fit_together():
    def recipe(params: Picky, run: object) -> None: ...

    with pytest.raises(WrongParamError) as caught:
        load_recipe(recipe).params({"low": 2})
    assert caught.value.why == "low is above high"
    with pytest.raises(DocumentError) as burnt:
        load_recipe(recipe).params({"low": -2})
    assert isinstance(burnt.value.__cause__, RuntimeError)


class Callable2:
    def __call__(self, params: "Picky", run: object) -> None: ...


def partly(extra: int, params: "Picky", run: object) -> None: ...


@pytest.mark.parametrize("recipe", [Callable2(), functools.partial(partly, 1), Callable2().__call__])
def test_whatever_is_callable_may_be_a_recipe(recipe):
    assert load_recipe(recipe).config is Picky


def test_an_annotation_that_cannot_be_resolved_is_an_error():
    def recipe(params: "Nowhere", run: object) -> None: ...  # noqa: F821 # that is the point

    with pytest.raises(DocumentError, match="Nowhere"):
        load_recipe(recipe)


def config(**keys: Any) -> ExperimentConfig:
    return ExperimentConfig(name="x", recipe="m:f", **keys)


def test_one_arm_is_run_alone():
    assert [(arm.name, arm.params) for arm in expand_arms(config(run={"lr": 1}))] == [("run", {"lr": 1})]


def test_a_matrix_makes_every_combination_and_says_where_each_value_stands():
    arms = expand_arms(config(run={"lr": 9, "w": 1}, matrix={"lr": [1e-3, 2], "act": ["relu", None]}))
    assert [arm.name for arm in arms] == [
        "lr=0.001,act=relu",
        "lr=0.001,act=null",
        "lr=2,act=relu",
        "lr=2,act=null",
    ]
    assert arms[1].params == {"lr": 0.001, "w": 1, "act": None}
    assert arms[1].param_paths == {"lr": "$.matrix.lr[0]", "w": "$.run.w", "act": "$.matrix.act[1]"}


def test_hostile_values_of_a_matrix_make_names_that_are_folders_and_differ():
    values = ["../../etc", "a/b", "a b", "a\0b", "x" * 500, "x" * 501, {"k": [1]}, "", ".", "é", "\ud800"]
    names = [arm.name for arm in expand_arms(config(matrix={"v": values}))]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= 80
        assert name.isascii()
        assert name.isprintable()
        assert not set(name) & set("/\\\0 :*?\"'")
        assert not name.startswith(".")


def test_seeds():
    assert expand_seeds(config(n_repeats=3)) == [0, 1, 2]
    assert expand_seeds(config(n_repeats=2, seeds=[7, 5, 3])) == [7, 5]


KEYS = st.sampled_from([*ExperimentConfig.__struct_fields__, "runz", "kind", "params", "mode"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "a", "a:b", "json:dumps", "max"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_mapping_is_an_experiment_or_a_config_error(value):
    try:
        read = read_experiment(value)
    except ConfigError as error:
        text = str(error)
        assert text.startswith("error[")
    else:
        assert expand_arms(read)
        assert expand_seeds(read)


def test_keys_that_begin_with_x_hold_values_for_anchors(tmp_path):
    file = tmp_path / "sweep.yaml"
    runs = "runs:\n  a: *wide\n  b: {<<: *wide, lr: 1}\n"
    file.write_text("name: s\nrecipe: shutil:move\nx-wide: &wide {width: 512}\nx-unused: [1]\n" + runs)
    config = load_experiment(read_document(file))
    assert config.runs == {"a": {"width": 512}, "b": {"width": 512, "lr": 1}}
