"""Hugging Face Trainer's ``checkpoint-N``: a model, its optimizer, scheduler, generators and ``trainer_state.json``.

Names: transformers ``trainer.py: _save_checkpoint``. The model is a model folder's, or what Accelerate writes under
FSDP. Under DeepSpeed the file ``latest`` names DeepSpeed's own folder in it, which is taken then, with what the Trainer
keeps beside it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ucp.formats.base import Format
from ucp.formats.shared.options import PARAM_NAMES, PARAM_SHAPES, SKIP_UNKNOWN_OBJECTS, TRUST_CLIENT_STATE

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest
    from ucp.storage.files import Files

NAME = "trainer"
STATE = "trainer_state.json"
_READ = re.compile(
    r"trainer_state\.json|optimizer(_0)?(\.pt|\.bin)?|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|pytorch_model_fsdp(_0)?(\.bin)?|(model|pytorch_model)(-\d{5,}-of-\d{5,})?\.(safetensors|bin)"
    r"|adapter_model\.(safetensors|bin)"
)


class Trainer(Format):
    name = NAME
    sign = f"a Trainer's '{STATE}' beside a model"
    parts = ("huggingface", "accelerate", "dcp")
    completes = ("deepspeed", "universal")
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, PARAM_NAMES, PARAM_SHAPES)

    def detect(self, folder: FolderNames) -> bool:
        """Whether the Trainer's state is in it, and no pointer to another program's checkpoint."""
        return folder.has_file(STATE) and not folder.has_file("latest")

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.trainer import reader

        return reader.read(path, files, request)

    def keeps_beside(self, folder: FolderNames) -> bool:
        return folder.has_file(STATE)

    def complete(self, catalog: Catalog, beside: FolderNames | None, request: ReadRequest) -> Catalog:
        if beside is None:
            return catalog
        from ucp.formats.trainer import reader

        return reader.complete(catalog, beside, request)

    def step(self, path: Path) -> int | None:
        from ucp.errors import UcpError
        from ucp.formats.trainer import reader

        try:
            return reader.step_of(reader.state_of(path))
        except UcpError:
            return None  # opening it says what is wrong

    def knows(self, name: str) -> bool:
        return _READ.fullmatch(name) is not None


FORMAT = Trainer()
