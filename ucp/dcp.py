"""Storage for stock torch.distributed.checkpoint: ``dcp.load`` of any checkpoint, and ``dcp.save`` of this project's.

The classes themselves are in `ucp.torchdist.dcp_storage`; this module is their public name.
"""

from ucp.torchdist.dcp_storage import StorageReader, StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
