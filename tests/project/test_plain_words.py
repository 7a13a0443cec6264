"""Identifiers and first lines of docstrings use the words of asyncio, NATS, OpenTelemetry and SQLite."""

import ast
import re
from pathlib import Path

from support.sources import source_trees

REPLACED = {  # a word of the former dialect -> what to write instead
    "tell tells told telling": "report, print, log, notify",
    "say says said saying unsaid": "describe, report, omitted",
    "hear hears heard unheard": "receive, read, annotations",
    "learnt learned": "read, annotate",
    "stand stands stood standing": "exist, position, state",
    "begun": "started, written",
    "whoever somebody nobody": "caller, owner, any, none",
    "office crew crews roster books strays stray": "manager, pool, subscriptions, store, unknown keys",
    "enlist enlists enlisted strike": "register, deregister",
    "news tidings": "log, updates",
    "scrimp scrimped disown disowned": "truncate, release",
    "amiss untidy tidy tidied aside": "damaged, unordered, clean_up, quarantine",
    "owe owes": "pending, unconfirmed",
    "kin mend mended": "related, repair",
    "wishes verdict verdicts": "options, result",
    "stuff": "the name of what it is",
    "wanted wants": "requested, expected",
    "trouble troubles": "error, problem",
    "fares fare": "status",
}
WORDS = {word: instead for words, instead in REPLACED.items() for word in words.split()}

ALLOWED = {"tell", "set_aside", "wants", "trouble"}
"""Method of Python's files, a public parameter and a field of configs, and an attribute's name in 0.1."""


def words_of(identifier):
    return [each.lower() for each in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def identifiers(tree):
    """Every name that the module defines, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def first_lines(tree):
    """The first line of every docstring, without what is quoted in it, with its line number."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text:
                yield re.sub(r"`+[^`]*`+|\"[^\"]*\"", "", text.splitlines()[0]), node.body[0].lineno


def odd_words(name, tree):
    odd = [
        f"{name}:{line} {identifier}: write {WORDS[word]}"
        for identifier, line in identifiers(tree)
        if identifier not in ALLOWED
        for word in words_of(identifier)
        if word in WORDS
    ]
    return odd + [
        f"{name}:{line} {text!r}: write {WORDS[word]}"
        for text, line in first_lines(tree)
        for word in re.findall(r"[a-z]+", text.lower())
        if word in WORDS
    ]


def test_a_name_and_a_docstring_use_plain_words():
    assert [odd for name, tree in source_trees().items() for odd in odd_words(name, tree)] == []


def test_a_module_is_named_in_plain_words():
    assert [name for name in source_trees() if set(words_of(Path(name).stem)) & set(WORDS)] == []
