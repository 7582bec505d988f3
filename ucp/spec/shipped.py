"""The specs that come with this package, found by their name or by a config's model_type."""

from __future__ import annotations

import os
from pathlib import Path

from ucp.errors import BadArgument
from ucp.spec.language import Spec, load
from ucp.spec.positions import suggestion

FOLDER = Path(__file__).parents[1] / "specs"


def names() -> tuple[str, ...]:
    """The names of all specs in the catalogue."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.yaml")))


def find(spec: str | os.PathLike[str]) -> Spec:
    """A spec by its name in the catalogue (``llama``) or its file (anything with a dot or a slash in it).

    Raises SpecError if the file is not a spec, BadArgument for a name or file that does not exist.
    """
    text = os.fspath(spec)
    if "." not in text and os.sep not in text:
        if text not in names():
            raise BadArgument(
                f"no spec '{text}' in the catalogue{suggestion(text, names())}; a file is written with its path"
            )
        return load(FOLDER / f"{text}.yaml")
    try:
        return load(text)
    except OSError as error:
        raise BadArgument(f"{text}: can't be read as a spec: {error.strerror or error}") from None


def for_model(model_type: str) -> Spec | None:
    """The catalogue's spec for a config's model_type, None if it has none."""
    for name in names():
        spec = load(FOLDER / f"{name}.yaml")
        if model_type in spec.models:
            return spec
    return None
