"""The files of a DeepSpeed checkpoint folder: which rank wrote which, and whether they all are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.deepspeed.read import stems
from ucp.formats.deepspeed.read.names import EXPERT, EXPERT_OPTIM, MODEL, OPTIM
from ucp.storage import locations
from ucp.storage.torch_pt import reader

# checkpoint/ds_to_universal.py: the parameters, each in a folder of its own.
_UNIVERSAL = "zero"


@dataclass(frozen=True)
class Folder:
    """The files of one model-parallel rank, by data-parallel rank.

    mp: its number in the files' names. model: one file at stages 0 to 2 (key 0), one per rank at stage 3.
    experts: the weights of one expert each, by layer and the expert's number in it. expert_optim: stage 0's optimizer
    files, by expert-parallel rank.
    """

    path: Path
    mp: int
    model: Mapping[int, Path]
    optim: Mapping[int, Path]
    bf16: bool
    experts: Mapping[tuple[int, int], Path] = field(default_factory=dict)
    expert_optim: Mapping[int, Path] = field(default_factory=dict)

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


def scan(path: Path) -> list[Folder]:
    """Find the files, those of model-parallel rank 0 first.

    Raises Unsupported for what is not understood, DamagedCheckpoint for a folder without a model file, with files of
    both stage 3 and other stages, or without the files of some model-parallel rank.
    """
    if locations.is_folder(path / _UNIVERSAL) and not any(map(OPTIM.match, locations.names(path))):
        raise Unsupported(
            f"{path}: is DeepSpeed's own universal checkpoint (it has a folder '{_UNIVERSAL}'), which is written here "
            "(--to deepspeed-universal) and not read; take the checkpoint that it was made from"
        )
    whole: dict[int, Path] = {}
    parts: dict[int, dict[int, Path]] = {}
    optim: dict[int, dict[int, Path]] = {}
    experts: dict[int, dict[tuple[int, int], Path]] = {}
    expert_optim: dict[int, dict[int, Path]] = {}
    prefixes: set[bool] = set()
    for name in locations.names(path):
        if expert := EXPERT.match(name):
            if expert["layer"] is None:
                raise Unsupported(
                    f"{path}: '{name}' is of DeepSpeed before 0.5, whose experts' files are not supported"
                )
            experts.setdefault(int(expert["mp"]), {})[int(expert["layer"]), int(expert["expert"])] = path / name
        elif expert := EXPERT_OPTIM.match(name):
            expert_optim.setdefault(int(expert["mp"]), {})[int(expert["ep"])] = path / name
        model, opt = MODEL.match(name), OPTIM.match(name)
        found = model or opt
        if not found:
            continue
        mp = int(found["mp"])
        if opt:
            prefixes.add(bool(opt["bf16"]))
            optim.setdefault(mp, {})[int(opt["dp"])] = path / name
        elif found["dp"] is None:
            whole[mp] = path / name
        else:
            parts.setdefault(mp, {})[int(found["dp"])] = path / name
    if whole and parts:
        some = parts[min(parts)]
        raise DamagedCheckpoint(
            f"{path}: holds both '{whole[min(whole)].name}' (stages 0 to 2) and '{some[min(some)].name}' (stage 3); "
            "files of two checkpoints are mixed"
        )
    if len(prefixes) > 1:
        raise DamagedCheckpoint(f"{path}: optimizer files with and without the prefix 'bf16_'; two runs are mixed")
    if not whole and not parts:
        raise DamagedCheckpoint(f"{path}: no '*model_states.pt' file; the model part of the checkpoint is missing")
    models: Mapping[int, Mapping[int, Path]] = parts or {mp: {0: file} for mp, file in whole.items()}
    ranks = sorted({0, *models, *optim})
    lost = [mp for mp in range(ranks[-1] + 1) if mp not in models]
    if lost:
        raise DamagedCheckpoint(
            f"{path}: there are files of model-parallel rank {ranks[-1]}, but no model file of rank {lost[0]} "
            f"('*mp_rank_{lost[0]:02d}_model_states.pt'); the checkpoint is incomplete"
        )
    return [
        Folder(
            path, mp, models[mp], optim.get(mp, {}), prefixes == {True}, experts.get(mp, {}), expert_optim.get(mp, {})
        )
        for mp in ranks
    ]


def load(path: Path, trust: bool) -> dict[str, Any]:
    """The object graph of one file, which DeepSpeed always writes as a dict.

    Raises DamagedCheckpoint where the file was written under another one's name, and what reading a torch file raises.
    """
    file = reader.load_file(path, trust=trust)
    stems.check(path, file)
    found = file.graph
    if not isinstance(found, dict):
        raise DamagedCheckpoint(f"{path}: holds a {type(found).__name__} where DeepSpeed writes a dict")
    return found


def check_ranks(what: str, files: Mapping[int, Path], dp: int, path: Path, pattern: str, said_by: Path) -> None:
    """Raise DamagedCheckpoint unless there is exactly one file for each of the ranks 0 to dp - 1."""
    missing = [r for r in range(dp) if r not in files]
    if missing:
        names = ", ".join(pattern.format(r) for r in missing[:4]) + (", …" if len(missing) > 4 else "")
        raise DamagedCheckpoint(
            f"{path}: {len(missing)} of {dp} {what} files are missing ({names}); '{said_by.name}' says that {dp} "
            "data-parallel ranks saved"
        )
    extra = sorted(r for r in files if r >= dp)
    if extra:
        raise DamagedCheckpoint(
            f"{files[extra[0]]}: there is a file of rank {extra[0]}, but '{said_by.name}' says that {dp} "
            "data-parallel ranks saved; files of two runs are mixed"
        )
