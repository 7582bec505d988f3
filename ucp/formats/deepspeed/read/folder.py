"""The files of a DeepSpeed checkpoint folder: which rank wrote which, and whether all of them are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read import stems
from ucp.formats.deepspeed.read.names import EXPERT, EXPERT_OPTIM, MODEL, OPTIM
from ucp.formats.shared.unknown_objects import UnknownObjects, load_file
from ucp.storage import graphs, locations

# checkpoint/ds_to_universal.py: the parameters, each in a folder of its own.
_UNIVERSAL = "zero"
# What is noted of files' graphs that may be walked through.
_WALKED = "deepspeed: checked, to be walked through"

# runtime/engine.py: _common_checkpoint_state and _save_checkpoint. Everything else in the file is the caller's.
OWN_KEYS = frozenset(
    [
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "csr_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "universal_checkpoint_info",
        "num_experts",
        "ds_autoep_layers",
        "autoep_layers",
    ]
)

# What files of AutoEP say of tensor parallelism beside it (``checkpoint/constants.py: FOLDING_METADATA_KEY``).
FOLDING = "folding"

# _save_zero_checkpoint; older releases have more of the model file's.
OPTIMIZER_KEYS = OWN_KEYS | {"optimizer_state_dict", FOLDING}


@dataclass(frozen=True)
class Folder:
    """The files of one model-parallel rank, by data-parallel rank.

    mp: its number in the files' names.
    model: one file at stages 0 to 2 (key 0), one per rank at stage 3.
    experts: files with the weights of one expert each, by layer and the expert's number in it.
    expert_optim: stage 0's optimizer files, by expert-parallel rank.
    skip: leave objects of unknown classes out, as they were asked to be, of optimizer files, too.
    """

    path: Path
    mp: int
    model: Mapping[int, Path]
    optim: Mapping[int, Path]
    bf16: bool
    experts: Mapping[tuple[int, int], Path] = field(default_factory=dict)
    expert_optim: Mapping[int, Path] = field(default_factory=dict)
    skip: bool = False

    @property
    def partitioned_model(self) -> bool:
        """Whether every rank wrote a model file of its own (stage 3)."""
        return self.model[min(self.model)].name.startswith("zero_pp_rank_")

    @property
    def model_pattern(self) -> str:
        """The names of this part's model files, ``{}`` for the data-parallel rank."""
        return f"zero_pp_rank_{{}}_mp_rank_{self.mp:02d}_model_states.pt"

    @property
    def optim_pattern(self) -> str:
        """The names of this part's optimizer files, ``{}`` for the data-parallel rank."""
        return f"{'bf16_' if self.bf16 else ''}zero_pp_rank_{{}}_mp_rank_{self.mp:02d}_optim_states.pt"


def scan(path: Path, skip: bool = False) -> list[Folder]:
    """Find the files, those of model-parallel rank 0 first. skip: as in `Folder`.

    Raises Unsupported for what is not understood, DamagedCheckpoint for a folder without a model file, with files of
    both stage 3 and other stages, or without the files of some model-parallel rank.
    """
    if locations.is_folder(path / _UNIVERSAL) and not any(map(OPTIM.match, locations.names(path))):
        raise Unsupported(
            f"{path}: is DeepSpeed's own universal checkpoint (it has a folder '{_UNIVERSAL}'), which is written here "
            "(--to deepspeed-universal) and not read; take the checkpoint that it was made from"
        )
    found = sort_files(path)
    _check(path, found)
    found = _numbered_by_sequences(found)
    models: Mapping[int, Mapping[int, Path]] = found.parts or {mp: {0: file} for mp, file in found.whole.items()}
    ranks = sorted({0, *models, *found.optim})
    lost = next((mp for mp in range(ranks[-1] + 1) if mp not in models), None)
    if lost is not None:
        raise DamagedCheckpoint(
            f"{path}: there are files of model-parallel rank {ranks[-1]}, but no model file of rank {lost} "
            f"('*mp_rank_{lost:02d}_model_states.pt'); the checkpoint is incomplete"
        )
    return [replace(found.folder(path, mp), skip=skip) for mp in ranks]


@dataclass
class Sorted:
    """A folder's files, each kind by model-parallel rank.

    whole: model files of stages 0 to 2.
    parts: model files of stage 3, by data-parallel rank.
    prefixes: whether optimizer files begin with ``bf16_``.
    """

    whole: dict[int, Path] = field(default_factory=dict)
    parts: dict[int, dict[int, Path]] = field(default_factory=dict)
    optim: dict[int, dict[int, Path]] = field(default_factory=dict)
    experts: dict[int, dict[tuple[int, int], Path]] = field(default_factory=dict)
    expert_optim: dict[int, dict[int, Path]] = field(default_factory=dict)
    prefixes: set[bool] = field(default_factory=set)

    def folder(self, path: Path, mp: int) -> Folder:
        """The files of one model-parallel rank, which has a model file."""
        return Folder(
            path,
            mp,
            self.parts[mp] if self.parts else {0: self.whole[mp]},
            self.optim.get(mp, {}),
            self.prefixes == {True},
            self.experts.get(mp, {}),
            {} if mp in self.optim else self.expert_optim.get(mp, {}),
        )


def sort_files(path: Path) -> Sorted:
    """The files of a folder by their names. Raises Unsupported for those of a release that is not supported."""
    out = Sorted()
    for name in locations.names(path):
        if expert := EXPERT.match(name):
            if expert["layer"] is None:
                raise Unsupported(
                    f"{path}: '{name}' is of DeepSpeed before 0.5, whose experts' files are not supported"
                )
            out.experts.setdefault(int(expert["mp"]), {})[int(expert["layer"]), int(expert["expert"])] = path / name
        elif expert := EXPERT_OPTIM.match(name):
            out.expert_optim.setdefault(int(expert["mp"]), {})[int(expert["ep"])] = path / name
        elif optim := OPTIM.match(name):
            out.prefixes.add(bool(optim["bf16"]))
            out.optim.setdefault(int(optim["mp"]), {})[int(optim["dp"])] = path / name
        elif model := MODEL.match(name):
            if model["dp"] is None:
                out.whole[int(model["mp"])] = path / name
            else:
                out.parts.setdefault(int(model["mp"]), {})[int(model["dp"])] = path / name
    return out


def _check(path: Path, found: Sorted) -> None:
    """Raise DamagedCheckpoint if files are of two runs, or if there is no model file."""
    if found.whole and found.parts:
        some = found.parts[min(found.parts)]
        raise DamagedCheckpoint(
            f"{path}: holds both '{found.whole[min(found.whole)].name}' (stages 0 to 2) and "
            f"'{some[min(some)].name}' (stage 3); files of two checkpoints are mixed"
        )
    for mp in found.optim.keys() & found.expert_optim.keys():
        # Up to 0.17 at least, stages with ZeRO leave these files, too, with nothing in them.
        for file in found.expert_optim[mp].values():
            if load(file, trust=None).get("optimizer") is not None:
                raise DamagedCheckpoint(
                    f"{path}: holds both '{file.name}' with an optimizer (stage 0) and ZeRO's optimizer files; files "
                    "of two checkpoints are mixed"
                )
    if len(found.prefixes) > 1:
        raise DamagedCheckpoint(f"{path}: optimizer files with and without the prefix 'bf16_'; two runs are mixed")
    if not found.whole and not found.parts:
        raise DamagedCheckpoint(f"{path}: no '*model_states.pt' file; the model part of the checkpoint is missing")


def _numbered_by_sequences(found: Sorted) -> Sorted:
    """Files of sequence parallelism as those of one model-parallel rank, where their names have another.

    DeepSpeed's own mesh of sequences passes for one of model parallelism, in 0.18 when files are named, too
    (``parallel_state_sp.py: get_model_parallel_rank``): data-parallel rank 1 of two that share a sequence writes
    ``zero_pp_rank_1_mp_rank_01_…``, which that release itself does not find again. What tells it from model parallelism
    is that each data-parallel number is there once, and that the first model file says there was none.
    """
    first = found.whole.get(0) or found.parts.get(0, {}).get(0)
    of_several = len(found.optim.keys() | found.parts.keys()) > 1 and not found.whole.keys() - {0}
    numbers = [[dp for own in kind.values() for dp in own] for kind in (found.optim, found.parts)]
    if first is None or not of_several or any(len(set(kind)) < len(kind) for kind in numbers):
        return found
    if load(first, trust=None).get("mp_world_size") != 1:
        return found
    return replace(found, optim=_as_one(found.optim), parts=_as_one(found.parts))


def _as_one(files: Mapping[int, Mapping[int, Path]]) -> dict[int, dict[int, Path]]:
    return {0: {dp: file for own in files.values() for dp, file in own.items()}} if files else {}


def load(path: Path, trust: bool | None, skip: bool = False) -> dict[str, Any]:
    """The object graph of one file, which DeepSpeed always writes as a dict.

    trust: as for `reader.load_file`. skip: as for `unknown_objects.load_file`.

    Raises what reading a torch file raises. If the file was written under another file's name, that is noted
    (`stems`).
    """
    file = load_file(path, UnknownObjects(trust, skip))
    stems.check(path, file)
    found = file.graph
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path}: holds a {type(found).__name__} where DeepSpeed writes a dict")
    # The caller's own state is passed on as it is. Everything else is compared and walked through.
    if _WALKED not in file.passed:
        gone_through = {key: found[key] for key in found if "module" not in found or key in OWN_KEYS}
        graphs.check(str(path), found, gone_through)
        file.passed.add(_WALKED)
    return found


def check_ranks(what: str, files: Mapping[int, Path], dp: int, path: Path, pattern: str, said_by: Path) -> None:
    """Raise DamagedCheckpoint unless there is exactly one file for each of the ranks 0 to dp - 1."""
    count = dp - sum(0 <= r < dp for r in files)
    if count > 0:
        # This takes no more steps than there are files, since the number that a file says may be anything.
        missing = islice((r for r in range(dp) if r not in files), 5)
        names = ", ".join(pattern.format(r) for r in islice(missing, 4)) + (", …" if count > 4 else "")
        raise DamagedCheckpoint(
            f"{path}: {count} of {dp} {what} files are missing ({names}); '{said_by.name}' says that {dp} "
            "data-parallel ranks saved"
        )
    extra = sorted(r for r in files if r >= dp)
    if extra:
        raise DamagedCheckpoint(
            f"{files[extra[0]]}: there is a file of rank {extra[0]}, but '{said_by.name}' says that {dp} "
            "data-parallel ranks saved; files of two runs are mixed"
        )
