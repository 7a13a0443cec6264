"""What an adapter under test did not live up to: one sentence for each cause, however often it shows."""

import re
from collections.abc import Callable
from typing import Final

_OF_THE_MOMENT: Final = re.compile(r"conformance-\w+|\d+")
"""What differs between two errors of one cause: the folder of a trial, and numbers."""


class Findings:
    """Sentences, in the order in which their causes were met first."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], str] = {}  # by the expectation and what came of it
        self._taken: dict[tuple[str, str], list[str]] = {}

    def note(self, sentence: str) -> None:
        """Something is not as it should be."""
        self._said[sentence, ""] = f"- {sentence}"

    def met(self, expectation: str, call: Callable[[], object], taken: str = "") -> bool:
        """Whether the call, of the adapter under test, raises nothing.

        Args:
            expectation: What should be true then, as "on_eval takes".
            call: The call.
            taken: What it is tried with; calls that differ in this alone, and fail alike, are one cause.
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
        """All of them, each as an item of a list."""
        return [said + _often(self._taken.get(cause, [])) for cause, said in self._said.items()]


def _often(taken: list[str]) -> str:
    """How often, and with what else, beside the first one."""
    if len(taken) < 2:  # noqa: PLR2004 # once is said by the sentence
        return ""
    others = [*dict.fromkeys(taken)][1:]
    also = f", also with {others[0]}" if others else ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f" ({len(taken)} times{also}{more})"
