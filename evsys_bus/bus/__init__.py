"""The bus: publish, spawn, drain, health."""

from evsys_bus.bus.event_bus import EventBus
from evsys_bus.bus.health import Health, HookHealth
from evsys_bus.tasks import Receipt, TaskCounts

__all__ = ["EventBus", "Health", "HookHealth", "Receipt", "TaskCounts"]
