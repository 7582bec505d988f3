"""Open a checkpoint of any supported format, and read regions of its logical tensors.

    with ucp.open("runs/llama") as checkpoint:
        rows = checkpoint.read("model.embed_tokens.weight", "exp_avg", region=(slice(0, 16),))

Opening reads metadata only. A read touches the bytes that the region needs. Where the checkpoint has digests, it reads
the whole chunks that hold these bytes, and verifies each of them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ucp import formats, run_folder
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, ParamGroup, TrainingState
from ucp.errors import ApproximateCheckpoint, BadArgument, NotACheckpoint, UnknownName
from ucp.formats import beside
from ucp.formats.base import Format
from ucp.formats.nouns import ReadRequest
from ucp.geometry import box, numel, region
from ucp.interpreter import no_collections
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.run_folder import nearest
from ucp.spec.select import Choice, choose, choose_before
from ucp.storage import locations
from ucp.storage.digests import verify_range
from ucp.storage.dtypes import to_torch
from ucp.storage.files import Files
from ucp.storage.locations import locate
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, TensorRef
from ucp.transfer.checksums import RecordChecks, read_record
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Reader
from ucp.units import counted

if TYPE_CHECKING:
    import torch

log = logger(__name__)


class _Parameters(dict[str, ParameterInfo]):
    """Parameters by their names. One that is not there is refused with the names that are near."""

    unknown: Callable[[object], UnknownName]

    def __missing__(self, name: object) -> ParameterInfo:
        raise self.unknown(name)


class Checkpoint:
    """An open checkpoint: its catalog, and reads from it. It is a context manager. Several threads may read from it."""

    def __init__(self, path: Path, catalog: Catalog, files: Files, verify: bool = True) -> None:
        self.path = path
        self.catalog = catalog
        self._files = files
        self._reader = Reader(catalog, files, verify)
        self._verify = verify
        self._parameters: _Parameters | None = None
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

    @property
    def bytes_read(self) -> int:
        """How many bytes of its files have been read so far, metadata included."""
        return self._files.bytes_read

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, layout='{self.layout}')"

    @property
    def format(self) -> str:
        """The format it was read from, such as 'universal' or 'deepspeed'."""
        return self.catalog.format

    @property
    def layout(self) -> Layout:
        """The layout of the run that saved it."""
        return self.catalog.layout

    @property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Every parameter and buffer by its own name; tied ones are listed once, under the name that owns them."""
        if self._parameters is None:
            self._parameters = _Parameters(self.catalog.parameters)
            self._parameters.unknown = self._unknown
        return self._parameters

    @property
    def reader(self) -> Reader:
        """Byte ranges of the catalog's files, for `ucp.transfer`."""
        return self._reader

    @property
    def training_state(self) -> TrainingState:
        """Everything that is not a tensor of a parameter. Its tensors (of client state or schedulers) are torch's own,
        and are read when this is first used."""
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
        """Read one region of a logical tensor.

        Parameters
        ----------
        name
            The name of a parameter or buffer. A tied one may be called by any of its names.
        state
            'param', or the name of an optimizer state.
        region
            One slice of step 1 for each leading dimension. Dimensions without a slice are read whole.

        Returns
        -------
        torch.Tensor
            A new tensor on the CPU, in the checkpoint's element type. It has as many dimensions as the whole tensor.

        Raises
        ------
        BadArgument
            If the checkpoint does not have this name, state or region. Similar names are listed.
        DigestMismatch
            If a chunk that holds part of the region is damaged.
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
        """Read and check every byte that has a digest, or that lies in a tensor's record with a CRC-32.

        Parameters
        ----------
        progress
            Called with the bytes checked so far and the bytes to check in all.

        Returns
        -------
        int
            How many bytes were checked. It is 0 for a checkpoint with neither digests nor CRC-32s.

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
            raise self._unknown(name) from None
        found = self.catalog.tensors.get((owner, state))
        if found is None:
            info = self.parameters[owner]
            scalar = " (it is a single value: see parameters[...].scalars)" if state in info.scalars else ""
            raise BadArgument(
                f"{self.path}: '{name}' has no state '{state}'{scalar}; it has {', '.join(info.states) or 'none'}"
            )
        return found

    def _unknown(self, name: object) -> UnknownName:
        owner = next((info.name for info in self.catalog.parameters.values() if name in info.aliases), None)
        everyone = [n for info in self.catalog.parameters.values() for n in (info.name, *info.aliases)]
        hint = nearest(str(name), everyone) if owner is None else f"it is tied to '{owner}', under which it is listed"
        return UnknownName(f"{self.path}: no parameter '{name}'; {hint}")

    def _load(self, ref: TensorRef) -> torch.Tensor:
        """A tensor of the training state."""
        import torch

        dtype = to_torch(ref.dtype)
        if not ref.numel:
            return torch.empty(ref.shape, dtype=dtype)
        index = next((k for k, file in enumerate(self.catalog.files) if file.path == ref.file), None)
        start, stop = ref.span
        raw = np.empty(stop - start, np.uint8)
        record = ref.record if self._verify and index not in self.catalog.computed else None
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
    param_names: Sequence[Sequence[str]] | str | os.PathLike[str] | None = None,
    param_shapes: Mapping[str, Sequence[int]] | str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    verify: bool = True,
    allow_approximate: bool = False,
) -> Checkpoint:
    """Open a checkpoint, or one of a folder of checkpoints. Only metadata is read.

    Parameters
    ----------
    path
        The folder of a checkpoint, or of several, by path or URL (``s3://...``). Of several, the file ``latest`` names
        the one to open; without it the newest is opened, with a logged line (`ucp.run_folder` has the rules). A damaged
        checkpoint is an error, and so is a ``latest`` that names none.
    spec
        How tensor parallelism cuts the model: the name of a shipped spec, or a file. By default the checkpoint's own
        description is used, or else the shipped spec for the model's type. If neither decides, opening fails.
    tag
        Which checkpoint of a folder to open, whatever ``latest`` says; 'newest' is the newest whole one.
    model_config, sizes
        The sizes that the spec needs. model_config is the model's config.json: a mapping, a file or its folder. By
        default it is what the checkpoint has recorded or has beside it. sizes are by name, and override the config.
    trust_client_state, trust_paths
        For DeepSpeed's formats and DCP: unpickle classes outside the allow-list, which runs their code. For virtual
        checkpoints: follow them to files outside the folder that they name as their source.
    param_names, param_shapes
        Each param group's names, in order, where the optimizer has numbers alone; the shapes of all parameters by name,
        in the module's order, where FSDP1 saved them flat (LOCAL_STATE_DICT). Each may be a JSON file.
    options
        Further options of a format from another package, by name.
    verify
        While reading, check the digests that there are, and compare a few elements of what is stored twice.
    allow_approximate
        Open a checkpoint with layers that `ucp.repair` has filled in, and log a line about it.

    Returns
    -------
    Checkpoint

    Raises
    ------
    NotACheckpoint, ApproximateCheckpoint
        If no checkpoint is recognised; if layers were filled in, and allow_approximate is not set.
    DamagedCheckpoint
        If files are missing or truncated, belong to different saves, or contradict each other.
    SpecError, Mismatch, Unsupported, UnsafePickle
        If the spec does not fit, and where the format's reader raises them.
    """
    some = dict[str, Any](trust_client_state=trust_client_state, trust_paths=trust_paths, param_names=param_names)
    asked = _Asked(choose(spec, model_config, sizes), verify, {**some, "param_shapes": param_shapes}, options or {})
    return _exact(_open(path, tag, asked, verify), allow_approximate)


def open_before(
    changes: str | os.PathLike[str] | Mapping[str, Any] | None,
    live: Mapping[str, Any] | None,
    path: str | os.PathLike[str],
    spec: str | os.PathLike[str] | None = None,
    tag: str | int | None = None,
    **opening: Any,
) -> Checkpoint:
    """Open a checkpoint for a live model, which may have been changed since. Arguments and errors as for `open`, and
    those of `ucp.spec.select.choose_before`."""
    model_config, sizes, options = (opening.pop(name, None) for name in ("model_config", "sizes", "options"))
    verify, allow_approximate = opening.pop("verify", True), opening.pop("allow_approximate", False)
    choice = choose_before(choose(spec, model_config, sizes), changes, live)
    return _exact(_open(path, tag, _Asked(choice, verify, opening, options or {}), verify), allow_approximate)


def _exact(opened: Checkpoint, allow_approximate: bool) -> Checkpoint:
    """The checkpoint. Raises ApproximateCheckpoint for one with filled-in layers, unless they are allowed."""
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
    """A sentence for people: what a repair has filled in."""
    ways: dict[str, list[str]] = {}
    for name, how in approximate.items():
        ways.setdefault(how, []).append(name)
    texts = [f"{how}: '{names[0]}'" + (f" and {len(names) - 1} more" * (len(names) > 1)) for how, names in ways.items()]
    more = f"; and {len(texts) - 4} more ways" if len(texts) > 4 else ""
    many = counted(len(approximate), "parameter is", "parameters are")
    return f"{many} approximate, not what a run had ({'; '.join(texts[:4])}{more})"


def open_apart(path: str | os.PathLike[str], tag: str | int | None = None) -> Checkpoint:
    """Open a checkpoint before a spec puts it together: every model-parallel rank's own tensors as they are.

    Where the format has such ranks, names are those of `ucp.spec.resolve.apart`. Arguments and errors as for `open`.
    """
    return _open(path, tag, _Asked(Choice(apart=True)), True)


@dataclass(frozen=True)
class _Asked:
    """How to read, before the format is known. A format may ignore an option of ``some`` that it does not know; it has
    to take all of ``own``."""

    choice: Choice
    compare: bool = True
    some: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)

    def of(self, known: Format) -> ReadRequest:
        """The same for this format. Raises BadArgument for an option that it does not take, or of the wrong type."""
        takes = {option.name for option in known.read_options}
        checked = known.checked({**{name: self.some[name] for name in self.some if name in takes}, **self.own})
        return ReadRequest(self.choice, self.compare, checked)


def _open(path: str | os.PathLike[str], tag: str | int | None, asked: _Asked, verify: bool) -> Checkpoint:
    folder = locate(path)
    files = Files()
    try:
        with no_collections():  # objects are made, and no garbage

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


def _region(name: str, shape: tuple[int, ...], wanted: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes. Raises BadArgument if this is not a region of the tensor."""
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
    """A copy of a plain value, in which stand-ins become torch's own tensors, dtypes, sizes and devices. An object that
    is in several places of the value is one object in the copy, too."""
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
