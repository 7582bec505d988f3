"""Storage for stock torch.distributed.checkpoint: any checkpoint under ``dcp.load``, this project's under ``dcp.save``.

The classes themselves are in `ucp.torchdist.dcp_storage`; this module is their public name.
"""

from ucp.torchdist.dcp_storage import StorageReader, StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
