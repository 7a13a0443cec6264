"""Parts of `evsys_logger`: IDs, the gateway client, arguments of operations, and the delivery half."""
