"""What tests put in the place of the outside world, and the suite for adapters of your own.

A disk that fails when told, a clock that is set, callbacks and sinks that keep what they get or fail by plan, a proxy
that breaks connections; `conformance` tries an adapter with everything that a training may hand it.
"""

from evsys_bus.testing.clock import ManualClock
from evsys_bus.testing.conformance import conformance
from evsys_bus.testing.disk import MachineStopped, SimulatedDisk
from evsys_bus.testing.failing import FailingCallback, FailingSink
from evsys_bus.testing.fault_proxy import Fault, FaultProxy, fault_proxy, unavailable
from evsys_bus.testing.recording import RecordingCallback, RecordingSink

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
