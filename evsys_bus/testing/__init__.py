"""What tests put in the place of the outside world: a disk that fails when told, and a clock that is set."""

from evsys_bus.testing.clock import ManualClock
from evsys_bus.testing.disk import MachineStopped, SimulatedDisk

__all__ = ["MachineStopped", "ManualClock", "SimulatedDisk"]
