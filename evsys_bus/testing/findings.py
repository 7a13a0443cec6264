"""Collects what an adapter under test did wrong: one sentence for each cause, however often it occurs."""

import re
from collections.abc import Callable
from typing import Final

_OF_THE_MOMENT: Final = re.compile(r"conformance-\w+|\d+")
"""What differs between errors of the same cause: temporary folders and numbers."""


class Findings:
    """Sentences, in the order in which their causes occurred first."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], str] = {}  # by expectation and error
        self._taken: dict[tuple[str, str], list[str]] = {}

    def note(self, sentence: str) -> None:
        """Add something that is wrong."""
        self._said[sentence, ""] = f"- {sentence}"

    def met(self, expectation: str, call: Callable[[], object], taken: str = "") -> bool:
        """Call the adapter under test; return whether it raises nothing.

        Args:
            expectation: What should be true then, such as "on_eval takes".
            call: The call.
            taken: What it is tried with; calls that fail alike and differ only in this have the same cause.
        """
        try:
            call()
        except Exception as error:  # the adapter's
            said = f"{type(error).__name__}: {str(error)[:300]}"
            cause = expectation, _OF_THE_MOMENT.sub("#", said)
            self._said.setdefault(cause, f"- {f'{expectation} {taken}'.strip()}; it raised {said}")
            self._taken.setdefault(cause, []).append(taken)
            return False
        return True

    def sentences(self) -> list[str]:
        """Return all sentences as list items."""
        return [said + _often(self._taken.get(cause, [])) for cause, said in self._said.items()]


def _often(taken: list[str]) -> str:
    """Return how often it occurred, and with what else than the first one."""
    if len(taken) < 2:  # noqa: PLR2004 # the sentence covers a single occurrence
        return ""
    others = [*dict.fromkeys(taken)][1:]
    also = f", also with {others[0]}" if others else ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f" ({len(taken)} times{also}{more})"
