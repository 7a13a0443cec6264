"""The room of the checkpoints: where their files are kept, and how they get there whole, verified and resumable.

`store` is the contract of an object store, which `folder_store` and `s3_store` keep; `ledger` remembers the uploads
under way.
"""

from evsys_adapters.checkpoints.ledger import UploadLedger
from evsys_adapters.checkpoints.store import (
    ConflictError,
    DamagedError,
    MissingError,
    ObjectStore,
    RefusedError,
    Stored,
    StoreError,
    Told,
    open_store,
)

__all__ = [
    "ConflictError",
    "DamagedError",
    "MissingError",
    "ObjectStore",
    "RefusedError",
    "StoreError",
    "Stored",
    "Told",
    "UploadLedger",
    "open_store",
]
