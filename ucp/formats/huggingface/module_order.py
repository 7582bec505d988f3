"""A model's parameters in its module's own order, which files of weights that sort their names don't keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.printable import logger
from ucp.storage import configs, locations

log = logger(__name__)


def module_order(folder: Path, tensors: int) -> list[str] | None:
    """The names of all parameters, tied ones once, as transformers' own class lists them; None where the folder's
    config is of no such class, or transformers is not installed.

    The model is built without memory, and no code that comes with the folder is run. tensors: how many the folder has;
    a config that says of more layers is not believed.
    """
    config = configs.of_model(folder)
    if config is None or locations.is_remote(folder) or not _plausible(config, tensors):
        return None
    try:
        return _of_transformers(folder, config)
    except Exception as error:  # a foreign config may fail anywhere in a foreign library; nothing is told then
        log.info("%s: its model can't be built to see the order of its parameters: %s", folder, error)
        log.debug("traceback", exc_info=True)
        return None


def _of_transformers(folder: Path, config: Mapping[str, Any]) -> list[str] | None:
    import torch
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    read = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: Any = getattr(kind, "_from_config")(read)  # noqa: B009 (a class of another package)
    return [name for name, _ in model.named_parameters()]


def _plausible(config: Mapping[str, Any], tensors: int) -> bool:
    """Whether no count of layers or experts, at any depth, is more than the tensors that there are."""
    todo: list[Any] = [config]
    while todo:
        item = todo.pop()
        for key, value in item.items():
            if isinstance(value, Mapping):
                todo.append(value)
            elif type(value) is int and ("layer" in str(key) or "expert" in str(key)) and value > max(tensors, 4096):
                return False
    return True
