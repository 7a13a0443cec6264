"""Who is inside a publish, read off the stacks: so the fast path has no mark to set, and none to forget.

The frame of compiled code (`compile`) says which hook by its line; the two functions of the publisher that wait for the
token and that hold it are known by their code.
"""

import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType

from evsys_bus.bus.account import HookAccount
from evsys_bus.bus.compile import Unit


class StackReader:
    """Reads stacks for one publisher."""

    def __init__(
        self, publisher: object, units: Mapping[str, Unit], prefix: str, *, waits: CodeType, holds: CodeType
    ) -> None:
        self._publisher = publisher
        self._prefix = prefix  # units that are gone count too: a `publish` of theirs holds the token until it returns
        self._units = units  # by the filename of their code
        self._waits = waits
        self._holds = holds

    def holder(self, frame: FrameType | None) -> FrameType | None:
        """The innermost frame, from this one outward, that holds the token; a publish that waits for it holds none."""
        waiting = False
        while frame is not None:
            code = frame.f_code
            if code is self._waits and frame.f_locals["self"] is self._publisher:
                waiting = True
            elif code.co_filename.startswith(self._prefix):
                if not waiting:
                    return frame
                waiting = False
            elif code is self._holds and frame.f_locals["self"] is self._publisher:
                return frame
            frame = frame.f_back
        return None

    def hook_at(self, holder: FrameType | None) -> HookAccount | None:
        """The hook that the frame is calling, if it is calling one."""
        unit = None if holder is None else self._units.get(holder.f_code.co_filename)
        return None if unit is None or holder is None else unit.lines.get(holder.f_lineno)

    def holders(self) -> Iterator[tuple[FrameType, FrameType]]:
        """Of every thread that holds the token (one, or none): its innermost frame, and the one that holds."""
        for frame in sys._current_frames().values():  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # documented
            holder = self.holder(frame)
            if holder is not None:
                yield frame, holder
