"""Restarts on the ranks that are left, with torchrun's own elastic agent.

    torchrun --nnodes 1:4 --max-restarts 20 -m ucp.elastic train.py ...

or, in a program of one's own, ``ucp.elastic.run(main)``.
"""

from __future__ import annotations

from ucp.elastic.layouts import Fitted, fitted
from ucp.elastic.running import REFUSED, run

__all__ = ["REFUSED", "Fitted", "fitted", "run"]
