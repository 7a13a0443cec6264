"""A program written for the README and the docs of 0.1.0 runs unchanged, and is told the new names."""

import re

import pytest

from support import TESTS
from support.pages import run_blocks, snippets

PAGES = TESTS / "fixtures/pages_of_0_1_0"


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda each: each.stem)
def test_every_snippet_of_a_page_of_0_1_0_runs_and_prints_what_it_did(tmp_path, page):
    found = list(snippets(page))
    assert found
    for category, text in run_blocks(tmp_path, found, collect_deprecations=True):
        assert category == "DeprecationWarning"
        assert re.fullmatch(r"[\w.]+ is called [\w.]+ since 0\.2", text)


def test_the_readme_of_0_1_0_is_told_the_new_names(tmp_path):
    warned = run_blocks(tmp_path, snippets(PAGES / "README.md"), collect_deprecations=True)
    assert [text.split(" since")[0] for _, text in warned] == [
        "Receipt.total is called tasks",
        "Receipt.left is called unfinished",
    ]
