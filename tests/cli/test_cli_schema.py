"""``evsys-bus schema``: what an editor accepts and marks is what ``check`` accepts and reports."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from evsys_bus.config import read_document
from support.programs import run_evsys_bus, run_python

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
RECIPE = """
import dataclasses
from typing import Literal
from evsys_bus import Callback, register_callback

@dataclasses.dataclass
class Params:
    steps: int
    optimizer: Literal["adam", "sgd"] = "adam"

def recipe(params: Params, run): ...

@register_callback("counter")
class Counter(Callback):
    def __init__(self, every: int = 1) -> None: ...
"""
FILE = """
name: sweep
recipe: my_recipe:recipe
x-hidden: anything
run: {steps: 10}
runs: {a: {}, b: {optimizer: sgd}}
n_repeats: 2
success_metric: {name: val/accuracy}
callbacks:
  - {kind: counter, params: {every: 5}}
  - {kind: csv_metrics, params: {out_path: "m.csv"}, placement: inline, ranks: [0, 1]}
plugins: [my_recipe]
"""


CHECK = """
import json, sys
from evsys_bus.cli import run
print("\\n" + json.dumps([run(["check", file]) for file in sys.argv[1:]]))
"""


def schema_of(*arguments, **options):
    done = run_evsys_bus("schema", *arguments, **options)
    assert done.returncode == 0, done.stderr
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_recipe.py").write_text(RECIPE)
    (tmp_path / "sweep.yaml").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_fits_the_schema(file):
    validator = schema_of(file, cwd=file.parent.parent)
    assert list(validator.iter_errors(read_document(file).value)) == []


MISTAKES = {
    "nmae: sweep": "name: sweep",
    "n_repeats: none": "n_repeats: 2",
    "mode: most": "name: val/accuracy",
    "steps: ten": "steps: 10",
    "stepz: 10": "steps: 10",
    "optimizer: rmsprop": "optimizer: sgd",
    "kind: csv_metric": "kind: csv_metrics",
    "out_paht": "out_path",
    "placement: outline": "placement: inline",
    "evry: 5": "every: 5",
    "ranks: some": "ranks: [0, 1]",
}


def test_the_schema_of_a_file_finds_what_check_finds(folder):
    validator = schema_of("sweep.yaml", cwd=folder)
    assert list(validator.iter_errors(read_document(folder / "sweep.yaml").value)) == []
    for number, (mistake, right) in enumerate(MISTAKES.items()):
        (folder / f"{number}.yaml").write_text(FILE.replace(right, mistake, 1))
        assert list(validator.iter_errors(read_document(folder / f"{number}.yaml").value)), mistake
    files = ["sweep.yaml", *(f"{number}.yaml" for number in range(len(MISTAKES)))]
    done = run_python(CHECK, *files, cwd=folder)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, *[2] * len(MISTAKES)], done.stderr


def test_without_a_file_params_of_the_recipe_are_free_and_kinds_are_those_installed(folder):
    schema = schema_of(cwd=folder).schema
    kinds = {each["const"] for each in schema["properties"]["callbacks"]["items"]["properties"]["kind"]["oneOf"]}
    listed = run_evsys_bus("adapters", "--json", cwd=folder).stdout.splitlines()
    assert kinds == {json.loads(each)["kind"] for each in listed}
    assert schema["properties"]["run"]["type"] == "object"
    assert "properties" not in schema["properties"]["run"]
    assert re.search("Writes the metrics of every step to a CSV file", json.dumps(schema))
    assert "Default: the kind, numbered" in json.dumps(schema), "fields have their docstrings"
