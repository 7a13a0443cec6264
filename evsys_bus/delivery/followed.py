"""The name that 0.1 had for `evsys_bus.delivery.subscription`."""

from evsys_bus.deprecated import former_names

__getattr__ = former_names(
    __name__,
    {"Followed": "Subscription", "Recipe": "AdapterRef", "Terms": "DeliveryPolicy"},
    home="evsys_bus.delivery.subscription",
)
