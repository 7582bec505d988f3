"""Which spec is used for a model, and the sizes that it is bound with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ucp.errors import BadArgument
from ucp.storage import configs

# Importing what reads specs takes as long as all other imports together, and most checkpoints need no spec.
if TYPE_CHECKING:
    from ucp.spec.bound import Bound
    from ucp.spec.language import Spec


@dataclass(frozen=True)
class Choice:
    """What the caller says of the spec.

    spec: None to take what the checkpoint says of itself, else the catalogue's spec for the model's type.
    config: the model's config.json as a mapping, if it is known.
    settings: sizes that go before the config.
    apart: put nothing together.
    """

    spec: Spec | None = None
    config: Mapping[str, Any] | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    apart: bool = False

    def bound(self, recorded: Mapping[str, Any] | None, layout: str | None = None) -> Bound | None:
        """The spec joined with the sizes; None if nothing tells which spec it is.

        recorded: the model's config as the checkpoint has it, used if the caller gives none.
        layout: the section under ``layouts:`` that counts.
        """
        config = self.config if self.config is not None else recorded
        spec = self.spec
        if spec is None and config is not None and config.get("model_type"):
            from ucp.spec import shipped

            spec = shipped.for_model(str(config["model_type"]))
        if spec is None:
            return None
        from ucp.spec.bound import bind

        return bind(spec, config, self.settings, layout)


def choose(
    spec: str | os.PathLike[str] | None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    settings: Mapping[str, int] | None = None,
) -> Choice:
    """A spec by its name in the catalogue or its file, and the model's config as a mapping, a file or its folder.

    Raises SpecError if the file is not a spec, BadArgument for what can't be read.
    """
    if spec is None:
        return Choice(None, _config(config), settings or {})
    from ucp.spec import shipped

    return Choice(shipped.find(spec), _config(config), settings or {})


def _config(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if config is not None and not isinstance(config, Mapping) and os.path.isdir(config):
        config = os.path.join(config, configs.MODEL)
    return configs.given(config, BadArgument)
