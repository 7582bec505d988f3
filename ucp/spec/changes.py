"""What of a model was changed on purpose since a checkpoint of it was saved, in the language of specs.

A file of changes, or the same as a mapping, says it part by part; the reference is the README of `ucp.changes`. Names
that change have the form of a spec's ``names:``, with the changed model in the place of the other framework. Lists of
parameters are a shell's patterns, as in ``allow_missing``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from ucp import limits
from ucp.errors import BadArgument, Position, SpecError, Unsupported
from ucp.spec.language import Spec, names_alone
from ucp.spec.select import Choice
from ucp.spec.yaml_text import YamlReader, compose, read_text
from ucp.storage.dtypes import canonical
from ucp.storage.numbers import FLOATS

VERSION = 1
MODEL = "model"
"""The framework's name, in the place of a spec's, under which the changed model's names are kept."""

ADDED, MERGED, SPLIT = "added", "merged", "split"
DEQUANTISED, REQUANTISED = "dequantised", "requantised"
KEPT, AVERAGED, COPIED, RESET = "kept", "averaged", "copied", "reset"
ZEROS = "zeros"
_OF_NAMES = ("sizes", "defaults", "parameters", "names")
_LISTS = ("unfrozen", "frozen", "added", "removed")
_OF_VALUES = ("dtype", "states", "workers", "adapters")
_SECTIONS = ("changes", "about", *_OF_NAMES, "resized", "old_sizes", "new_rows", *_LISTS, *_OF_VALUES)


@dataclass(frozen=True)
class Changes:
    """What is declared.

    Parameters
    ----------
    file: where it is said, for refusals.
    names: the changed model's names, as the framework `MODEL` of a spec; None if none change.
    resized: pattern -> the new shape; None for the live model's.
    old_sizes: a spec's sizes, or ``config.`` keys, of the checkpoint, where the model's config has other ones now.
    new_rows: where the weights of new rows come from: 'zeros', a checkpoint's path, or None for the live model.
    unfrozen, frozen, added, removed: patterns of parameters.
    dtype: pattern of names, or of ``name:state`` -> the element type.
    adapters: 'added', 'merged' or 'split'; None if nothing is said of adapters.
    states: 'dequantised' for states of few bits in float32, 'requantised' for a live optimizer that quantises them
        again, in its own blocks; None if nothing is said of them.
    workers: how another number of workers of local SGD gets what they have ('kept', 'averaged', 'copied' or 'reset'),
        and that number; None if nothing is said of them.
    scale: for 'merged': what the product of an adapter's two matrices is multiplied by (alpha / r).
    """

    file: str
    names: Spec | None = None
    resized: tuple[tuple[str, tuple[int, ...] | None], ...] = ()
    old_sizes: Mapping[str, int] = field(default_factory=dict)
    new_rows: str | None = None
    unfrozen: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    dtype: tuple[tuple[str, str], ...] = ()
    states: str | None = None
    workers: tuple[str, int] | None = None
    adapters: str | None = None
    scale: float = 1.0

    @property
    def patterns(self) -> tuple[tuple[str, str], ...]:
        """(section, pattern) of everything that is declared by patterns."""
        listed = [(section, pattern) for section in _LISTS for pattern in getattr(self, section)]
        listed += [("resized", pattern) for pattern, _ in self.resized]
        return (*listed, *(("dtype", pattern) for pattern, _ in self.dtype))


def read(given: str | os.PathLike[str] | Mapping[str, Any]) -> Changes:
    """Changes from a YAML file, or from the same as a mapping.

    Raises SpecError, which points at the first thing that is wrong, and BadArgument for a file that can't be read.
    """
    if isinstance(given, Mapping):
        try:
            text = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadArgument(f"changes are plain values, as in JSON: {error}") from None
        return _Reader("changes").changes(text, False)
    try:
        text = read_text(given)
    except (OSError, ValueError) as error:
        raise BadArgument(f"{os.fspath(given)}: cannot be read: {error}") from None
    return _Reader(os.fspath(given)).changes(text, True)


def before(choice: Choice, changes: Changes, live: Mapping[str, Any] | None) -> Choice:
    """What is said of the spec of a checkpoint that has not been changed yet, as these declare it. live: the changed
    model's config, which counts where nothing else tells the checkpoint's."""
    resized = tuple(pattern for pattern, _ in changes.resized)
    return replace(choice, live=live, old=changes.old_sizes, resized=resized, declared=True)


class _Reader(YamlReader):
    def changes(self, text: str, numbered: bool) -> Changes:
        if len(text) > limits.CHANGES_CHARACTERS:
            raise SpecError(
                f"{len(text)} characters; changes have at most {limits.CHANGES_CHARACTERS}", Position(self.file, 1, 1)
            )
        parts = {e.key.text: e.value for e in self.entries(compose(text, self.file), "the changes", _SECTIONS)}
        self._version(parts, numbered)
        names = None
        if "names" in parts:
            names = names_alone({k: v for k, v in parts.items() if k in _OF_NAMES}, self.file, MODEL)
        elif stray := [section for section in _OF_NAMES if section in parts]:
            raise self.refuse(parts[stray[0]], f"{stray[0]}: is for names:, and there are none")
        adapters, scale = self._adapters(parts["adapters"]) if "adapters" in parts else (None, 1.0)
        return Changes(
            self.file,
            names,
            self._resized(parts["resized"]) if "resized" in parts else (),
            self._old_sizes(parts["old_sizes"]) if "old_sizes" in parts else {},
            self.text(parts["new_rows"], "new_rows").text if "new_rows" in parts else None,
            **{section: self._patterns(parts[section], section) for section in _LISTS if section in parts},
            dtype=self._dtypes(parts["dtype"]) if "dtype" in parts else (),
            states=self._states(parts["states"]) if "states" in parts else None,
            workers=self._workers(parts["workers"]) if "workers" in parts else None,
            adapters=adapters,
            scale=scale,
        )

    def _version(self, parts: Mapping[str, yaml.Node], numbered: bool) -> None:
        if "changes" not in parts:
            if numbered:
                raise SpecError(f"a file of changes begins with changes: {VERSION}", Position(self.file, 1, 1))
            return
        version = self.text(parts["changes"], "changes")
        if version.text != str(VERSION):
            raise version.refuse((0, len(version.text)), f"version {version.text}; this program reads {VERSION}")

    def _patterns(self, node: yaml.Node, what: str) -> tuple[str, ...]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found = tuple(self.text(each, f"a pattern under {what}:").text for each in nodes)
        if not all(found):
            raise self.refuse(node, f"{what}: has an empty pattern")
        return found

    def _resized(self, node: yaml.Node) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        if not isinstance(node, yaml.MappingNode):
            return tuple((pattern, None) for pattern in self._patterns(node, "resized"))
        return tuple((entry.key.text, self._shape(entry.value)) for entry in self.entries(node, "resized:"))

    def _old_sizes(self, node: yaml.Node) -> dict[str, int]:
        return {entry.key.text: self._size(entry.value) for entry in self.entries(node, "old_sizes:")}

    def _size(self, node: yaml.Node) -> int:
        text = self.text(node, "a size")
        if not _is_size(text.text):
            raise text.refuse((0, len(text.text)), "a size is a whole number from 1, such as 32000")
        return int(text.text)

    def _shape(self, node: yaml.Node) -> tuple[int, ...]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else []
        texts = [self.text(each, "a size").text for each in nodes]
        if not texts or not all(_is_size(text) for text in texts):
            raise self.refuse(node, "a shape is a list of whole numbers from 1, such as [32064, 4096]")
        return tuple(map(int, texts))

    def _dtypes(self, node: yaml.Node) -> tuple[tuple[str, str], ...]:
        out = []
        for entry in self.entries(node, "dtype:"):
            text = self.text(entry.value, "an element type")
            try:
                name = canonical(text.text)
            except Unsupported as error:
                raise text.refuse((0, len(text.text)), str(error)) from None
            if name not in FLOATS:
                raise text.refuse((0, len(text.text)), f"masters are of a floating type: {', '.join(FLOATS)}")
            out.append((entry.key.text, name))
        return tuple(out)

    def _states(self, node: yaml.Node) -> str:
        text = self.text(node, "states")
        if text.text not in (DEQUANTISED, REQUANTISED):
            raise text.refuse((0, len(text.text)), f"states can be '{DEQUANTISED}' or '{REQUANTISED}'")
        return text.text

    def _workers(self, node: yaml.Node) -> tuple[str, int]:
        kinds = (KEPT, AVERAGED, COPIED, RESET)
        entries = list(self.entries(node, "workers:", kinds)) if isinstance(node, yaml.MappingNode) else []
        if len(entries) != 1:
            raise self.refuse(node, f"workers: is one of {', '.join(kinds)}, with their new number: {{{AVERAGED}: 4}}")
        text = self.text(entries[0].value, entries[0].key.text)
        if not (text.text.isascii() and text.text.isdigit() and 0 < len(text.text) <= 6 and int(text.text)):
            raise text.refuse((0, len(text.text)), "is a number of workers")
        return entries[0].key.text, int(text.text)

    def _adapters(self, node: yaml.Node) -> tuple[str, float]:
        if isinstance(node, yaml.MappingNode):
            entries = list(self.entries(node, "adapters:", (MERGED,)))
            if not entries:
                raise self.refuse(node, "adapters: says nothing; write merged and the adapter's alpha / r")
            (entry, *others) = entries
            text = self.text(entry.value, MERGED)
            try:
                scale = float(text.text)
            except ValueError:
                scale = float("nan")
            if others or not abs(scale) < float("inf"):
                raise text.refuse((0, len(text.text)), "is a number: the adapter's alpha / r")
            return MERGED, scale
        text = self.text(node, "adapters")
        if text.text not in (ADDED, SPLIT):
            raise text.refuse(
                (0, len(text.text)), f"adapters are '{ADDED}', '{SPLIT}', or merged with their scale: {{{MERGED}: 2.0}}"
            )
        return text.text, 1.0


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12 and int(text) > 0
