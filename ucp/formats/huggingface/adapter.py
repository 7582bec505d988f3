"""A PEFT adapter folder: what a run that trains LoRA adapters adds to its base model, and nothing else.

Source of the names: peft's ``tuners/tuners_utils.py`` (``_get_adapter_state_dict`` and what it calls),
``tuners/lora/model.py`` and ``utils/other.py`` (``ModulesToSaveWrapper``).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ucp.catalog import Catalog
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.formats.huggingface.like import ADAPTER_CONFIG, literal
from ucp.formats.huggingface.like import carried as carried_from
from ucp.storage import configs, locations
from ucp.transfer.targets import TargetFile

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.(?P<kind>lora_[A-Za-z_]+)\.(?P<adapter>[^.]+)(?P<rest>\..+)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")


def select(catalog: Catalog, like: Path) -> Catalog:
    """The adapter's weights under PEFT's names.

    Raises Unsupported for adapters of other types than LoRA and for several adapters, Mismatch where there is none, or
    where a parameter was trained that is no part of it.
    """
    config = configs.read(like / ADAPTER_CONFIG, BadArgument)
    bias = config.get("bias", "none")
    if config.get("peft_type") != "LORA" or bias not in ("none", "all", "lora_only"):
        raise Unsupported(
            f"{like / ADAPTER_CONFIG}: peft_type {config.get('peft_type')} with bias '{bias}' is not supported; LORA is"
        )
    names: dict[str, str] = {}
    adapters: dict[str, None] = {}
    lora = {found["module"] for name in catalog.parameters if (found := _LORA.fullmatch(name)) is not None}
    for name in catalog.parameters:
        part, saved = _LORA.fullmatch(name), _SAVED.fullmatch(name)
        if part is not None:
            adapters[part["adapter"]] = None
            # DoRA's vector was a parameter once; its files still call it without '.weight'.
            rest = "" if part["kind"] == "lora_magnitude_vector" else part["rest"] or ""
            names[name] = f"{part['module']}.{part['kind']}{rest}"
        elif saved is not None:
            adapters[saved["adapter"]] = None
            names[name] = f"{saved['module']}.{saved['rest']}"
        elif name.endswith(".bias") and (
            bias == "all" or (bias == "lora_only" and name.removesuffix(".base_layer.bias") in lora)
        ):
            names[name] = name
    if not lora:
        raise Mismatch(f"{like / ADAPTER_CONFIG}: asks for a LoRA adapter, and the checkpoint has none ('lora_A')")
    if len(adapters) > 1:
        raise Unsupported(f"the checkpoint has several adapters ({', '.join(adapters)}); one can be written")
    for info in catalog.parameters.values():
        if info.kind == "parameter" and info.name not in names:
            raise Mismatch(
                f"'{info.name}' was trained, but is no part of a LoRA adapter with bias '{bias}', so it would be lost; "
                "write the whole model, with a config.json in '--like'"
            )
    named = {old: new if new.startswith(_PREFIX) else f"{_PREFIX}{new}" for old, new in names.items()}
    parameters = {new: replace(catalog.parameters[old], name=new, aliases=()) for old, new in named.items()}
    tensors = {(new, "param"): replace(catalog.tensors[old, "param"], name=new) for old, new in named.items()}
    return replace(catalog, parameters=parameters, tensors=tensors)


def refuse(catalog: Catalog) -> None:
    """Raise Unsupported for a checkpoint with an adapter, whose names no model folder has."""
    found = next((name for name in catalog.parameters if _LORA.fullmatch(name)), None)
    if found is not None:
        raise Unsupported(
            f"'{found}' is part of an adapter; for a PEFT adapter folder, give '--like' a folder with an "
            f"{ADAPTER_CONFIG} and no config.json"
        )


def carried(like: Path) -> list[TargetFile]:
    """The adapter's config, as it is, and the tokenizer's files."""
    return [literal(ADAPTER_CONFIG, locations.read(like / ADAPTER_CONFIG)), *carried_from(like, None, ())]
