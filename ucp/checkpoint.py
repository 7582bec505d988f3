"""Open a checkpoint of any supported format, and read regions of its logical tensors.

    with ucp.open("runs/llama") as checkpoint:
        rows = checkpoint.read("model.embed_tokens.weight", "exp_avg", region=(slice(0, 16),))

Opening reads metadata only. A read touches the bytes that the region needs, and where the checkpoint has digests, the
chunks that those lie in, each verified.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ucp import formats, run_folder
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, TrainingState
from ucp.errors import ApproximateCheckpoint, BadArgument, NotACheckpoint
from ucp.formats import beside
from ucp.formats.base import Format
from ucp.formats.nouns import ReadRequest
from ucp.geometry import box, numel, region
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.run_folder import nearest
from ucp.spec.select import Choice, choose
from ucp.storage import locations
from ucp.storage.digests import verify_range
from ucp.storage.dtypes import to_torch
from ucp.storage.files import Files
from ucp.storage.locations import locate
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, TensorRef
from ucp.transfer.checksums import RecordChecks, read_record
from ucp.transfer.gather import Reader, Want, gather

if TYPE_CHECKING:
    import torch

log = logger(__name__)


class Checkpoint:
    """An open checkpoint: its catalog, and reading from it. A context manager; reads may come from several threads."""

    def __init__(self, path: Path, catalog: Catalog, files: Files, verify: bool = True) -> None:
        self.path = path
        self.catalog = catalog
        self._files = files
        self._reader = Reader(catalog, files, verify)
        self._verify = verify
        self._training_state: TrainingState | None = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Reading afterwards opens them again."""
        self._files.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, layout='{self.layout}')"

    @property
    def format(self) -> str:
        """The format it was read from: 'universal', 'deepspeed'."""
        return self.catalog.format

    @property
    def layout(self) -> Layout:
        """The layout of the run that saved it."""
        return self.catalog.layout

    @property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Every parameter and buffer by its own name; tied ones are listed once, under the name that owns them."""
        return self.catalog.parameters

    @property
    def reader(self) -> Reader:
        """Byte ranges of the catalog's files, for `ucp.transfer`."""
        return self._reader

    @property
    def training_state(self) -> TrainingState:
        """Everything that is not a tensor of a parameter. Tensors in it (client state, schedulers) are torch tensors,
        read when this is first used."""
        state = self._training_state
        if state is None:
            state = self._training_state = _with_tensors(self.catalog.training_state, self._load)
        return state

    @property
    def unread(self) -> tuple[str, ...]:
        """Names in its folder that look like training state and are not read, such as a Trainer's ``optimizer.pt``."""
        known = formats.named(self.format)
        return () if known is None else beside.unread(self.path, known, self.catalog)

    def read(self, name: str, state: str = "param", region: Sequence[slice] | None = None) -> torch.Tensor:
        """One region of a logical tensor, as a new torch tensor on the CPU in the checkpoint's element type.

        Parameters
        ----------
        name
            A parameter or buffer, or another name of a tied one.
        state
            'param' or an optimizer state.
        region
            One slice for each leading dimension (step 1; what is not given is whole); the result has one dimension for
            each of the tensor's.

        Raises
        ------
        BadArgument
            For a name, state or region that the checkpoint does not have; near names are listed.
        DigestMismatch
            Where a chunk that holds some of the region is damaged.
        """
        import torch

        tensor = self._tensor(name, state)
        offsets, sizes = _region(name, tensor.shape, region)
        out = torch.empty(sizes, dtype=to_torch(tensor.dtype))
        if numel(sizes):
            raw = out.reshape(-1).view(torch.uint8).numpy()
            gather(self._reader, [Want(tensor, box(offsets, sizes), tensor.dtype)], [raw])
        return out

    def verify(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Read every byte that has a digest, or lies in a tensor's record with a CRC-32, and check it.

        Returns
        -------
        int
            How many bytes that were; 0 where it has neither.

        Raises
        ------
        DigestMismatch
            At the first damaged chunk or record.
        """
        tables = self.catalog.chunk_digests
        records = RecordChecks(self.catalog.crc_records, [file.path for file in self.catalog.files], self._files)
        total, done = sum(table.size for table in tables.values()) + records.nbytes, 0
        for index, table in tables.items():
            verify_range(self._files, self.catalog.files[index].path, table, 0, table.size)
            done += table.size
            if progress is not None:
                progress(done, total)
        for nbytes in records.read_all():
            done += nbytes
            if progress is not None:
                progress(done, total)
        return total

    def _tensor(self, name: str, state: str) -> LogicalTensor:
        try:
            owner = self.catalog.resolve(name)
        except KeyError:
            everyone = [n for info in self.parameters.values() for n in (info.name, *info.aliases)]
            raise BadArgument(f"{self.path}: no parameter '{name}'; {nearest(name, everyone)}") from None
        found = self.catalog.tensors.get((owner, state))
        if found is None:
            info = self.parameters[owner]
            scalar = " (it is a single value: see parameters[...].scalars)" if state in info.scalars else ""
            raise BadArgument(
                f"{self.path}: '{name}' has no state '{state}'{scalar}; it has {', '.join(info.states) or 'none'}"
            )
        return found

    def _load(self, ref: TensorRef) -> torch.Tensor:
        """A tensor of the training state."""
        import torch

        dtype = to_torch(ref.dtype)
        if not ref.numel:
            return torch.empty(ref.shape, dtype=dtype)
        index = next((k for k, file in enumerate(self.catalog.files) if file.path == ref.file), None)
        start, stop = ref.span
        raw = np.empty(stop - start, np.uint8)
        record = ref.record if self._verify else None
        if record is not None and (record.start, record.stop) == (start, stop):
            raw[:] = np.frombuffer(read_record(self._files, ref.file, record), np.uint8)
        elif index is None:
            self._files.read_into(ref.file, start, memoryview(raw.data))
        else:
            self._reader.read_into(index, start, [raw], OrderedDict())
        return torch.from_numpy(raw).view(dtype).as_strided(ref.shape, ref.strides).clone()


def open(  # noqa: A001 (`ucp.open` is the public name)
    path: str | os.PathLike[str],
    spec: str | os.PathLike[str] | None = None,
    tag: str | int | None = None,
    *,
    model_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    trust_client_state: bool = False,
    trust_paths: bool = False,
    param_names: Sequence[Sequence[str]] | None = None,
    options: Mapping[str, Any] | None = None,
    verify: bool = True,
    allow_approximate: bool = False,
) -> Checkpoint:
    """Open a checkpoint, or one of a folder of checkpoints.

    Parameters
    ----------
    path
        A checkpoint's folder, or a folder of them as DeepSpeed writes it, by path or URL (``s3://...``). In a folder of
        them the file ``latest`` names the one that is opened; without that file it is the newest, with a logged line
        (`ucp.run_folder` has the rules). A damaged one is an error, and so is a ``latest`` that names none.
    spec
        How tensor parallelism cuts the model: the name of a shipped spec, or a file. Without one: what the checkpoint
        says of itself, then the shipped one for the model's type; if neither decides, it is refused.
    tag
        The one to take, whatever ``latest`` says; 'newest': the newest whole one, with a line on what is passed over.
    model_config, sizes
        For the spec's sizes: the model's config.json (a mapping, a file or its folder; default: what the checkpoint has
        recorded or has beside it), and sizes by name, which go before the config.
    trust_client_state
        DeepSpeed's formats and DCP: unpickle classes outside the allow-list, which runs their code.
    trust_paths
        Virtual checkpoints: follow them to files outside the folder that they name as their source.
    param_names
        DeepSpeed stage 0, whose files do not name the optimizer's parameters: each param group's, in order.
    options
        What the format of another package takes besides, by name.
    verify
        Check digests, where there are some, while reading, and a few elements of what the checkpoint has twice.
    allow_approximate
        Take a checkpoint with layers that `ucp.repair` has filled in, with a logged line.

    Raises
    ------
    NotACheckpoint, ApproximateCheckpoint
        Where nothing is recognised; where layers were filled in and that is not allowed.
    DamagedCheckpoint
        Where files are missing, truncated, mixed or contradict each other.
    SpecError, Mismatch, Unsupported, UnsafePickle
        Where the spec does not fit, and as the format's reader does.
    """
    asked = _Asked(
        choose(spec, model_config, sizes),
        verify,
        {"trust_client_state": trust_client_state, "trust_paths": trust_paths, "param_names": param_names},
        options or {},
    )
    return _exact(_open(path, tag, asked, verify), allow_approximate)


def _exact(opened: Checkpoint, allow_approximate: bool) -> Checkpoint:
    """The checkpoint, if it is what a run saved, or that is not asked for."""
    if opened.catalog.approximate:
        sentence = approximate_sentence(opened.catalog.approximate)
        if not allow_approximate:
            opened.close()
            raise ApproximateCheckpoint(
                f"{opened.path}: {sentence}; allow_approximate=True (--allow-approximate; under DeepSpeed in the "
                'config "ucp": {"load": {"allow_approximate": true}}) takes it all the same'
            )
        log.warning("%s: %s", opened.path, sentence)
    return opened


def approximate_sentence(approximate: Mapping[str, str]) -> str:
    """What a repair has filled in of a checkpoint, for people."""
    ways: dict[str, list[str]] = {}
    for name, how in approximate.items():
        ways.setdefault(how, []).append(name)
    texts = [f"{how}: '{names[0]}'" + (f" and {len(names) - 1} more" * (len(names) > 1)) for how, names in ways.items()]
    more = f"; and {len(texts) - 4} more ways" if len(texts) > 4 else ""
    return f"{len(approximate)} parameters are approximate, not what a run had ({'; '.join(texts[:4])}{more})"


def open_apart(path: str | os.PathLike[str], tag: str | int | None = None) -> Checkpoint:
    """Open a checkpoint before a spec puts it together: every model-parallel rank's own tensors as they are.

    Where the format has such ranks, names are those of `ucp.spec.resolve.apart`. Arguments and errors as for `open`.
    """
    return _open(path, tag, _Asked(Choice(apart=True)), True)


@dataclass(frozen=True)
class _Asked:
    """How to read, before the format is known. some: options that a format which does not take them may leave aside;
    own: those that it has to take."""

    choice: Choice
    compare: bool = True
    some: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    def of(self, known: Format) -> ReadRequest:
        """The same for this format. Raises BadArgument for an option that it does not take, or of another type."""
        takes = {option.name: option for option in known.read_options}
        for name in self.own:
            if name not in takes:
                hint = f"; it takes {', '.join(takes)}" if takes else ""
                raise BadArgument(f"reading a checkpoint of the format '{known.name}' takes no option '{name}'{hint}")
        given = {**self.some, **self.own}
        checked = {name: option.checked(given[name]) for name, option in takes.items() if name in given}
        return ReadRequest(self.choice, self.compare, checked)


def _open(path: str | os.PathLike[str], tag: str | int | None, asked: _Asked, verify: bool) -> Checkpoint:
    folder = locate(path)
    files = Files()
    try:
        with _no_collections():

            def read(path: Path, known: Format) -> Catalog:
                return formats.read(known, path, files, asked.of(known))

            where, catalog = run_folder.take(folder, tag, read)
    except BaseException as error:
        files.close()
        if isinstance(error, OSError) and locations.is_remote(folder):
            raise NotACheckpoint(f"{folder}: cannot be reached: {error.strerror or error}") from error
        raise
    opened = Checkpoint(where, catalog, files, verify)
    if names := opened.unread:
        log.warning("%s: %s", where, beside.sentence(names, "in it"))
    return opened


@contextmanager
def _no_collections() -> Iterator[None]:
    """Opening makes many objects and no rubbish: a search for that among all that a process with torch has can take
    longer than everything else."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _region(name: str, shape: tuple[int, ...], wanted: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes. Raises BadArgument for what is no region of the tensor."""
    if isinstance(wanted, slice):
        wanted = (wanted,)
    if wanted is not None and (not isinstance(wanted, Sequence) or not all(isinstance(s, slice) for s in wanted)):
        raise BadArgument(
            f"region of '{name}': give a tuple of slices, one for each leading dimension; found {wanted!r}"
        )
    try:
        return region(shape, wanted)
    except (ValueError, TypeError) as error:
        raise BadArgument(f"region of '{name}' (shape {list(shape)}): {error}") from error


def _with_tensors(value: Any, load: Callable[[TensorRef], torch.Tensor]) -> Any:
    """A copy of a plain value with torch's own tensors, dtypes, sizes and devices where it has stand-ins for them. What
    lies in several places of the value does so in the copy."""
    import torch

    made: dict[int, Any] = {}

    def convert(item: Any) -> Any:
        key = id(item)
        if key not in made:
            made[key] = converted(item)
        return made[key]

    def converted(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return load(value)
        if isinstance(value, DtypeName):
            return to_torch(value.name)
        if isinstance(value, DeviceName):
            return torch.device(value.name)
        if isinstance(value, Size):
            return torch.Size(value)
        if isinstance(value, (TrainingState, ParamGroup)):
            return dataclasses.replace(
                value, **{f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if type(value) is list:
            return [convert(item) for item in value]
        if type(value) is tuple:
            return tuple(convert(item) for item in value)
        if isinstance(value, deque):
            return deque((convert(item) for item in value), value.maxlen)
        if isinstance(value, dict):  # OrderedDict and defaultdict keep their class
            out = copy.copy(value)
            for key in value:
                out[key] = convert(value[key])
            return out
        if isinstance(value, argparse.Namespace):
            namespace = argparse.Namespace()
            vars(namespace).update({name: convert(item) for name, item in vars(value).items()})
            return namespace
        return value

    return convert(value)
