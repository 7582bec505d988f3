"""What Accelerate's ``save_state`` leaves, read as one checkpoint: model, optimizers, schedulers, generators, samplers.

The names are from accelerate ``checkpointing.py: save_accelerator_state`` and ``utils/fsdp_utils.py``. Without FSDP,
and with its FULL_STATE_DICT, model and optimizers are files. With SHARDED_STATE_DICT each is a folder by
torch.distributed, or one file for each rank. Under DeepSpeed the model's folder is DeepSpeed's own, and found as such;
what ``save_state`` keeps beside it is read with it.
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

NAME = "accelerate"
STATES = re.compile(r"random_states_(\d+)\.pkl")
_FSDP = re.compile(r"pytorch_model_fsdp(_\d+)?(_rank\d+)?\.bin")
_FSDP_FOLDER = re.compile(r"pytorch_model_fsdp_\d+")
_READ = re.compile(
    r"random_states_\d+\.pkl|pytorch_model_fsdp(_\d+)?(_rank\d+)?(\.bin)?|optimizer(_\d+)?(_rank\d+)?(\.bin)?"
    r"|(scheduler|sampler|dl_state_dict)(_\d+)?\.bin|scaler\.pt|custom_checkpoint_\d+\.pkl"
    r"|(model|pytorch_model)(-\d{5,}-of-\d{5,})?\.(safetensors|bin)"
)


class Accelerate(Format):
    name = NAME
    sign = "Accelerate's 'random_states_0.pkl' or 'pytorch_model_fsdp_0'"
    parts = ("huggingface", "dcp")
    completes = ("deepspeed", "universal")
    read_options = (TRUST_CLIENT_STATE, SKIP_UNKNOWN_OBJECTS, PARAM_NAMES, PARAM_SHAPES)

    def detect(self, folder: FolderNames) -> bool:
        """Whether it has Accelerate's files, with the model in a form that is not another program's folder."""
        from ucp.storage import locations

        if folder.any_name(_FSDP):
            return True
        sharded = [name for name in folder.names if _FSDP_FOLDER.fullmatch(name)]
        if any(locations.is_file(folder.path / name / ".metadata") for name in sharded):
            return True
        return folder.any_name(STATES) and any(
            folder.has_file(name)
            for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "optimizer.bin")
        )

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.accelerate import reader

        return reader.read(path, files, request)

    def keeps_beside(self, folder: FolderNames) -> bool:
        return folder.any_name(STATES)

    def complete(self, catalog: Catalog, beside: FolderNames | None, request: ReadRequest) -> Catalog:
        if beside is None:
            return catalog
        from ucp.formats.accelerate import reader

        return reader.complete(catalog, beside, request)

    def knows(self, name: str) -> bool:
        return _READ.fullmatch(name) is not None


FORMAT = Accelerate()
