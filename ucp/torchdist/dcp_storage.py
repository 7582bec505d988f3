"""Storage for stock torch.distributed.checkpoint: ``dcp.load`` of any checkpoint, and ``dcp.save`` of this project's.

    import torch.distributed.checkpoint as dcp
    import ucp.dcp

    dcp.load(state, storage_reader=ucp.dcp.StorageReader("runs/deepspeed"))     # a DeepSpeed ZeRO-3 one, say
    dcp.save(state, storage_writer=ucp.dcp.StorageWriter("runs/step-1000"))     # and dcp.async_save

Both follow DCP's protocol, in which ranks agree through DCP, so they work in any process group that it is given. They
do what `ucp.load` and `ucp.save` do, with two differences that come from DCP. In a process group of only some of the
job's ranks, a load that fails on one rank may have changed others, and tensors that they hold parts of are not proved.
And if each rank has a plain tensor of its own under one name, only one of them is saved.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor
from ucp.checkpoint import open as open_checkpoint
from ucp.errors import SaveFailed, Unsupported
from ucp.formats.dcp import writer
from ucp.formats.shared.roles import PARAM, VALUES, StateEntry
from ucp.job import ranks
from ucp.loading.load import load
from ucp.loading.name_match import bare
from ucp.loading.nouns import Wish
from ucp.loading.report import LoadReport
from ucp.loading.spec_names import config_of, under_spec
from ucp.printable import logger
from ucp.saving import commit
from ucp.saving.commit import Session
from ucp.saving.save import write_share
from ucp.storage.dtypes import to_torch
from ucp.torchdist.save import split_path
from ucp.torchdist.source import source_of_entries
from ucp.torchdist.state_dicts import check_tensor
from ucp.torchdist.target import StateDictTarget
from ucp.torchdist.words import StateDictWords

log = logger(__name__)

__all__ = ["StorageReader", "StorageWriter"]


class StorageReader(dcp.StorageReader):
    """Lets ``dcp.load`` read a checkpoint of any format that `ucp.open` knows, into its own sharding.

    The state dict's names may be nested or flattened, with the model under "model" or bare. Optimizer states and param
    groups are found by the parameters' names.

    Parameters
    ----------
    path, opening
        As for `ucp.open` (tag, spec, model_config, ...).
    model
        The module that is loaded. It is needed if a spec's ``names:`` say what its parameters are called in the
        checkpoint. The config of a transformers model also gives the spec's sizes.
    verify
        Check digests.
    prove, memory
        As for `ucp.load`.

    Attributes
    ----------
    last_load
        The `LoadReport` of the last load on this rank, or None before the first.

    Raises
    ------
    Mismatch
        From ``dcp.load``: something does not fit. Nothing on this rank is changed.
    PartlyLoaded
        From ``dcp.load``: something failed when some of the tensors were filled.
    UcpError
        From ``dcp.load``: what `ucp.open` and `ucp.load` raise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: torch.nn.Module | None = None,
        verify: bool = True,
        prove: bool | str = True,
        memory: int = limits.LOAD_MEMORY_BYTES,
        **opening: Any,
    ) -> None:
        self.checkpoint_id = os.fspath(path)
        self.last_load: LoadReport | None = None
        self._opening = {"model_config": config_of(model), **opening}
        self._how: dict[str, Any] = {"verify": verify, "prove": prove, "memory": memory}
        self._live = [] if model is None else [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._catalog: Catalog | None = None
        self._objects: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = os.fspath(checkpoint_id)
        self._catalog = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> torch_metadata.Metadata:
        with open_checkpoint(self.checkpoint_id, **self._opening) as checkpoint:
            catalog = replace(checkpoint.catalog, training_state=checkpoint.training_state)
        self._catalog = under_spec(catalog, self._live, self._opening) if self._live else catalog
        names = _Names(self._catalog)
        self._objects = names.objects
        return torch_metadata.Metadata(names, names.paths, {})

    def set_up_storage_reader(
        self, metadata: torch_metadata.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing is needed: `read_metadata` has opened the checkpoint on every rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Tell every rank how many load."""
        return [replace(plan, storage_data=_Ranks(len(plans))) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan names. Raises Mismatch if something does not fit; then nothing on this rank is changed.

        If all ranks of the job load, either all of them are changed or none is.
        """
        catalog = self._catalog
        if catalog is None:
            raise Unsupported("StorageReader.read_data was called before read_metadata")
        # Only DCP knows a group of some of the job's ranks, and it is DCP that makes them agree.
        alone = not isinstance(plan.storage_data, _Ranks) or plan.storage_data.count != ranks.world_size()
        with ranks.alone() if alone else nullcontext():
            entries, target = ranks.all_or_none(lambda: self._target(plan, planner, catalog))
        wish = Wish(partial=True)
        report = load(catalog, target, wish, path=self.checkpoint_id, alone=alone, **self._how)
        self.last_load = report
        if ranks.rank() == 0:
            log.info("%s", report)
        _commit(plan, planner, entries, target)
        out: Future[None] = Future()
        out.set_result(None)
        return out

    def _target(
        self, plan: LoadPlan, planner: LoadPlanner, catalog: Catalog
    ) -> tuple[dict[str, StateEntry], StateDictTarget]:
        """The planner's state dict, and what of it the plan asks for."""
        entries = _entries(planner)
        # A planner that makes its state dict from the metadata (`dcp_to_torch_save`) has no values yet.
        blind = set(self._objects).intersection(entries) if isinstance(planner, _EmptyStateDictLoadPlanner) else set()
        entries.update({key: StateEntry(entries[key].path, None, self._objects[key]) for key in blind})
        asked = {item.dest_index.fqn for item in plan.items}.difference(blind)
        return entries, StateDictTarget(self.checkpoint_id, entries, catalog, only=asked, words=_WORDS)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.path.isdir(checkpoint_id)


@dataclass(frozen=True)
class _Ranks:
    """How many ranks load. The coordinator adds it to their plans."""

    count: int


def _commit(plan: LoadPlan, planner: LoadPlanner, entries: Mapping[str, StateEntry], target: StateDictTarget) -> None:
    """Give the planner the values, and tell it which tensors are filled."""
    for item in plan.items:
        key = item.dest_index.fqn
        if item.type is LoadItemType.BYTE_IO:
            # Options that say how the optimizer is implemented (foreach, fused) stay as they are.
            value = target.values.get(key, entries[key].value)
            stream = io.BytesIO()
            torch.save(value, stream)
            stream.seek(0)
            planner.load_bytes(item, stream)
        elif key in target.filled:
            planner.commit_tensor(item, planner.resolve_tensor(item))


_WORDS = StateDictWords(
    allow="DCP's DefaultLoadPlanner(allow_partial_load=True) leaves what is missing",
    begins="nothing was loaded on this rank",
)


def _entries(planner: LoadPlanner | SavePlanner) -> dict[str, StateEntry]:
    """The planner's state dict, flattened."""
    found = getattr(planner, "state_dict", None)
    if not isinstance(found, Mapping):
        raise Unsupported(
            f"{type(planner).__name__} does not show its state dict; use DCP's default planner or one derived from it"
        )
    paths = getattr(planner, "mappings", {})
    out: dict[str, StateEntry] = {}
    for key, value in found.items():
        path = tuple(paths.get(key, (key,)))
        if isinstance(value, torch.Tensor):
            check_tensor(key, value)
            out[key] = StateEntry(path, tuple(value.shape), value)
        else:
            out[key] = StateEntry(path, None, value)
    return out


class _Names(dict[str, Any]):
    """What a checkpoint holds, by the names of a state dict with any prefix.

    Iterating gives the entries as `ucp.formats.dcp.writer` names them. DCP's planners only ask whether an entry is
    there, whether it is a tensor, and what its shape is. The entry itself is found later, when the whole state dict is
    known.
    """

    def __init__(self, catalog: Catalog) -> None:
        super().__init__()
        self._catalog = catalog
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.objects: dict[str, Any] = {}
        self._short = {bare(n): i.name for i in catalog.parameters.values() for n in (i.name, *i.aliases)}
        self._owners = {n: i.name for i in catalog.parameters.values() for n in (i.name, *i.aliases)}
        own = [o.get(VALUES, {}) for o in catalog.training_state.extra.get("ranks", ())]
        self._own = own[ranks.rank()] if len(own) == ranks.world_size() else {}
        for path, value in writer.entries(catalog):
            key = ".".join(map(str, path))
            self.paths[key] = path
            found: Any = _bytes()
            if isinstance(value, LogicalTensor):
                found = _tensor(value)
            elif isinstance(value, writer.Single):
                found = _single()
            else:
                self.objects[key] = value
            super().__setitem__(key, found)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self._find(key) is not None)

    def __missing__(self, key: str) -> Any:
        found = self._find(key)
        if found is None:
            raise KeyError(key)
        return found

    def _find(self, key: str) -> Any | None:
        parts = key.split(".")
        if key in self._own:
            value = self._own[key]
            return _whole(value.dtype, value.shape) if isinstance(value, torch.Tensor) else _bytes()
        if "param_groups" in parts:
            return _bytes()
        for at in range(len(parts)):
            name, rest = ".".join(parts[at:]), parts[:at]
            owner = self._owner(name)
            if owner is not None and (owner, PARAM) in self._catalog.tensors and "state" not in rest[-1:]:
                return _tensor(self._catalog.tensors[owner, PARAM])
            owner = self._owner(".".join(parts[at:-1])) if rest[-1:] == ["state"] else None
            if owner is not None:
                tensor = self._catalog.tensors.get((owner, parts[-1]))
                if tensor is not None:
                    return _tensor(tensor)
                if parts[-1] in self._catalog.parameters[owner].scalars:
                    return _single()
        return None

    def _owner(self, name: str) -> str | None:
        return self._owners.get(name) or self._short.get(bare(name))


def _tensor(tensor: LogicalTensor) -> torch_metadata.TensorStorageMetadata:
    return _whole(to_torch(tensor.dtype), tensor.shape)


def _single() -> torch_metadata.TensorStorageMetadata:
    return _whole(torch.float32, ())


def _whole(dtype: torch.dtype, shape: Sequence[int]) -> torch_metadata.TensorStorageMetadata:
    size = torch.Size(shape)
    chunk = torch_metadata.ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return torch_metadata.TensorStorageMetadata(torch_metadata.TensorProperties(dtype=dtype), size, [chunk])


def _bytes() -> torch_metadata.BytesStorageMetadata:
    return torch_metadata.BytesStorageMetadata()


class StorageWriter(dcp.StorageWriter):
    """Lets ``dcp.save`` and ``dcp.async_save`` write the fragmented form.

    It is committed in one rename, has digests, and can be loaded in any layout and under DeepSpeed.

    Parameters
    ----------
    path
        The checkpoint's folder. A checkpoint that is already there is replaced once the new one is whole.
    timeout
        How many seconds the coordinator waits for the other ranks' files.

    Raises
    ------
    Unsupported
        From ``dcp.save``: a value cannot be kept exactly.
    DestinationError
        From ``dcp.save``: the folder cannot be written.
    SaveFailed
        From ``dcp.save``: the ranks do not hold every element exactly once.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = limits.SAVE_TIMEOUT_SECONDS) -> None:
        self.checkpoint_id = os.fspath(path)
        self._timeout = timeout
        self._session: Session | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed: the coordinator begins in `prepare_global_plan`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the save, and tell every rank where."""
        folder, name = split_path(self.checkpoint_id)
        session = self._session = commit.begin(folder, name, len(plans), latest=False)
        # If another rank gives the save up, it is never finished here. Then its folder is deleted with this object.
        weakref.finalize(self, _abandon, session)
        return [replace(plan, storage_data=(session, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and leave its receipt. Raises Unsupported, DestinationError."""
        session, rank = plan.storage_data
        entries = _entries(planner)
        mine = {item.index.fqn for item in plan.items if item.tensor_data is not None}
        _check_shards(plan.items, entries)
        source = source_of_entries(entries, mine, rank, session.world)
        write_share(session, rank, source)
        out: Future[list[WriteResult]] = Future()
        out.set_result([WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items])
        return out

    def finish(self, metadata: torch_metadata.Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the checkpoint. Raises SaveFailed if the ranks do not hold every element exactly once."""
        if self._session is None:
            raise SaveFailed(f"{self.checkpoint_id}: finish was called on a rank that has not begun the save")
        commit.commit(self._session, timeout=self._timeout)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _check_shards(items: list[WriteItem], entries: Mapping[str, StateEntry]) -> None:
    """Raise Unsupported for shards that are neither a DTensor's nor a whole tensor."""
    for item in items:
        if item.tensor_data is None:
            continue
        value = entries[item.index.fqn].value
        if not isinstance(value, DTensor) and item.tensor_data.chunk.sizes != item.tensor_data.size:
            raise Unsupported(
                f"'{item.index.fqn}' is a {type(value).__name__}; DTensors and plain tensors are supported"
            )


def _abandon(session: Session) -> None:
    if os.path.isdir(session.temporary):
        commit.abandon(session)
