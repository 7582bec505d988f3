"""The files beside the weights: carried over, as they are, from a folder of the same model."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.errors import BadArgument, Unsupported
from ucp.formats.huggingface.quantized import METHODS
from ucp.storage import configs, locations
from ucp.transfer.targets import TargetFile

ADAPTER_CONFIG = "adapter_config.json"

# Config, generation, tokenizer and processor files, chat templates, the model's own code.
_CARRIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".spm", ".bpe", ".py")
_LEFT = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")

# Element types of weights. Later ones hold all values of those before them.
_WIDTHS = (("bfloat16", "float16"), ("float32",), ("float64",))


def config_of(like: Path, plain: bool = False) -> dict[str, Any]:
    """The folder's config.json. plain: without what it says of quantised weights, which were read as plain ones.

    Raises BadArgument if there is none, Unsupported for that of a quantized model.
    """
    path = like / configs.MODEL
    found = dict(configs.read(path, BadArgument))
    said = found.get("quantization_config")
    if plain and isinstance(said, Mapping) and said.get("quant_method") in METHODS:
        del found["quantization_config"]
    elif said is not None:
        raise Unsupported(
            f"{path}: is of a quantized model ('quantization_config'); the weights to write are plain ones"
        )
    return found


def carried(like: Path, config: dict[str, Any] | None, dtypes: Collection[str]) -> list[TargetFile]:
    """The files to carry. config: the folder's, to be written with the ``dtype`` of the weights; None to leave it out.

    dtypes: element types of the weights that are written.
    """
    out = []
    for path in sorted(like.iterdir()):
        if not path.is_file() or path.suffix not in _CARRIED or path.name in (*_LEFT, "ucp.json"):
            continue
        if (
            path.name.endswith(".index.json")
            or path.name.startswith("adapter_")
            or path.stat().st_size > limits.CARRIED_FILE_BYTES
        ):
            continue
        if path.name == configs.MODEL:
            if config is not None:
                out.append(literal(configs.MODEL, _with_dtype(path, config, dtypes)))
        else:
            out.append(literal(path.name, locations.read(path)))
    return out


def literal(name: str, raw: bytes) -> TargetFile:
    """A file whose bytes are known."""
    return TargetFile(name, len(raw), ((0, raw),), ())


def _with_dtype(path: Path, config: dict[str, Any], dtypes: Collection[str]) -> bytes:
    """The config's bytes, with the element type that loses nothing of the weights: transformers loads them in that."""
    widest = [group for group in _WIDTHS if any(name in dtypes for name in group)]
    same = configs.read(path) == config
    if not widest and same:
        return locations.read(path)
    if not widest:
        return _written(config)
    last = [name for name in widest[-1] if name in dtypes]
    dtype = last[0] if len(last) == 1 else "float32"
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if same and config.get(key) == dtype:
        return locations.read(path)
    return _written({**config, key: dtype})


def _written(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"
