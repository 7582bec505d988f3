"""Snapshots in memory of a torch.distributed program (FSDP2, DDP, one process).

memory = MemorySnapshots("runs/llama")
report = memory.load_training(model=model, optimizer=optimizer)      # from memory, or else from the folder
...
loss.backward()
memory.hold()                                                         # before the optimizer's step
optimizer.step()
memory.snapshot(step, model=model, optimizer=optimizer)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ucp.errors import BadArgument
from ucp.job import ranks
from ucp.memory import recovery
from ucp.memory.options import Options
from ucp.memory.tier import Tier
from ucp.run_folder import LATEST, is_checkpoint
from ucp.saving.save import SaveReport
from ucp.storage import locations
from ucp.storage.dtypes import itemsize
from ucp.storage.locations import locate
from ucp.torchdist.training import TrainingParts, TrainingReport, load_training, training_source


class MemorySnapshots:
    """The snapshots of one run.

    Parameters
    ----------
    folder
        The folder that the run saves to and loads from. The run is named after it.
    done
        Called, in the background, with the report of every finished snapshot.
    options
        Fields of `ucp.memory.options.Options`, without those that say when. Sizes may be text, such as "16GiB".

    Raises
    ------
    BadArgument
        For options that there are not, or that cannot be so.
    """

    def __init__(
        self, folder: str | os.PathLike[str], done: Callable[[SaveReport], None] | None = None, **options: Any
    ) -> None:
        self._folder = folder
        theirs = [key for key in ("every", "persist_every") if key in options]
        if theirs:
            raise BadArgument(
                f"MemorySnapshots has no '{theirs[0]}': the program calls snapshot and save_training itself"
            )
        self.tier = Tier(Options.said(**options), done)

    def snapshot(self, step: int, **state: Any) -> bool:
        """Have the keepers take the state as it is now. Collective.

        The state is copied during forward and backward, so call `hold` before the next update. If something goes wrong
        with the keepers, it is a warning.

        Parameters
        ----------
        step
            How many steps the run has taken.
        state
            What `save_training` takes: model, optimizer, lr_scheduler, dataloader, samples, rng and extra.

        Returns
        -------
        bool
            Whether a snapshot was begun. It is not if keepers fail, or if the policy skips it.
        """
        if not self.tier.is_due():
            return False
        source = training_source(TrainingParts(step=step, **state), late=True)
        held = sum(int(h.blocks.counts.sum()) * itemsize(h.dtype) // len(h.holders) for h in source.holdings)
        self.tier.attach(self._folder, held)
        return self.tier.snapshot(source, f"step{step}")

    def load_training(self, **state: Any) -> TrainingReport | None:
        """As `ucp.load_training`, but from memory, unless the folder has something newer. Collective.

        Parameters
        ----------
        state
            What `ucp.load_training` takes besides the path.

        Returns
        -------
        TrainingReport or None
            None if neither the memory nor the folder has anything.
        """
        self.tier.attach(self._folder, 0)
        place, tag = recovery.source(self.tier, self._folder)
        if tag is None and ranks.from_first(lambda: _is_bare(place)):
            return None
        return load_training(place, tag=tag, **state)

    def hold(self) -> None:
        """Return once the snapshot under way has copied what it needs. Call it before anything changes the state."""
        self.tier.hold()

    def wait(self) -> None:
        """Return once no snapshot is under way."""
        self.tier.wait()


def _is_bare(place: str) -> bool:
    """Whether no checkpoint was ever written to a folder. It may still have metrics."""
    folder = locate(place)
    return not locations.exists(folder / LATEST) and not is_checkpoint(folder)
