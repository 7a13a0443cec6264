"""What `evsys_logger` is made of: ids, the client of EvSys' gateway, what operations say, and the delivery half."""
