"""Where a sweep's results are: one small contract, kept in memory, in a directory and on S3.

All truth about a sweep is in its store. See `Store` for the contract and `open_store` for the forms
that a user writes.
"""

from fimo.orchestrator.store.base import Entry, NotFound, Store, validate_key
from fimo.orchestrator.store.local import LocalStore
from fimo.orchestrator.store.memory import MemoryStore
from fimo.orchestrator.store.s3 import S3Store
from fimo.orchestrator.store.uri import open_store, split_sweep

__all__ = [
    "Entry",
    "LocalStore",
    "MemoryStore",
    "NotFound",
    "S3Store",
    "Store",
    "open_store",
    "split_sweep",
    "validate_key",
]
