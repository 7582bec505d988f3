"""Making a checkpoint loadable that lost the files of some layers. They are filled from their neighbours (CheckFree).

The result is approximate, and marked so. It is loaded only by those who say that they want it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucp.lazy import names_of

if TYPE_CHECKING:
    from ucp.repair.refill import Outlook, RepairSettings, outlook_of
    from ucp.repair.run import RepairReport, outlook, repair

__all__ = ["repair", "RepairReport", "RepairSettings", "outlook", "outlook_of", "Outlook"]

_HOMES = {
    "repair": "ucp.repair.run",
    "RepairReport": "ucp.repair.run",
    "outlook": "ucp.repair.run",
    "RepairSettings": "ucp.repair.refill",
    "outlook_of": "ucp.repair.refill",
    "Outlook": "ucp.repair.refill",
}


if not TYPE_CHECKING:  # else any name would be there for a type checker, of any type
    __getattr__ = names_of("ucp.repair", _HOMES)
