"""Merging LoRA adapters: PEFT adapter folders of one base model into one.

An adapter adds ``s B A`` to a weight, with ``s = alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised ones). The
product of a mean A and a mean B is not the mean of the products, so there are three ways. *factors* averages A and B
separately, as PEFT's own linear combination does. *concat* stacks them, which is exact; the result's rank is the sum of
the ranks. *delta* takes the weighted sum of the products, factors it again by truncated singular values, and reports
the error of this.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ucp.errors import BadArgument, Mismatch, NotACheckpoint, Unsupported
from ucp.storage import configs, locations
from ucp.storage.atomic import staged
from ucp.storage.numbers import FLOATS, Numbers, as_bytes, as_numbers, common_dtype
from ucp.storage.safetensors import plan_file, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WAYS = ("factors", "delta", "concat")
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Keys that have to be equal, since they say what an adapter belongs to. The rest of the config is the first one's.
_ALIKE = ("base_model_name_or_path", "target_modules", "fan_in_fan_out", "use_rslora", "bias", "modules_to_save")


@dataclass(frozen=True)
class AdapterReport:
    """What was merged. rank: the result's. errors: for 'delta', module -> relative error of its weight's change, in the
    Frobenius norm."""

    destination: str
    way: str
    weights: tuple[float, ...]
    rank: int
    modules: int
    errors: Mapping[str, float]

    def __str__(self) -> str:
        worst = f", relative error at most {max(self.errors.values()):.3g}" if self.errors else ""
        return f"wrote {self.destination}: {self.modules} modules of rank {self.rank}, by {self.way}{worst}"


def merge_adapters(
    sources: Sequence[str | os.PathLike[str]],
    dest: str | os.PathLike[str],
    way: str = "concat",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> AdapterReport:
    """Merge PEFT LoRA adapter folders into one; the result's change of a weight is ``sum w_i s_i B_i A_i``.

    Parameters
    ----------
    sources
        Adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.
    dest
        A folder that does not exist yet.
    way
        'factors', 'delta' or 'concat', as in the module's docstring.
    weights
        One number for each source. The default is the mean of the sources.
    rank
        For 'delta' only: the result's rank. The default is the first source's.

    Raises
    ------
    BadArgument
        If there are no sources, or if way, weights or rank are wrong.
    Mismatch
        If the adapters differ in modules, shapes or bases. By factors, also if they differ in ranks or scales.
    Unsupported
        For adapters that are not plain LoRA of linear layers.
    """
    if way not in WAYS:
        raise BadArgument(f"adapters are merged by {', '.join(WAYS)}, found '{way}'")
    if rank is not None and (way != "delta" or rank < 1):
        raise BadArgument(f"a rank is at least 1, and for 'delta' only, found {rank} for '{way}'")
    adapters = [_Adapter.read(Path(source)) for source in sources]
    if not adapters:
        raise BadArgument("there is no adapter to merge; name at least one")
    shares = tuple(weights) if weights is not None else (1.0 / len(adapters),) * len(adapters)
    if len(shares) != len(adapters) or not all(map(math.isfinite, shares)):
        raise BadArgument(f"{len(shares)} weights were given for {len(adapters)} adapters; give a finite one for each")
    _check_alike(adapters, way)
    tensors, new_rank, errors = _combined(adapters, shares, way, rank)
    first = adapters[0]
    config = dict(first.config)
    if way != "factors":  # the scale is in the factors then, and the adapter's own is 1
        config.update(r=new_rank, lora_alpha=math.sqrt(new_rank) if config.get("use_rslora") else new_rank)
    _write(Path(dest), tensors, config, common_dtype([each.dtype for each in adapters]))
    modules = sum(name.endswith(_A) for name in tensors)
    return AdapterReport(os.fspath(dest), way, shares, new_rank, modules, errors)


def _combined(
    adapters: Sequence[_Adapter], shares: Sequence[float], way: str, rank: int | None
) -> tuple[dict[str, Numbers], int, dict[str, float]]:
    """The result's tensors, its rank, and each module's error."""
    first = adapters[0]
    out: dict[str, Numbers] = {}
    errors: dict[str, float] = {}
    new_rank = first.rank
    for module in sorted(name.removesuffix(_A) for name in first.tensors if name.endswith(_A)):
        pairs = [(each.tensors[module + _A], each.tensors[module + _B], each.scale) for each in adapters]
        if way == "factors":
            a, b = (sum(w * pair[k] for w, pair in zip(shares, pairs, strict=True)) for k in (0, 1))
        else:
            a = np.concatenate([pair[0] for pair in pairs])
            b = np.concatenate([w * s * b_ for w, (_, b_, s) in zip(shares, pairs, strict=True)], axis=1)
            if way == "delta":
                a, b, errors[module.removeprefix(_PREFIX)] = _truncated(a, b, rank or first.rank)
            new_rank = len(a)
        out[module + _A], out[module + _B] = np.asarray(a), np.asarray(b)
    for name in sorted(set(first.tensors) - set(out)):
        out[name] = np.asarray(sum(w * each.tensors[name] for w, each in zip(shares, adapters, strict=True)))
    return out, new_rank, errors


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Numbers]
    dtype: str

    @classmethod
    def read(cls, folder: Path) -> _Adapter:
        config = configs.read(folder / CONFIG, NotACheckpoint)
        if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("rank_pattern"):
            raise Unsupported(
                f"{folder / CONFIG}: only plain LoRA of one rank is merged, found peft_type {config.get('peft_type')}"
            )
        if type(config.get("r")) is not int or not isinstance(config.get("lora_alpha"), (int, float)):
            raise Mismatch(f"{folder / CONFIG}: needs a rank 'r' and a 'lora_alpha', found {config.get('r')!r}")
        header = read_header(folder / WEIGHTS)
        tensors, found = {}, []
        with locations.opened(folder / WEIGHTS) as stream:
            for name, ref in header.tensors.items():
                if ref.dtype not in FLOATS:
                    raise Unsupported(f"{folder / WEIGHTS}: '{name}' is {ref.dtype}; adapters are merged as floats")
                stream.seek(ref.offset)
                raw = np.frombuffer(stream.read(ref.nbytes), np.uint8)
                tensors[name] = as_numbers(raw, ref.dtype).reshape(ref.shape)
                if not np.isfinite(tensors[name]).all():
                    raise Mismatch(f"{folder / WEIGHTS}: '{name}' has NaN or infinity; leave that adapter out")
                found.append(ref.dtype)
        return cls(folder, config, tensors, common_dtype(found or ["float32"]))

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        rank = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return float(self.config["lora_alpha"]) / rank


def _check_alike(adapters: Sequence[_Adapter], way: str) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        for key in _ALIKE:
            one, two = first.config.get(key), other.config.get(key)
            if (sorted(one) if isinstance(one, list) else one) != (sorted(two) if isinstance(two, list) else two):
                raise Mismatch(f"{key} is {one} in '{first.folder}' and {two} in '{other.folder}'; merge like adapters")
        for name in sorted(set(first.tensors) ^ set(other.tensors)):
            raise Mismatch(f"'{name}' is not in both '{first.folder}' and '{other.folder}'; merge like adapters")
        if way == "factors" and (first.rank, first.scale) != (other.rank, other.scale):
            raise Mismatch(
                f"'{first.folder}' has rank {first.rank} and scale {first.scale:g}, '{other.folder}' {other.rank} and "
                f"{other.scale:g}; factors can't be averaged: merge by delta or concat"
            )
        for name, tensor in first.tensors.items():
            axis = 1 if name.endswith(_A) else 0 if name.endswith(_B) else None
            one, two = (t.shape if axis is None else (t.shape[axis],) for t in (tensor, other.tensors[name]))
            if tensor.ndim != other.tensors[name].ndim or one != two:
                raise Mismatch(
                    f"'{name}' is {list(tensor.shape)} in '{first.folder}' and {list(other.tensors[name].shape)} in "
                    f"'{other.folder}'; merge adapters of one base"
                )
    for name, tensor in first.tensors.items():
        if name.endswith((_A, _B)) and tensor.ndim != 2:
            raise Unsupported(f"'{name}' has {tensor.ndim} dimensions; adapters of linear layers are merged")


def _truncated(a: Numbers, b: Numbers, rank: int) -> tuple[Numbers, Numbers, float]:
    """The best approximation of ``b @ a`` of that rank, and its relative error."""
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, values, v = np.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    new_b, new_a = np.zeros((len(b), rank)), np.zeros((rank, a.shape[1]))
    new_b[:, :kept] = (q_b @ u[:, :kept]) * root
    new_a[:kept] = root[:, None] * (v[:kept] @ q_a.T)
    norm = float(np.linalg.norm(values))
    return new_a, new_b, float(np.linalg.norm(values[kept:])) / norm if norm else 0.0


def _write(dest: Path, tensors: Mapping[str, Numbers], config: Mapping[str, Any], dtype: str) -> None:
    layout = plan_file([(name, dtype, tensor.shape) for name, tensor in tensors.items()], {"format": "pt"})
    with staged(dest, needed_bytes=layout.size) as part:
        raw = bytearray(layout.size)
        raw[: len(layout.header)] = layout.header
        for name, tensor in tensors.items():
            encoded = as_bytes(tensor.reshape(-1), dtype).tobytes()
            raw[layout.offsets[name] : layout.offsets[name] + len(encoded)] = encoded
        (part / WEIGHTS).write_bytes(raw)
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
