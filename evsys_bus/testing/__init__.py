"""Test doubles for the outside world, and a conformance suite for your own adapters.

A disk that fails on demand, a clock that is set by hand, callbacks and sinks that record what they get or fail by plan,
a proxy that breaks connections; `conformance` tests an adapter with everything that a training may give it.
"""

from evsys_bus.testing.conformance import conformance
from evsys_bus.testing.disk import MachineStopped, SimulatedDisk
from evsys_bus.testing.doubles import FailingCallback, FailingSink, ManualClock, RecordingCallback, RecordingSink
from evsys_bus.testing.fault_proxy import Fault, FaultProxy, fault_proxy, unavailable

__all__ = [
    "FailingCallback",
    "FailingSink",
    "Fault",
    "FaultProxy",
    "MachineStopped",
    "ManualClock",
    "RecordingCallback",
    "RecordingSink",
    "SimulatedDisk",
    "conformance",
    "fault_proxy",
    "unavailable",
]
