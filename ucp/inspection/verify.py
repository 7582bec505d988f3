"""Whether a checkpoint is whole: files, coverage, digests, copies, training state, and finite values on request.

Opening refuses a damaged checkpoint at the first fault. This goes on and names all faults, as far as the metadata can
still be read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ucp import checkpoint, formats, limits, run_folder
from ucp.catalog import Catalog, LogicalTensor
from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument, DamagedCheckpoint, DigestMismatch, NotACheckpoint, RemovedMeanwhile, UcpError
from ucp.formats import beside
from ucp.formats.base import Format
from ucp.formats.nouns import Salvage
from ucp.geometry import box
from ucp.inspection import hashes, stream
from ucp.inspection.bits import Advance, checked_files, damaged_chunks, damaged_entries, torch_files
from ucp.inspection.coverage import faults
from ucp.inspection.digests import contradictions, digests_of
from ucp.inspection.owners import file_owners
from ucp.inspection.state import state_findings
from ucp.inspection.values import not_finite
from ucp.storage import locations
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.transfer.gather import Want, gather
from ucp.units import counted

SCHEMA = "ucp.verify/1"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """kind: 'unreadable', 'file', 'hole', 'overlap', 'outside', 'digest', 'copy', 'training-state', 'not-finite',
    'unread', 'unchecked', 'approximate' or 'repair'. subject: the file or ``name:state`` that it is about. fault: False
    for mere information."""

    kind: str
    subject: str
    text: str
    fault: bool = True


@dataclass(frozen=True)
class Verdict:
    """What was found, and what was checked.

    ``checked`` has these numbers:

    - tensors, copies: how many there are.
    - digested: bytes of files compared with the checkpoint's digests.
    - digested_by_zip: bytes of files compared with the CRC-32s in torch's files.
    - compared: bytes of copies. finite: bytes of values. logical: bytes of tensors compared with logical digests.
    """

    path: str
    format: str
    layout: str | None
    checked: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "whole": self.whole, **asdict(self)}


@dataclass
class _Notes:
    found: list[Finding] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    more: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, subject: str, text: str, fault: bool = True) -> None:
        if sum(f.kind == kind for f in self.found) >= limits.VERIFY_FAULTS_COUNT:
            self.more[kind] = self.more.get(kind, 0) + 1
        else:
            self.found.append(Finding(kind, subject, text, fault))

    def verdict(self, path: Path, name: str, layout: str | None) -> Verdict:
        for kind, n in self.more.items():
            self.found.append(Finding(kind, "", f"and {n} more of this kind"))
        order = sorted(self.found, key=lambda f: not f.fault)
        return Verdict(str(path), name, layout, self.checked, tuple(order))


def verify(
    path: str | os.PathLike[str],
    tag: str | int | None = None,
    *,
    spec: str | os.PathLike[str] | None = None,
    model_config: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    trust_paths: bool = False,
    quick: bool = False,
    finite: bool = False,
    against: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check the checkpoint that ``path`` and ``tag`` name, by the rules of `ucp.open`.

    It checks coverage (every element of every tensor is held exactly once, by ranges that exist) and the training
    state. Unless ``quick``, it also checks every byte that has a digest, the CRC-32s of torch's files without digests,
    and all copies of what several ranks keep.

    Parameters
    ----------
    path, tag, spec, model_config, sizes, trust_paths
        As for `ucp.open`.
    quick
        Read no tensor.
    finite
        Also check that no value is infinite or not a number.
    against
        The digest of all tensors together (`ucp.logical.listing`) that it should have, and so every tensor the one
        that is recorded for it; computed from the files, or, with ``quick``, of the recorded ones.
    progress
        Called with (bytes done, bytes in all).

    Returns
    -------
    Verdict
        Whether it is whole, and every finding.

    Raises
    ------
    NotACheckpoint
        Where nothing is recognised.
    BadArgument, SpecError
        For the arguments; damage is a finding and no error.
    """
    choice: dict[str, Any] = {"spec": spec, "model_config": model_config, "sizes": sizes, "trust_paths": trust_paths}
    where = _where(locations.locate(path), tag, choice)
    known = formats.find(where)
    if known is None:
        raise formats.explain_unknown(where)
    try:
        # Digests and copies are compared below, all of them.
        opened = checkpoint.open(where, **choice, verify=False, allow_approximate=True)
    except (DamagedCheckpoint, NotACheckpoint) as error:
        other = isinstance(error, NotACheckpoint) and locations.is_file(where)  # a file that nothing says is damaged
        if other or isinstance(error, RemovedMeanwhile):
            raise
        return _unopened(where, known, error, quick)
    with opened:
        return verify_open(opened, quick=quick, finite=finite, against=against, progress=progress)


def _unopened(where: Path, known: Format, error: UcpError, quick: bool) -> Verdict:
    """What is found in a checkpoint that can't be opened: at least this error."""
    notes = _Notes()
    salvage = known.salvage(where)
    if salvage is not None:
        _note_salvage(salvage, notes)
    elif not quick:
        _look_into_archives(where, notes)
        _note_hashes(where, _hashes(known, where, notes), notes, lambda _: None)
    if not any(finding.kind != "digest" for finding in notes.found):
        notes.add("digest" if isinstance(error, DigestMismatch) else "unreadable", str(where), str(error))
    if (text := _repair(where)) is not None:
        notes.add("repair", str(where), text, fault=False)
    return notes.verdict(where, known.name, None)


def _repair(where: Path) -> str | None:
    """A sentence about what a repair would fill in. None if a repair is not possible."""
    from ucp.repair.run import outlook

    try:
        return f"ucp repair can make it loadable; it would fill in {outlook(where)}, which is approximate"
    except UcpError:
        return None


def _where(folder: Path, tag: str | int | None, choice: Mapping[str, Any]) -> Path:
    """The checkpoint that opening takes. It has to be whole only if the newest whole one was asked for."""
    if tag == run_folder.NEWEST:
        with checkpoint.open(folder, tag=tag, **choice, verify=False, allow_approximate=True) as opened:
            return opened.path
    return run_folder.resolve(folder, tag)


def verify_open(
    opened: Checkpoint,
    *,
    quick: bool = False,
    finite: bool = False,
    against: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """As `verify`, for an open checkpoint. Its coverage was already checked when it was opened."""
    notes = _Notes()
    _check(opened, notes, quick=quick, finite=finite, progress=progress)
    if against is not None:
        _against(opened, against, quick, notes, progress)
    return notes.verdict(opened.path, opened.format, str(opened.layout))


def _check(opened: Checkpoint, notes: _Notes, *, quick: bool, finite: bool, progress: Progress | None) -> None:
    catalog = opened.catalog
    tensors = list(catalog.tensors.values())
    notes.checked.update(
        tensors=len(tensors), copies=len(catalog.copies), digested=0, digested_by_zip=0, compared=0, finite=0
    )
    for tensor in catalog.copies:
        _check_inside(catalog, tensor, notes)
    for text in catalog.unchecked:
        notes.add("unchecked", "", text, fault=False)
    if catalog.approximate:
        notes.add("approximate", "", checkpoint.approximate_sentence(catalog.approximate), fault=False)
    for text, fault in state_findings(catalog):
        notes.add("training-state", "", text, fault)
    for left, place in ((opened.unread, "in it"), (beside.around(opened.path, opened.format), "beside it")):
        if left:
            notes.add("unread", "", beside.sentence(left, place), fault=False)
    if quick:
        notes.add("unchecked", "", "bytes were not read (quick)", fault=False)
        return
    zips, unchecked = checked_files(opened.path, catalog)
    hashed = _hashes(formats.named(opened.format), opened.path, notes)
    unchecked = [path for path in unchecked if os.path.basename(path) not in hashed]
    floating = [t for t in tensors if "float" in t.dtype] if finite else []
    with Files() as files:
        digested = sum(table.size for table in catalog.chunk_digests.values())
        in_zips = sum(files.size(path) for path in zips)
        work = (
            hashes.total(opened.path, hashed)
            + digested
            + in_zips
            + 2 * stream.total(catalog.copies)
            + stream.total(floating)
        )
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(min(done, work), work)

        with closing(damaged_chunks(catalog, files, advance)) as chunks:
            for index, start, stop in chunks:
                held = _held_in(catalog, index, start, stop)
                file = catalog.files[index].path
                notes.add("digest", file, f"bytes {start} to {stop} differ from their digest; they hold {held}")
        _note_entries(zips, files, advance, notes)
    _note_hashes(opened.path, hashed, notes, advance)
    notes.checked.update(digested=digested, digested_by_zip=in_zips)
    if unchecked:
        names = ", ".join(map(os.path.basename, unchecked[:3])) + (", …" if len(unchecked) > 3 else "")
        have = "has" if len(unchecked) == 1 else "have"
        text = f"{counted(len(unchecked), 'file')} {have} no digests, so flipped bits can't be seen: {names}"
        notes.add("unchecked", "", text, fault=False)
    _copies(opened, notes, advance)
    if finite:
        _finite(opened, floating, notes, advance)


def _hashes(known: Format | None, where: Path, notes: _Notes) -> Mapping[str, str]:
    """The SHA-256s that the checkpoint has recorded of its files, by name."""
    try:
        return {} if known is None else known.file_hashes(where)
    except UcpError as error:
        notes.add("file", str(where), str(error))
        return {}


def _note_hashes(where: Path, recorded: Mapping[str, str], notes: _Notes, advance: Advance) -> None:
    with closing(hashes.differing(where, recorded, advance)) as found:
        for path, text in found:
            notes.add("digest", path, text)


def _against(opened: Checkpoint, wanted: str, quick: bool, notes: _Notes, progress: Progress | None) -> None:
    """Compare the digest of all tensors with one that was given, and computed ones with those recorded."""
    if len(wanted) != 32 or not set(wanted.lower()) <= set("0123456789abcdef"):
        raise BadArgument(f"'{wanted[:40]}' is no digest of a checkpoint: `ucp digest` prints one of 32 digits")
    tensors = opened.catalog.tensors.values()
    lacking = [f"{t.name}:{t.state}" for t in tensors if t.digest is None]
    if quick and lacking:
        raise BadArgument(
            f"{opened.path}: {counted(len(lacking), 'tensor has', 'tensors have')} no recorded digest "
            f"('{lacking[0]}'), and nothing is read for a quick answer; verify without it"
        )
    found = digests_of(opened, compute=not quick, progress=progress)
    for name in contradictions(opened, found):
        notes.add("digest", name, "its elements have another logical digest than the manifest says")
    if found.all != wanted.lower():
        notes.add("digest", str(opened.path), f"all tensors have the digest {found.all}, not {wanted.lower()}")
    notes.checked["logical"] = stream.total(tensors)


def _look_into_archives(where: Path, notes: _Notes) -> None:
    """Find out which of torch's files are damaged, if their contents do not fit together."""
    with Files() as files:
        for path in torch_files(where):
            try:
                _note_entries([path], files, lambda _: None, notes)
            except DamagedCheckpoint as error:
                notes.add("file", path, error.message)


def _note_entries(paths: Sequence[str], files: Files, advance: Advance, notes: _Notes) -> None:
    with closing(damaged_entries(paths, files, advance)) as entries:
        for path, entry in entries:
            notes.add("digest", path, f"{entry} differs from the CRC-32 stored with it")


def _note_salvage(salvage: Salvage, notes: _Notes) -> None:
    """Every fault that the metadata of a damaged checkpoint still shows."""
    for subject, text in salvage.faults:
        notes.add("file", subject, text)
    if salvage.catalog is not None:
        for tensor in salvage.catalog.tensors.values():
            _check_coverage(salvage.catalog, tensor, notes)
            _check_inside(salvage.catalog, tensor, notes)


def _check_coverage(catalog: Catalog, tensor: LogicalTensor, notes: _Notes) -> None:
    subject, n = f"{tensor.name}:{tensor.state}", f"shape {list(tensor.shape)}"
    hole, twice, fault = faults(tensor.shape, tensor.blocks)
    if fault is None:
        return
    if hole is not None:
        notes.add("hole", subject, f"{hole.elements} elements are in no fragment ({n}); first {hole.box}")
    if twice is not None:
        by = ", ".join(sorted(_holders_of(catalog, tensor, twice.offsets)))
        notes.add(
            "overlap",
            subject,
            f"{twice.elements} elements are in {twice.times} fragments ({n}); first {twice.box}: {by}",
        )
    if hole is None and twice is None:
        notes.add("outside" if fault.kind == "outside" else "hole", subject, f"{fault} ({n})")


def _holders_of(catalog: Catalog, tensor: LogicalTensor, at: Sequence[int]) -> set[str]:
    b, place = tensor.blocks, np.array(at, np.int64)
    hit = np.all((b.offsets <= place) & (place < b.offsets + b.sizes), axis=1)
    who = file_owners(catalog)
    return {who[int(k)] for k in b.buffers[hit]}


def _check_inside(catalog: Catalog, tensor: LogicalTensor, notes: _Notes) -> None:
    try:
        catalog.check_ranges(tensor, np.array([file.size for file in catalog.files], np.float64))
    except DamagedCheckpoint as error:
        notes.add("outside", f"{tensor.name}:{tensor.state}", str(error))


def _held_in(catalog: Catalog, file: int, start: int, stop: int) -> str:
    """The tensors that have elements in these bytes of a file, in words."""
    names = [
        f"'{t.name}' ({t.state})"
        for t in (*catalog.tensors.values(), *catalog.copies)
        if _touches(t, file, start, stop)
    ]
    if not names:
        return "no tensor of a parameter (a header, or the training state's)"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _touches(tensor: LogicalTensor, file: int, start: int, stop: int) -> bool:
    b = tensor.blocks
    mine = b.buffers == file
    if not mine.any():
        return False
    first, last = tensor.byte_ranges()
    return bool(np.any(mine & (first < stop) & (last > start)))


def _copies(opened: Checkpoint, notes: _Notes, advance: Callable[[int], None]) -> None:
    """Compare every copy with the tensor that it is a copy of, byte by byte."""
    for copy in opened.catalog.copies:
        original = opened.catalog.tensors[copy.name, copy.state]
        for part, theirs, ours in _held_again(opened, copy, original):
            advance(2 * len(ours))
            notes.checked["compared"] += len(ours)
            if not np.array_equal(ours, theirs):
                path = opened.catalog.files[part].path
                count, first = int((ours != theirs).sum()), _first(opened, original)
                text = f"the copy in {path} differs in {counted(count, 'byte')} from what {first} holds"
                notes.add("copy", f"{copy.name}:{copy.state}", text)


def _first(opened: Checkpoint, tensor: LogicalTensor) -> str:
    return file_owners(opened.catalog)[int(tensor.blocks.buffers[0])]


def _held_again(
    opened: Checkpoint, copy: LogicalTensor, original: LogicalTensor
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(file, the original's bytes, the copy's) for every box of the copy."""
    width = itemsize(copy.dtype)
    for k in range(len(copy.blocks)):
        one = np.array([k])
        sizes = tuple(copy.blocks.sizes[k].tolist())
        offsets = tuple(copy.blocks.offsets[k].tolist())
        target = box(offsets, sizes)
        buffers = [np.zeros(int(target.counts[0]) * width, np.uint8) for _ in range(2)]
        only = LogicalTensor(copy.name, copy.state, copy.shape, copy.dtype, copy.blocks.take(one), copy.bases[one])
        for tensor, buffer in zip((original, only), buffers, strict=True):
            gather(opened.reader, [Want(tensor, target, copy.dtype)], [buffer])
        yield int(copy.blocks.buffers[k]), buffers[0], buffers[1]


def _finite(
    opened: Checkpoint, tensors: Sequence[LogicalTensor], notes: _Notes, advance: Callable[[int], None]
) -> None:
    bad: dict[int, tuple[int, int]] = {}
    for piece, raw in stream.each(opened, tensors):
        advance(len(raw))
        notes.checked["finite"] += len(raw)
        wrong = not_finite(raw, tensors[piece.index].dtype)
        if len(wrong):
            count, first = bad.get(piece.index, (0, piece.first + int(wrong[0])))
            bad[piece.index] = count + len(wrong), first
    for index, (count, first) in bad.items():
        tensor = tensors[index]
        at = np.unravel_index(first, tensor.shape) if tensor.shape else ()
        notes.add(
            "not-finite",
            f"{tensor.name}:{tensor.state}",
            f"{count} of {tensor.nbytes // itemsize(tensor.dtype)} values are infinite or not a number; the "
            f"first at {[int(i) for i in at]}",
        )
