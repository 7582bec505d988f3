"""A Hugging Face model folder of a checkpoint's weights, as transformers' own ``save_pretrained`` writes it.

Names are those of the files. For some families they are not the module's: the spec's ``names: huggingface:`` says so.
Tied parameters are stored once if the config ties them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.catalog import Catalog, LogicalTensor, ParameterInfo, bare
from ucp.errors import BadArgument, Mismatch, Unsupported
from ucp.formats.huggingface import adapter
from ucp.formats.huggingface.from_config import FRAMEWORK, with_prefix
from ucp.formats.huggingface.like import ADAPTER_CONFIG, carried, config_of
from ucp.formats.shared import shards
from ucp.formats.shared.renaming import best_names, rename
from ucp.formats.shared.roles import OUTSIDE
from ucp.printable import logger
from ucp.spec.bound import Bound
from ucp.spec.evaluate import shape_of
from ucp.spec.select import Choice
from ucp.storage import configs
from ucp.storage.dtypes import FLOAT_SPELLINGS
from ucp.transfer.targets import TargetFile

log = logger(__name__)


def plan(
    catalog: Catalog,
    *,
    dtype: str | None = None,
    max_shard: int = limits.SHARD_FILE_BYTES,
    like: Path | None = None,
    choice: Choice | None = None,
    plain: bool = False,
) -> tuple[Catalog, list[TargetFile]]:
    """The catalog that the files are written from, and the files.

    dtype: one of `FLOAT_SPELLINGS`, for all tensors of floating-point numbers, which are rounded to nearest, ties to
    even. Other tensors stay exact.
    max_shard: bytes.
    like: a folder whose config, tokenizer and generation files are carried over. If it has an adapter_config.json and
    no config.json, only the checkpoint's adapter is written.
    choice: the spec, if not the catalogue's for the config's model_type. Parameters that have another framework's names
    by it get its own names.
    plain: the weights are those of ``like`` itself, read as plain numbers if they are quantised there.

    Raises BadArgument for a type or folder that is none, Unsupported for what such a folder can't hold, Mismatch where
    values would be lost or the config is another model's, and what renaming raises.
    """
    if dtype is not None and dtype not in FLOAT_SPELLINGS:
        raise BadArgument(f"element type '{dtype}' is not known; known are {', '.join(FLOAT_SPELLINGS)}")
    if like is not None and not like.is_dir():
        raise BadArgument(f"{like}: is no folder; '--like' names a model folder")
    target = None if dtype is None else FLOAT_SPELLINGS[dtype]
    catalog = _weights(catalog)
    if like is not None and (like / ADAPTER_CONFIG).is_file() and not (like / configs.MODEL).is_file():
        catalog = adapter.select(catalog, like)
        # PEFT has one file, however large.
        return catalog, [*_files(catalog, target, sys.maxsize, "adapter_model"), *adapter.carried(like)]
    adapter.refuse(catalog)
    catalog = _all_frozen(catalog)
    config = None if like is None else config_of(like, plain)
    bound = _bound(choice or Choice(), config)
    if bound is not None:
        # A pipeline's names, say, or those that the files have and transformers 4's modules too.
        catalog = best_names(catalog, bound, lambda name: bound.find(name) is not None)
        catalog = with_prefix(catalog, bound)
    catalog = _untied(catalog, bound, config)
    if bound is not None:
        _check(catalog, bound, like)
        catalog = rename(catalog, bound, FRAMEWORK, to_framework=True, keep=True)
    files = _files(catalog, target, max_shard, "model")
    if like is None:
        log.warning("no config, tokenizer or other names than the module's own are written; '--like' would give them")
        return catalog, files
    written = {target if target and _is_float(t) else t.dtype for t in catalog.tensors.values()}
    return catalog, [*files, *carried(like, config, written)]


def _bound(choice: Choice, config: Mapping[str, Any] | None) -> Bound | None:
    """The spec of the model that the folder is for. A spec of another family is about the source alone."""
    if config is None:
        return choice.bound(None)
    if choice.spec is not None and config.get("model_type") not in choice.spec.models:
        log.info("names are not '%s's, which is not for '%s'", choice.spec.file, config.get("model_type"))
        choice = Choice()
    return replace(choice, config=config).bound(None)


def _weights(catalog: Catalog) -> Catalog:
    """The weights alone, their names without what wrappers put into them."""
    outside = set(catalog.training_state.extra.get(OUTSIDE, ()))
    if outside & catalog.parameters.keys() and not catalog.parameters.keys() <= outside:
        log.warning(
            "%d tensors that lie beside the model, such as '%s', are left out: they are no weights of it",
            len(outside & catalog.parameters.keys()),
            min(outside & catalog.parameters.keys()),
        )
        within = {name: info for name, info in catalog.parameters.items() if name not in outside}
        catalog = replace(catalog, parameters=within)
    kept = [info for info in catalog.parameters.values() if info.kind != "padding"]
    if len(kept) < len(catalog.parameters):
        log.warning(
            "the padding of %d parameters is left out: a model folder has the model's true sizes",
            len(catalog.parameters) - len(kept),
        )
    bodiless = next((info.name for info in kept if "param" not in info.states), None)
    if bodiless is not None:
        raise Unsupported(f"the checkpoint has states of '{bodiless}' but no weight, which a model folder needs")
    names = {name: bare(name) for info in kept for name in (info.name, *info.aliases)}
    if len(set(names.values())) < len(names):
        names = {name: name for name in names}
    parameters: dict[str, ParameterInfo] = {}
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    for info in kept:
        tensor, name = catalog.tensors[info.name, "param"], names[info.name]
        aliases = tuple(names[alias] for alias in info.aliases)
        parameters[name] = replace(
            info, name=name, states={"param": tensor.dtype}, scalars={}, aliases=aliases, shape=tensor.shape
        )
        tensors[name, "param"] = replace(tensor, name=name)
    state = replace(catalog.training_state, param_groups=())
    return replace(catalog, parameters=parameters, tensors=tensors, training_state=state, copies=())


def _all_frozen(catalog: Catalog) -> Catalog:
    """Who trains a parameter does not matter to weights that are put together or taken apart."""
    parameters = {
        name: replace(info, kind="frozen") if info.kind == "parameter" else info
        for name, info in catalog.parameters.items()
    }
    return replace(catalog, parameters=parameters)


def _untied(catalog: Catalog, bound: Bound | None, config: Mapping[str, Any] | None) -> Catalog:
    """Every name that the model's config does not tie to another is a tensor of its own; the others are gone."""
    parameters: dict[str, ParameterInfo] = {}
    tensors: dict[tuple[str, str], LogicalTensor] = {}
    for info in catalog.parameters.values():
        names = [info.name, *info.aliases]
        if bound is not None:
            # What the spec does not tie to another of these names would be made anew by whoever opens the folder.
            kept = [name for name in names if bound.owner(name) not in names]
        else:
            kept = names if (config or {}).get("tie_word_embeddings") is False else [info.name]
        for name in kept:
            parameters[name] = replace(info, name=name, aliases=())
            tensors[name, "param"] = replace(catalog.tensors[info.name, "param"], name=name)
    return replace(catalog, parameters=parameters, tensors=tensors)


def _check(catalog: Catalog, bound: Bound, like: Path | None) -> None:
    """Refuse shapes that the config contradicts; tell what the model's family has and the checkpoint lacks, and the
    reverse: whoever opens the folder decides."""
    unknown = []
    for name, info in catalog.parameters.items():
        found = bound.find(name)
        if found is None:
            if info.kind != "buffer":
                unknown.append(name)
            continue
        shape = shape_of(found.expression, bound.sizes)
        if shape != info.shape:
            where = "the spec" if like is None else str(like / configs.MODEL)
            raise Mismatch(
                f"{where}: makes '{name}' {list(shape)}, and the checkpoint has it as {list(info.shape)}; give a "
                "folder whose config is this model's"
            )
    if unknown:
        log.warning(
            "%d parameters that '%s' does not know are written under their own names, such as '%s'",
            len(unknown),
            bound.spec.file,
            unknown[0],
        )
    for line in bound.lines:
        if line.optional or line.layout or any(line.pattern.match(name) is not None for name in catalog.parameters):
            continue
        if bound.owner(line.pattern.example()) is None:
            log.warning("the checkpoint has no '%s', which a model of this family has", line.pattern)


def _files(catalog: Catalog, dtype: str | None, max_shard: int, stem: str) -> list[TargetFile]:
    tensors = [tensor for tensor in catalog.tensors.values() if tensor.state == "param"]
    if not tensors:
        raise Unsupported("the checkpoint has no weights to write")
    dtypes = {tensor.name: dtype for tensor in tensors if dtype is not None and _is_float(tensor)}
    return list(shards.plan(stem, tensors, max_shard, dtypes=dtypes, always_index=False).files)


def _is_float(tensor: LogicalTensor) -> bool:
    return "float" in tensor.dtype
