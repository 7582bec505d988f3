"""A checkpoint of a model that has been changed on purpose since: as the changed model would have saved it.

What changed is declared (`ucp.spec.changes`): a vocabulary of another size, parameters that are trained now or no
longer, adapters, projections that are fused or split, layers that are stacked or listed, other names, other element
types. Declared changes turn a checkpoint's catalog into another one (`applied`), and everything else goes on as with
any checkpoint: loads into live engines, FSDP2 and state dicts, and conversions. What is not declared is refused as
before.
"""

from ucp.changes.apply import Changed, applied
from ucp.changes.outline import LiveParameter, Outline

__all__ = ["Changed", "LiveParameter", "Outline", "applied"]
