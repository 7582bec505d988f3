"""The Format protocol: what a checkpoint format offers to everything else. Its nouns are in `ucp.formats.nouns`.

A format is one object, an instance of a subclass of `Format`. It recognises its folders (`detect`), reads one as a
catalog (`read`), and has one `WriteTarget` for each kind of checkpoint that it writes. Opening, converting, the command
line and the inspection know formats only by this protocol. All formats are asked about every folder, so a format's own
module imports what reading and writing need only when it reads or writes.

The built-in formats are in the table in `ucp.formats`. Another package registers one through the entry-point group
``ucp.formats``, whose entries name such an object::

    [project.entry-points."ucp.formats"]
    npz = "my_package.npz:FORMAT"
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ucp.errors import BadArgument

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ucp.catalog import Catalog
    from ucp.formats.nouns import Division, FolderNames, ModelFacts, ReadRequest, Remains, Salvage, WriteRequest
    from ucp.parallel.mesh import Layout
    from ucp.spec.select import Choice
    from ucp.storage.files import Files
    from ucp.transfer.targets import WritePlan

FLAG, TEXT, SIZE, PATH, CONFIG, OBJECT = "flag", "text", "size", "path", "config", "object"
NAMES, SHAPES = "names", "shapes"
"""The kinds of options: True or False; a text; bytes; a path; a JSON file's path or its content; any Python object;
lists of names, and a mapping of names to shapes, each of them also as the path of a JSON file."""

_WANTED = {
    FLAG: "True or False",
    TEXT: "a text",
    SIZE: "a number of bytes",
    PATH: "a path",
    CONFIG: "a path or a mapping",
}


class Option(NamedTuple):  # no dataclass: importing that module takes longer than all else that --help needs
    """A setting of a format's own, as Python callers and the command line give it.

    name: the keyword, such as ``max_shard_size``. On the command line it is ``--max-shard-size``, except for the kind
    OBJECT, which only Python can give.
    kind: one of the kinds above.
    about: what it does, in a few words for ``--help``.
    metavar: what stands for its value there.
    default: the value that counts as not given.
    elsewhere: what to say if it is given for a target that does not take it, with ``{to}`` for that target's name.
    """

    name: str
    kind: str
    about: str
    metavar: str = ""
    default: Any = None
    elsewhere: str = ""

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    def checked(self, value: Any) -> Any:
        """The value as the format gets it. A config is read. Raises BadArgument for a value of another kind."""
        if value is None and self.default is None:
            return None
        if self.kind == FLAG:
            fits = isinstance(value, bool)
        elif self.kind == TEXT:
            fits = isinstance(value, str)
        elif self.kind == SIZE:
            fits = isinstance(value, int) and not isinstance(value, bool)
        elif self.kind == PATH:
            fits = isinstance(value, (str, os.PathLike))
        elif self.kind == NAMES:
            from ucp.storage import configs

            return configs.names_of_groups(value, self.name, BadArgument)
        elif self.kind == SHAPES:
            from ucp.storage import configs

            return configs.shapes_by_name(value, self.name, BadArgument)
        elif self.kind == CONFIG:
            fits = isinstance(value, (str, os.PathLike, Mapping))
        else:
            fits = True
        if not fits:
            raise BadArgument(f"{self.name}: {_WANTED[self.kind]} is expected, and it is {value!r}")
        if self.kind == CONFIG:
            from ucp.storage import configs

            return configs.given(value, BadArgument)
        return value


class WriteTarget(ABC):
    """One kind of checkpoint that a format writes: what ``to=`` and ``--to`` name.

    also: what others call it; a refusal of such a name gives this one. options: its own options. takes_layout: whether
    it is written for the ranks of one layout, which the caller gives.
    """

    name: str
    also: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    takes_layout: bool = False

    @abstractmethod
    def plan(self, catalog: Catalog, request: WriteRequest) -> WritePlan:
        """Plan every file that is to be written. Nothing is written and no tensor is read.

        Raises BadArgument for options that contradict each other, Unsupported for what the target can't hold, SpecError
        and Mismatch if a spec does not fit.
        """

    def divide(self, catalog: Catalog, layout: Layout, choice: Choice, options: Mapping[str, Any]) -> Division | None:
        """How a run of this target's framework divides the checkpoint over its ranks; None if that is not known.

        Raises what `plan` raises.
        """
        return None


class Format(ABC):
    """A checkpoint format.

    name: what `ucp.open(...).format` says; short, in small letters.
    sign: what a folder of this format is recognised by, as in "a DeepSpeed one '*_model_states.pt'". A path that no
    format knows is refused with the signs of all formats.
    resumable: whether a run can resume from it, so that it counts as a checkpoint in a folder of checkpoints. A folder
    of weights alone does not.
    parts: names of the formats whose files are parts of this one's checkpoints. If several formats know a folder, one
    that has the others as parts reads it, and what is no part is told.
    completes: names of the formats of which this one's program may keep more of a run than their files have.
    read_options: options for reading it.
    targets: the kinds of checkpoints that it writes.
    """

    name: str
    sign: str
    resumable: bool = True
    parts: tuple[str, ...] = ()
    completes: tuple[str, ...] = ()
    read_options: tuple[Option, ...] = ()
    targets: tuple[WriteTarget, ...] = ()

    @abstractmethod
    def detect(self, folder: FolderNames) -> bool:
        """Whether the folder is a checkpoint of this format, by names alone. This is asked about every folder, and
        about every file that a caller names (`FolderNames.is_file`)."""

    @abstractmethod
    def read(self, path: Path, files: Files, request: ReadRequest) -> Catalog:
        """The catalog of the checkpoint in a folder. Its ``format`` is this format's name, and its coverage is checked.

        Raises DamagedCheckpoint for missing, truncated or contradicting files, Unsupported (by name) for what can't be
        read exactly, UnsafePickle, SpecError and Mismatch if the spec does not fit.
        """

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """These options for reading a checkpoint, checked. Raises BadArgument for one that the format does not take, or
        a value of another kind."""
        takes = {option.name: option for option in self.read_options}
        unknown = next((name for name in options if name not in takes), None)
        if unknown is not None:
            hint = f"; it takes {', '.join(takes)}" if takes else ""
            raise BadArgument(f"reading a checkpoint of the format '{self.name}' takes no option '{unknown}'{hint}")
        return {name: takes[name].checked(value) for name, value in options.items()}

    def keeps_beside(self, folder: FolderNames) -> bool:
        """Whether a run's further state lies in this folder, beside that of a checkpoint of a format in `completes`.
        Then `knows` says by which names."""
        return False

    def complete(self, catalog: Catalog, beside: FolderNames | None, request: ReadRequest) -> Catalog:
        """A checkpoint of a format in `completes`, with what this format's program keeps besides.

        beside: the folder that the checkpoint's own lies in, if `keeps_beside` says so; else None.

        Raises DamagedCheckpoint where the two are of different steps, or a part is missing, UnsafePickle.
        """
        return catalog

    def step(self, path: Path) -> int | None:
        """The training step of the checkpoint in this folder, if a small file says it; None if only opening would tell.
        The newest of several checkpoints is found by it."""
        return None

    def tag(self, path: Path) -> str | None:
        """The name of the checkpoint in this folder among those of its run; None if folders have no such names."""
        return None

    def file_owners(self, names: Sequence[str]) -> Mapping[str, str]:
        """Who wrote the files of these names, such as "rank 3". Names that are not of this format are left out. Where
        files in several folders are called alike, they have their folder's name, too ("mp_rank_00/x.pt")."""
        return {}

    def facts(self, catalog: Catalog) -> Mapping[str, str]:
        """What else people who use this format want to see of a checkpoint of it: titles -> texts."""
        return {}

    def file_hashes(self, path: Path) -> Mapping[str, str]:
        """The SHA-256 in hexadecimal of each file in the folder of which the checkpoint has recorded it, by name.

        Raises DamagedCheckpoint and Unsupported where what is recorded can't be used."""
        return {}

    def knows(self, name: str) -> bool:
        """Whether a file or folder of this name in a checkpoint's folder is read, or holds nothing of a training run.

        Files that are not known and look like training state are named when the checkpoint is opened.
        """
        return False

    def model_facts(self, path: Path) -> ModelFacts | None:
        """What a checkpoint says of its model, if its files hold each model-parallel rank's own tensors. Then `read`
        with a choice ``apart`` gives them the names of `ucp.spec.resolve.apart`. None if the tensors are whole."""
        return None

    def remains(self, path: Path, files: Files, request: ReadRequest) -> Remains | None:
        """What is left of a checkpoint that lost files of some of its layers, for `ucp.repair`. None if it lost none or
        if nothing can be told. Raises what `read` raises for what is left."""
        return None

    def salvage(self, path: Path) -> Salvage | None:
        """What can be told of a damaged checkpoint; None if only opening it says what is wrong."""
        return None
