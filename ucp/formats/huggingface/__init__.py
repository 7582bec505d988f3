"""Hugging Face model folders: weights, with the config that says what they are of.

Read as a checkpoint that has weights and nothing else. Where the catalogue of specs knows the config's model_type, the
names are the module's own as transformers 5 has them, whatever the files call them, and tied parameters are one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, TrainingState
from ucp.formats.deepspeed.build import Builder
from ucp.formats.huggingface import folder as folders
from ucp.formats.huggingface.names import FRAMEWORK, tie, with_prefix
from ucp.formats.rename import rename
from ucp.parallel.mesh import Layout
from ucp.spec.choice import Choice
from ucp.storage import locations
from ucp.storage.files import Files

NAME = "huggingface"

# What tells a training checkpoint, or a folder of them, that has weights for other programs beside it: DeepSpeed's as
# Hugging Face's Trainer leaves them, and a universal one that has lost its manifest.
_TRAINING = re.compile(r"latest|latest_universal|ucp\.json|global_step.*|optimizer\..*\.safetensors(\.index\.json)?")


def detect(path: Path) -> bool:
    """Whether this folder has weight files, and is no training checkpoint or folder of them besides."""
    if not any(kind.in_folder(path) for kind in folders.KINDS):
        return False
    return not any(_TRAINING.fullmatch(name) for name in locations.names(path))


def read(path: Path, files: Files, choice: Choice | None = None) -> Catalog:
    """The catalog of a folder. choice: the spec and config to use instead of the folder's own.

    Raises DamagedCheckpoint for missing, truncated or contradicting files, Unsupported and UnsafePickle as reading
    them does, SpecError and Mismatch where the spec does not fit the tensors.
    """
    path = locations.locate(path)
    config = folders.read_config(path)
    builder = Builder(files)
    for name, ref in folders.weights(path).items():
        builder.add(name, "frozen", [builder.whole(name, "param", ref)])
    catalog = Catalog(
        format=NAME,
        writer=_writer(config),
        layout=Layout(),
        files=tuple(builder.sources),
        parameters=builder.parameters,
        tensors=builder.tensors,
        training_state=TrainingState(),
    )
    bound = (choice or Choice()).bound(config)
    if bound is not None:
        catalog = with_prefix(catalog, bound)
        catalog = rename(catalog, bound, FRAMEWORK, to_framework=False, keep=True)
        catalog = tie(catalog, bound, files)
    catalog.check()
    return catalog


def _writer(config: Mapping[str, Any] | None) -> str:
    version = (config or {}).get("transformers_version")
    return f"transformers {version}" if version else "transformers of unknown version"
