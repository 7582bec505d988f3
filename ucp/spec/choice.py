"""Which spec is used for a model, and the sizes that it is bound with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ucp.errors import BadArgument
from ucp.spec import catalogue
from ucp.spec.bound import Bound, bind
from ucp.spec.language import Spec


@dataclass(frozen=True)
class Choice:
    """What the caller says of the spec.

    spec: None to take what the checkpoint says of itself, else the catalogue's for the model's type. config: the
    model's config.json as a mapping, where it is known; settings: sizes that go before it. apart: put nothing together.
    """

    spec: Spec | None = None
    config: Mapping[str, Any] | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    apart: bool = False

    def bound(self, recorded: Mapping[str, Any] | None, layout: str | None = None) -> Bound | None:
        """The spec joined with the sizes, None where nothing tells which spec it is.

        recorded: the model's config as the checkpoint has it, used where the caller gives none. layout: the section
        under ``layouts:`` that counts.
        """
        config = self.config if self.config is not None else recorded
        spec = self.spec
        if spec is None and config is not None and config.get("model_type"):
            spec = catalogue.for_model(str(config["model_type"]))
        return None if spec is None else bind(spec, config, self.settings, layout)


def choose(
    spec: str | os.PathLike[str] | None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    settings: Mapping[str, int] | None = None,
) -> Choice:
    """A spec by its name in the catalogue or its file, and the model's config as a mapping, a file or its folder.

    Raises SpecError where the spec is none, BadArgument for what can't be read.
    """
    return Choice(None if spec is None else catalogue.find(spec), _config(config), settings or {})


def _config(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return config
    path = os.fspath(config)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
    except OSError as error:
        raise BadArgument(f"{path}: the model's config can't be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BadArgument(f"{path}: the model's config is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadArgument(f"{path}: the model's config is not a JSON object")
    return found
