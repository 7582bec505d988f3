"""Reading a Hugging Face model folder, under the module's own names where a spec knows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.catalog import Catalog, TrainingState
from ucp.formats.huggingface import NAME, quantized, sharded
from ucp.formats.huggingface.folder import in_folder, weights
from ucp.formats.huggingface.from_config import FRAMEWORK, tie, with_prefix
from ucp.formats.shared.builder import Builder
from ucp.formats.shared.renaming import rename
from ucp.parallel.mesh import Layout
from ucp.printable import logger
from ucp.spec.select import Choice
from ucp.storage import configs, locations
from ucp.storage.crc32 import in_order
from ucp.storage.files import Files

log = logger(__name__)


def read(path: Path, files: Files, choice: Choice | None = None, builder: Builder | None = None) -> Catalog:
    """The catalog of a folder.

    choice: the spec and config to use instead of the folder's own.
    builder: of a checkpoint that the weights are a part of; it keeps their files.

    Raises DamagedCheckpoint for missing, truncated or contradicting files, Unsupported and UnsafePickle as reading
    them does, SpecError and Mismatch where the spec does not fit the tensors.
    """
    path = locations.locate(path)
    config = configs.of_model(path)
    builder = builder or Builder(files)
    shards = {} if in_folder(path) else sharded.parts(path)
    for name, held in shards.items():
        builder.add(name, "frozen", [sharded.tensor(name, held, builder)])
    refs = {} if shards else weights(path)
    packed = quantized.find(path, refs, config)
    codes = quantized.left_out(packed, refs)
    for name, ref in refs.items():
        if name not in packed and name not in codes:
            builder.add(name, "frozen", [builder.whole(name, "param", ref)])
    computed = quantized.add(packed, config, builder) if packed else {}
    catalog = Catalog(
        format=NAME,
        writer=_writer(config),
        layout=Layout(),
        files=tuple(builder.sources),
        parameters=builder.parameters,
        tensors=builder.tensors,
        training_state=TrainingState(),
        crc_records=in_order(builder.records),
        computed=computed,
        unchecked=_unchecked(path, shards),
    )
    bound = (choice or Choice()).bound(config)
    if bound is not None:
        catalog = with_prefix(catalog, bound)
        catalog = rename(catalog, bound, FRAMEWORK, to_framework=False, keep=True)
        catalog = tie(catalog, bound, files)
    catalog.check()
    return catalog


def _unchecked(path: Path, shards: Mapping[str, Any]) -> tuple[str, ...]:
    if not shards:
        return ()
    sentence = (
        "nothing says how many ranks wrote these shards: that the last ones' files are missing would show only as a "
        "hole in a tensor"
    )
    log.warning("%s: %s", path, sentence)
    return (sentence,)


def _writer(config: Mapping[str, Any] | None) -> str:
    version = (config or {}).get("transformers_version")
    return f"transformers {version}" if version else "transformers of unknown version"
