"""Checkpoint storage: uploads, verification, pruning and resuming.

`store` defines the interface of object stores, implemented by `folder_store` and `s3_store`, and the ledger of uploads
in progress.
"""

from evsys_adapters.checkpoints.store import (
    ConflictError,
    DamagedError,
    MissingError,
    ObjectStore,
    ProgressCallback,
    RefusedError,
    Stored,
    StoreError,
    UploadLedger,
)
from evsys_adapters.checkpoints.store_urls import open_store

__all__ = [
    "ConflictError",
    "DamagedError",
    "MissingError",
    "ObjectStore",
    "ProgressCallback",
    "RefusedError",
    "StoreError",
    "Stored",
    "UploadLedger",
    "open_store",
]
