"""Nothing of a bus runs Python code when it dies: a Ctrl-C that is pending in a garbage collection would be lost."""

from evsys_bus.weak_items import WeakItems
from support.programs import run_python

PROGRAM = """
import gc, sys, weakref
from evsys_bus import Callback, EventBus, StepEnd
class Counts(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        pass
with EventBus([Counts()], journal=sys.argv[1]) as bus:
    bus.publish(StepEnd(None, 1))
    bus.add(Counts())
    bus.publish(StepEnd(None, 2))
    for each in gc.get_objects():
        if str(type(each).__module__).startswith("evsys_bus"):
            for reference in weakref.getweakrefs(each):
                if reference.__callback__ is not None:
                    print(type(each).__name__)
"""


def test_no_object_of_a_bus_has_a_weak_reference_with_code_behind_it(tmp_path):
    found = set(run_python(PROGRAM, tmp_path).stdout.split())
    assert found <= {"JournalWriter"}  # one that was never closed; its thread must not go on


def test_weak_items_forget_what_has_died():
    class Thing:
        pass

    items, first, second = WeakItems[Thing](), Thing(), Thing()
    items.add(first)
    items.add(second)
    items.add(second)
    assert [*items] == [first, second]
    del first
    assert [*items] == [second]
    items.discard(second)
    assert not items
