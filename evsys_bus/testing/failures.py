"""Collects what an adapter under test did wrong: one sentence for each cause, however often it occurs."""

import re
from collections.abc import Callable
from typing import Final

_VARIABLE_PARTS: Final = re.compile(r"conformance-\w+|\d+")
"""What differs between errors of the same cause: temporary folders and numbers."""


class Failures:
    """Sentences, in the order in which their causes occurred first."""

    def __init__(self) -> None:
        self._sentences: dict[tuple[str, str], str] = {}  # by expectation and error
        self._tried_with: dict[tuple[str, str], list[str]] = {}

    def add(self, sentence: str) -> None:
        """Add something that is wrong."""
        self._sentences[sentence, ""] = f"- {sentence}"

    def check(self, expectation: str, call: Callable[[], object], tried_with: str = "") -> bool:
        """Call the adapter under test; return whether it raises nothing.

        Args:
            expectation: What should be true then, such as "on_eval takes".
            call: The call.
            tried_with: What it is tried with; calls that fail alike and differ only in this have the same cause.
        """
        try:
            call()
        except Exception as error:  # the adapter's
            error_text = f"{type(error).__name__}: {str(error)[:300]}"
            cause = expectation, _VARIABLE_PARTS.sub("#", error_text)
            self._sentences.setdefault(cause, f"- {f'{expectation} {tried_with}'.strip()}; it raised {error_text}")
            self._tried_with.setdefault(cause, []).append(tried_with)
            return False
        return True

    def sentences(self) -> list[str]:
        """Return all sentences as list items."""
        return [
            sentence + _repeat_suffix(self._tried_with.get(cause, [])) for cause, sentence in self._sentences.items()
        ]


def _repeat_suffix(tried_with: list[str]) -> str:
    """Return how often it occurred, and with what else than the first one."""
    if len(tried_with) < 2:  # noqa: PLR2004 # the sentence covers a single occurrence
        return ""
    others = [*dict.fromkeys(tried_with)][1:]
    also = f", also with {others[0]}" if others else ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f" ({len(tried_with)} times{also}{more})"
