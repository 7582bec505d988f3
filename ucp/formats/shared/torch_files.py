"""Files of ``torch.save`` under construction: an object tree with placeholders, and the elements that fill those."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ucp.catalog import Catalog, LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.geometry import Blocks, box, empty, numel, whole
from ucp.storage.torch_pt.pickler import Placeholder
from ucp.storage.torch_pt.values import Standin, TensorRef
from ucp.storage.torch_pt.writer import plan_torch_file, stem_of
from ucp.transfer.exact import check_exact
from ucp.transfer.gather import Want
from ucp.transfer.targets import TargetFile


@dataclass(frozen=True)
class PlaceholderPiece:
    """Elements of a logical tensor that go into a placeholder: ``blocks.starts`` counts the placeholder's elements.

    round: the placeholder may be of a narrower type than the tensor (a mixed-precision engine's weights).
    """

    tensor: LogicalTensor
    blocks: Blocks
    round: bool = False


@dataclass
class FileBuilder:
    """One ``.pt`` file to be. name: its path relative to the destination; "" for a record of another file."""

    name: str
    catalog: Catalog
    _pieces: dict[Placeholder, list[PlaceholderPiece]] = field(default_factory=dict)
    _references: dict[tuple[str, int], Placeholder] = field(default_factory=dict)
    _resolved: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def tensor(self, shape: Sequence[int], dtype: str, pieces: Sequence[PlaceholderPiece] = ()) -> Placeholder:
        """A tensor of this file. Elements that no piece covers are zero.

        Raises Mismatch where a piece's values don't fit into the type exactly, unless it is to be rounded.
        """
        for piece in pieces:
            if not piece.round:
                check_exact(piece.tensor, dtype)
        placeholder = Placeholder(tuple(shape), dtype)
        self._pieces[placeholder] = [piece for piece in pieces if len(piece.blocks)]
        return placeholder

    def whole(self, tensor: LogicalTensor, dtype: str | None = None, round: bool = False) -> Placeholder:  # noqa: A002
        """A whole logical tensor, in its own element type or another."""
        return self.tensor(tensor.shape, dtype or tensor.dtype, [PlaceholderPiece(tensor, whole(tensor.shape), round)])

    def finish(self, obj: Any) -> TargetFile:
        """The file that holds ``obj``, in which tensors may also be references into the source's files."""
        planned = plan_torch_file(self._resolve(obj), stem_of(self.name))
        wants = tuple(
            Want(piece.tensor, piece.blocks, placeholder.dtype, planned.offsets[placeholder], piece.round)
            for placeholder, pieces in self._pieces.items()
            if placeholder in planned.offsets
            for piece in pieces
        )
        return TargetFile(self.name, planned.size, planned.literals, wants, planned.crc32_entries)

    def _resolve(self, value: Any) -> Any:
        """The same tree with placeholders for references; containers without any stay the objects they are, and what
        lies in several places does so in the result."""
        key = id(value)
        if key not in self._resolved:
            # The value is kept beside what it became, so that nothing else gets its identity meanwhile.
            self._resolved[key] = value, self._with_placeholders(value)
        return self._resolved[key][1]

    def _with_placeholders(self, value: Any) -> Any:
        if isinstance(value, TensorRef):
            return self._reference(value)
        if isinstance(value, argparse.Namespace):
            found = self._resolve(vars(value))
            return value if found is vars(value) else argparse.Namespace(**found)
        if isinstance(value, Standin):
            found = self._resolve(value.state)
            return value if found is value.state else replace(value, state=found)
        if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
            found = {k: self._resolve(v) for k, v in value.items()}
            if all(found[k] is v for k, v in value.items()):
                return value
            copied: Any = copy.copy(value)  # keeps the kind of mapping, and its order
            copied.update(found)
            return copied
        if type(value) in (list, tuple):
            items = [self._resolve(v) for v in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return tuple(items) if isinstance(value, tuple) else items
        return value

    def _reference(self, ref: TensorRef) -> Placeholder:
        key = (ref.file, ref.offset)
        known = self._references.get(key)
        if known is not None and (known.shape, known.dtype) == (ref.shape, ref.dtype):
            return known
        tensor = self._logical(ref)
        placeholder = self._references[key] = self.whole(tensor)
        return placeholder

    def _logical(self, ref: TensorRef) -> LogicalTensor:
        paths = [Path(f.path) for f in self.catalog.files]
        if Path(ref.file) not in paths:
            raise DamagedCheckpoint(
                f"{ref.file}: a tensor of shape {list(ref.shape)} of the training state lies there, but the file does "
                "not belong to the checkpoint"
            )
        index = paths.index(Path(ref.file))
        shape = ref.shape
        blocks = box([0] * len(shape), shape, 0, ref.strides, index) if numel(shape) else empty(len(shape))
        bases = np.full(len(blocks), ref.offset, np.int64)
        return LogicalTensor("training state", "tensor", shape, ref.dtype, blocks, bases)
