"""Which spec is used for a model, and the sizes that it is bound with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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

    Of a checkpoint for a live model, which may have been changed since (`ucp.spec.changes.before`):
    live: the live model's config, which counts where neither the caller nor the checkpoint has one.
    old: sizes of the checkpoint, which go before all else where the spec is one of the catalogue or a file.
    resized: patterns of parameters that may have other sizes now, whose old ones the shapes tell (`ucp.spec.outgrown`).
    declared: whether that they have is declared, so that it is asked for what shapes leave open.
    """

    spec: Spec | None = None
    config: Mapping[str, Any] | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    apart: bool = False
    live: Mapping[str, Any] | None = None
    old: Mapping[str, int] = field(default_factory=dict)
    resized: tuple[str, ...] = ()
    declared: bool = False

    def config_of(self, recorded: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The model's config: the caller's, else this one that the checkpoint has, else the changed model's."""
        return next((c for c in (self.config, recorded, self.live) if c is not None), None)

    def bound(self, recorded: Mapping[str, Any] | None, layout: str | None = None) -> Bound | None:
        """The spec joined with the sizes; None if nothing tells which spec it is.

        recorded: the model's config as the checkpoint has it, used if the caller gives none.
        layout: the section under ``layouts:`` that counts.
        """
        config = self.config_of(recorded)
        spec = self.spec
        if spec is None and config is not None and config.get("model_type"):
            from ucp.spec import shipped

            spec = shipped.for_model(str(config["model_type"]))
        if spec is None:
            return None
        from ucp.spec.bound import bind

        return bind(spec, config, {**self.settings, **self.old}, layout)


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


def choose_before(
    choice: Choice, changes: str | os.PathLike[str] | Mapping[str, Any] | None, live: Mapping[str, Any] | None
) -> Choice:
    """What is said of the spec for a checkpoint that a live model resumes from, which may have been changed since.

    changes: what of it is declared (`ucp.spec.changes`). live: the live model's config. Where changes are declared it
    counts where neither the caller nor the checkpoint has one; else before the checkpoint's. Sizes that it has and the
    checkpoint's shapes do not are taken from these (`ucp.spec.outgrown`). Raises what reading the changes raises.
    """
    if changes is not None:
        from ucp.spec.changes import before, read  # late, as the language of specs: most programs declare nothing

        return before(choice, read(changes), live)
    if live is None:
        return choice
    return replace(choice, config=live if choice.config is None else choice.config, resized=("*",))


def _config(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if config is not None and not isinstance(config, Mapping) and os.path.isdir(config):
        config = os.path.join(config, configs.MODEL)
    return configs.given(config, BadArgument)
