"""CONTRIBUTING.md is true to the tree: its map has each package and module, and what it names exists."""

import re

import evsys_bus
from support import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_map_has_each_package_and_each_module_once():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", TEXT, re.MULTILINE)
    on_map = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    folder = ROOT / "evsys_bus"
    in_tree = {path.parent.name for path in folder.glob("*/__init__.py")} | {path.stem for path in folder.glob("*.py")}
    assert sorted(on_map) == sorted(in_tree - {"__init__"})


def test_what_it_names_exists():
    text = TEXT.replace("`", " ")
    paths = set(re.findall(r"(?:evsys_bus|adapters|tests|docs)/[\w/]+(?:\.\w+)?", text)) | {"CHANGELOG.md", ".ci/run"}
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert set(re.findall(r"\bevsys_bus\.\w+", text)) == {"evsys_bus.testing"}
    assert evsys_bus.__name__ in text


def test_the_readme_links_to_it():
    assert "(CONTRIBUTING.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
