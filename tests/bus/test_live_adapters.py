"""Adapters that are given to a bus as they are: what is checked then, and what is said of what does not happen."""

import functools
from typing import ClassVar

import pytest

from evsys_bus import Callback, CallbackSpec, EventBus, Sink, build_callbacks, follow, register_callback
from evsys_bus.config import register_sink
from evsys_bus.config.registry import Registry
from evsys_bus.errors import BadSpecError, BrokenAdapterError, SinkMethodError
from evsys_bus.testing import RecordingSink


class Followed(Callback):
    placement: ClassVar = "follow"


class Halved(Callback):
    delivery: ClassVar = RecordingSink


def test_an_object_is_placed_as_its_class_says_and_no_warning_is_needed_for_it(caplog, tmp_path):
    register_callback("follows_in_a_test", replace=True)(Followed)
    register_callback("halved_in_a_test", replace=True)(Halved)
    inline, also_inline = Followed(), Followed()
    inline.placement = "inline"
    also_inline.placement = "inline"
    with EventBus([Followed(), Halved(), inline, also_inline], journal=tmp_path / "live") as bus:
        assert bus.callbacks[1:] == (inline, also_inline)
        assert bus.health().couriers == {"follows_in_a_test": "thread", "halved_in_a_test": "thread"}
    specs = [
        CallbackSpec("follows_in_a_test", placement="inline"),
        CallbackSpec("halved_in_a_test", placement="inline"),
    ]
    with EventBus(build_callbacks(specs), journal=tmp_path / "specs") as bus:
        assert [type(each) for each in bus.callbacks] == [Followed, Halved]
        assert bus.health().couriers == {"halved_in_a_test": "loop"}
    with EventBus([Halved()], sinks=[RecordingSink()], journal=tmp_path / "by hand") as bus:
        assert bus.health().couriers == {"RecordingSink": "thread"}
    assert not [each for each in caplog.records if each.levelname == "WARNING"], caplog.text


def test_a_class_below_the_callback_says_where_its_objects_work(tmp_path):
    class Beside(Halved):
        placement: ClassVar = "inline"

    class StillFollowed(Followed):
        pass

    with EventBus([Beside(), StillFollowed()], journal=tmp_path) as bus:
        assert set(bus.health().couriers.values()) == {"loop", "thread"}


def test_what_is_added_later_runs_inline_and_that_is_told(caplog):
    with EventBus() as bus:
        bus.add(Followed())
        assert "callback.runs_inline" in caplog.text


def test_a_callback_with_two_halves_is_not_followed_as_a_whole():
    with pytest.raises(BadSpecError, match="Halved.* cannot be followed as a whole") as caught:
        follow(Halved())
    assert "sinks=[RecordingSink(...)]" in caught.value.fix


# -- sinks ------------------------------------------------------------------------------------------------------------


class Good(Sink):
    async def write(self, batch): ...


class Sync(Sink):
    def write(self, batch): ...


class SyncOpen(Good):
    def open(self): ...


class NoWrite(Sink):
    async def wirte(self, batch): ...


class Wants(Sink):
    async def write(self, batch, more): ...


class MarkOnly(Good):
    def mark(self): ...


class RewindOnly(Good):
    def rewind(self, mark): ...


class AsyncMark(RewindOnly):
    async def mark(self): ...


class WithHook(Sink):
    async def write(self, batch): ...

    def on_eval(self, state, step_idx, eval_name, metrics): ...


WRONG = [
    (Sync, "Sync.write is not async"),
    (SyncOpen, "SyncOpen.open is not async"),
    (NoWrite, "NoWrite has no write"),
    (Wants, "Wants.write.* cannot be called"),
    (MarkOnly, "MarkOnly has `mark` and no `rewind`"),
    (RewindOnly, "RewindOnly has `rewind` and no `mark`"),
    (AsyncMark, "AsyncMark.mark is async"),
    (WithHook, "WithHook is a sink, and its method on_eval would never be called"),
]


@pytest.mark.parametrize(("cls", "said"), WRONG)
def test_a_sink_that_could_never_be_delivered_to_is_refused_when_it_is_added(cls, said):
    for add in (
        lambda: EventBus(sinks=[cls()]),
        lambda: EventBus([cls()]),
        lambda: follow(cls()),
        lambda: build_callbacks([cls()]),
    ):
        with pytest.raises(SinkMethodError, match=said) as caught:
            add()
        assert caught.value.fix


@pytest.mark.parametrize(("cls", "said"), WRONG)
def test_such_a_class_is_refused_when_it_is_registered(cls, said):
    with pytest.raises(BrokenAdapterError, match=said):
        register_sink("wrong_in_a_test", replace=True)(cls)
    two = type("Two", (Callback,), {"delivery": cls})
    with pytest.raises(BrokenAdapterError, match=said):
        register_callback("wrong_in_a_test", replace=True)(two)


def test_a_delivery_half_that_is_no_sink_is_refused():
    with pytest.raises(BrokenAdapterError, match="is no class derived from Sink"):
        register_callback("wrong_in_a_test", replace=True)(type("Two", (Callback,), {"delivery": dict}))


def test_a_followed_callback_with_one_of_the_two_methods_is_refused_and_an_inline_one_is_its_own_affair():
    class Marks(Callback):
        def mark(self):
            return 1

    with pytest.raises(SinkMethodError, match="Marks has `mark` and no `rewind`"):
        follow(Marks())
    registry = Registry()
    registry.register("marks")(Marks)
    with pytest.raises(BadSpecError, match="Marks has `mark` and no `rewind`"):
        build_callbacks([CallbackSpec("marks", placement="follow")], registry=registry)
    build_callbacks([CallbackSpec("marks")], registry=registry)
    EventBus([Marks()])


def test_what_may_well_return_an_awaitable_is_left_alone():
    def counted(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    class Decorated(Sink):
        @counted
        async def write(self, batch): ...

    class Says(Sink):
        def write(self, batch) -> "Awaitable[None]": ...  # noqa: F821

    class Delegates(Sink):
        def __init__(self):
            self.write = RecordingSink().write

        def __getattr__(self, name):
            return getattr(self.inner, name)

    follow(Decorated())
    follow(Says())
    follow(Good())
    register_sink("delegates_in_a_test", replace=True)(type("Inner", (Good,), {"__getattr__": Delegates.__getattr__}))
