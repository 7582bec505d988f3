"""What lies in or around a checkpoint's folder and is not read, though it looks like training state.

A format says which names it reads, or knows to hold nothing of a training run (`Format.knows`). Frameworks may keep
more: Hugging Face's Trainer and Accelerate keep an optimizer, schedulers and random generators, and Lightning keeps a
file of its loops. Such files are named whenever a checkpoint is opened, so that nobody takes a part for the whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ucp import formats
from ucp.catalog import Catalog
from ucp.formats.base import Format
from ucp.storage import locations

# Files that hold tensors or pickles may hold training state, whatever they are called.
_ANY_STATE = re.compile(r".+\.(pt|pth|bin|ckpt|pkl|pickle|distcp|safetensors)")
# Names that frameworks give it, as files or folders: transformers trainer.py, accelerate utils/constants.py,
# lightning fabric/strategies/fsdp.py.
_NAMED = re.compile(
    r"trainer_state\.json|training_args\.bin|meta\.pt|scaler\.pt|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?"
    r"(_rank\d+)?(\.(pt|bin))?|(rng_state|random_states)(_\d+)?\.(pth|pkl)|custom_checkpoint_\d+\.pkl"
    r"|pytorch_model_fsdp(_\d+)?(_rank\d+)?(\.bin)?|dist_optimizer|global_step\d+"
)
_PART = re.compile(r"(pytorch_model_fsdp|optimizer|model|optim|dist_optimizer)(_\d+)?")
# Folders of installed packages by their own names, and what lies in the folder of a virtual or conda's environment.
_INSTALLED = frozenset(("site-packages", "dist-packages", "node_modules"))
_ENVIRONMENT = frozenset(("pyvenv.cfg", "conda-meta"))


def unread(path: Path, known: Format, catalog: Catalog) -> tuple[str, ...]:
    """Names in the checkpoint's folder that look like training state but were not read, sorted."""
    read = {file.path for file in catalog.files}
    found = []
    for name in _names(path):
        if known.knows(name) or str(path / name) in read:
            continue
        if _NAMED.fullmatch(name) or (_ANY_STATE.fullmatch(name) and locations.is_file(path / name)):
            found.append(name)
    return tuple(found)


def around(path: Path, format_name: str) -> tuple[str, ...]:
    """Names beside the checkpoint's folder under which frameworks keep training state of the same checkpoint, and that
    were not read with it."""
    own_kind = is_part(path.name)
    known = formats.named(format_name)
    read = [] if known is None else [other for other, folder in formats.completing(path, known) if folder is not None]
    return tuple(
        name
        for name in _names(path.parent)
        if name != path.name
        and not any(other.knows(name) for other in read)
        and not name.startswith("global_step")
        and (_NAMED.fullmatch(name) or (own_kind and is_part(name)))
    )


def is_state(name: str) -> bool:
    """Whether frameworks use this name for a file of training state that is not a checkpoint by itself."""
    return _NAMED.fullmatch(name) is not None


def is_part(name: str) -> bool:
    """Whether frameworks use this name for a folder that holds a part of a checkpoint: Accelerate's FSDP plugin, and
    programs that follow torch's examples."""
    return _PART.fullmatch(name) is not None


def is_installed(name: str, inside: Collection[str]) -> bool:
    """Whether a folder of this name, with these in it, has installed packages, which bring files such as ``*.pth``."""
    return name in _INSTALLED or not _ENVIRONMENT.isdisjoint(inside)


def sentence(names: tuple[str, ...], where: str) -> str:
    """The sentence that names these files. where: 'in it' or 'beside it'."""
    shown = ", ".join(f"'{name}'" for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"not read, though training state is kept under such names: {shown}, {where}"


def _names(folder: Path) -> list[str]:
    try:
        return locations.names(folder)
    except OSError:
        return []  # reading will say what is wrong there
