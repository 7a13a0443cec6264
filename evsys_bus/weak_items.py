"""`WeakItems`: objects that are not kept alive, without Python code that runs when one of them dies.

`weakref.WeakSet` has such code. When a garbage collection runs it while a Ctrl-C is pending, Python raises the
KeyboardInterrupt in there, prints it as ignored, and the program goes on.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar
from weakref import ref

T = TypeVar("T")


class WeakItems(Generic[T]):
    """A set of objects, compared by identity. May be used from several threads."""

    def __init__(self) -> None:
        self._refs: dict[int, ref[T]] = {}

    def add(self, item: T) -> None:
        """Add an object, and forget those that have died."""
        for key, each in [*self._refs.items()]:
            if each() is None:
                self._refs.pop(key, None)
        self._refs[id(item)] = ref(item)

    def discard(self, item: T) -> None:
        """Remove an object, if it is there."""
        self._refs.pop(id(item), None)

    def __iter__(self) -> Iterator[T]:
        return iter([item for each in [*self._refs.values()] if (item := each()) is not None])

    def __bool__(self) -> bool:
        return any(True for _ in self)
