"""YAML with the position of every word, so that each refusal can point at the place it is about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ucp import limits
from ucp.errors import Position, SpecError
from ucp.spec.positions import SpecText, suggestion
from ucp.storage import locations


def read_text(path: str | os.PathLike[str]) -> str:
    """A file's text. Raises SpecError if it is not UTF-8, or OSError."""
    raw = locations.read(Path(path), limits.SPEC_BYTES)
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"not UTF-8 text ({error.reason} at byte {error.start})", Position(os.fspath(path), 1, 1)
        ) from None


def compose(text: str, file: str) -> yaml.Node | None:
    """The text's root node. Raises a SpecError that points at the first thing that is wrong."""
    try:
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        return root
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(file, mark.line + 1, mark.column + 1) if mark else Position(file, 1, 1)
        words = " ".join(str(w) for w in (error.context, error.problem) if w)
        raise SpecError(
            f"not YAML: {words}; put quotes around names and expressions with special signs", position
        ) from None
    except RecursionError:
        raise SpecError("nested too deep to be a spec", Position(file, 1, 1)) from None
    except yaml.YAMLError as error:
        raise SpecError(f"not YAML: {' '.join(str(error).split())}", Position(file, 1, 1)) from None


@dataclass(frozen=True)
class YamlEntry:
    """A key of a mapping and its value."""

    key: SpecText
    value: yaml.Node


class YamlReader:
    """Reads the nodes of one text. file: its name in refusals."""

    def __init__(self, file: str) -> None:
        self.file = file

    def position(self, node: yaml.Node) -> Position:
        """Where the node begins."""
        return Position(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def refuse(self, node: yaml.Node, message: str) -> SpecError:
        """The error that points at the node."""
        return SpecError(message, self.position(node))

    def text(self, node: yaml.Node, what: str) -> SpecText:
        """A scalar as it stands, and where its first character is."""
        if not isinstance(node, yaml.ScalarNode):
            raise self.refuse(node, f"{what} must be a text")
        position = self.position(node)
        return SpecText(node.value, position.right(1) if node.style in ('"', "'") else position)

    def entries(self, node: yaml.Node | None, what: str, allowed: tuple[str, ...] = ()) -> Iterator[YamlEntry]:
        """The entries of a mapping. Raises SpecError if it is no mapping, or has a key twice or one not allowed."""
        if not isinstance(node, yaml.MappingNode):
            if node is None:
                raise SpecError(
                    f"{what} is empty; it must be a mapping, 'name: value' in each line", Position(self.file, 1, 1)
                )
            raise self.refuse(node, f"{what} must be a mapping, 'name: value' in each line")
        seen: dict[str, int] = {}
        for key, value in node.value:
            source = self.text(key, f"a key of {what}")
            if allowed and source.text not in allowed:
                raise source.refuse(
                    (0, len(source.text)), f"'{source.text}' is no part of {what}{suggestion(source.text, allowed)}"
                )
            if source.text in seen:
                raise source.refuse(
                    (0, len(source.text)),
                    f"'{source.text}' is given twice in {what}, first in line {seen[source.text]}",
                )
            seen[source.text] = source.position.line
            yield YamlEntry(source, value)
