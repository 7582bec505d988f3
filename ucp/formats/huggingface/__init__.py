"""Hugging Face model folders: weights, with the config that says what they are of.

Read as a checkpoint that has weights and nothing else. Where the catalogue of specs knows the config's model_type, the
names are the module's own as transformers 5 has them, whatever the files call them, and tied parameters are one.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ucp import limits
from ucp.formats.base import PATH, SIZE, TEXT, Format, Option, WriteTarget

if TYPE_CHECKING:
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import FolderNames, ReadRequest, WriteRequest
    from ucp.storage.files import Files
    from ucp.transfer.targets import WritePlan

NAME = "huggingface"

# What tells a training checkpoint, or a folder of them, that has weights for other programs beside it: DeepSpeed's as
# Hugging Face's Trainer leaves them, and a universal one that has lost its manifest.
_TRAINING = re.compile(r"latest|latest_universal|ucp\.json|global_step.*|optimizer\..*\.safetensors(\.index\.json)?")

# The same weights for other programs, and the arguments that the Trainer was started with.
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5,}-of-\d{5,})?\.(safetensors|bin)|(consolidated|openvino_model|sentencepiece|spiece)"
    r"\b.*|training_args\.bin"
)


# What torch's HuggingFaceStorageWriter leaves of each rank.
_SHARD = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")


class HuggingFaceTarget(WriteTarget):
    """The weights alone, as a model folder."""

    name = NAME
    also = ("hf", "transformers", "safetensors")
    options = (
        Option("dtype", TEXT, "element type of the weights: bf16, fp16, fp32", "T"),
        Option("max_shard_size", SIZE, "of a file of weights, such as 5GB", "SIZE"),
        Option(
            "like",
            PATH,
            "model folder to carry config, tokenizer and generation files from; a PEFT adapter's for an adapter",
            "FOLDER",
        ),
    )

    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        from ucp.formats.huggingface import writer
        from ucp.transfer.targets import WritePlan

        options = request.options
        like = _model_folder(request)
        source, files = writer.plan(
            catalog,
            dtype=options.get("dtype"),
            max_shard=options.get("max_shard_size", limits.SHARD_FILE_BYTES),
            like=like,
            choice=request.choice,
            plain=like == request.source and request.source_format == NAME,
        )
        return WritePlan(source, tuple(files))


def _model_folder(request: WriteRequest) -> Path | None:
    """The folder to carry files from: the one given, else the source where it is a model's."""
    from pathlib import Path

    from ucp.storage import configs, locations

    like = request.options.get("like")
    if like is not None:
        return Path(os.path.abspath(like))
    is_one = request.source_format == NAME and locations.is_file(request.source / configs.MODEL)
    return request.source if is_one else None


class HuggingFace(Format):
    name = NAME
    sign = "a Hugging Face model folder 'model.safetensors' or an index of several"
    resumable = False
    targets = (HuggingFaceTarget(),)

    def detect(self, folder: FolderNames) -> bool:
        """Whether it has weight files, and is no training checkpoint or folder of them besides."""
        from ucp.formats.huggingface.folder import KINDS

        weights = folder.any_name(_SHARD) or any(
            folder.has_file(name) for kind in KINDS for name in (kind.single, kind.index)
        )
        return weights and not folder.any_name(_TRAINING)

    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        from ucp.formats.huggingface import reader

        return reader.read(path, files, request.choice)

    def knows(self, name: str) -> bool:
        return _WEIGHTS.fullmatch(name) is not None or _SHARD.fullmatch(name) is not None


FORMAT = HuggingFace()
