"""The arguments that say which checkpoint is meant, and opening it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ucp import formats
from ucp.cli import run
from ucp.formats.base import FLAG, NAMES, SHAPES, TEXT, Option

if TYPE_CHECKING:
    from ucp.checkpoint import Checkpoint

CHECKPOINT = "a checkpoint's folder, or a folder of them (then what 'latest' says; without that file the newest)"
ALLOW_APPROXIMATE = "take a checkpoint with layers that ucp repair has filled in"
TRUST_PATHS = "follow a virtual checkpoint to files outside the folder that it names as its source"
NEWEST = "newest"  # `ucp.run_folder.NEWEST`, which takes too long to import before arguments are known to be right


def add_tag(parser: argparse.ArgumentParser, of: str = "") -> None:
    """The options that say which checkpoint of a folder is meant; both set ``tag``. of: which folder, if there are
    several."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tag", help=f"the checkpoint to take{of}, whatever 'latest' says")
    which.add_argument(
        "--newest",
        dest="tag",
        action="store_const",
        const=NEWEST,
        help=f"take the newest whole checkpoint{of}, whatever 'latest' says",
    )


def add_arguments(parser: argparse.ArgumentParser, of: str = "") -> None:
    """The options for opening a checkpoint. of: as for `add_tag`."""
    add_tag(parser, of)
    parser.add_argument(
        "--spec", metavar="SPEC", help="how tensor parallelism cuts it: a name in the catalogue or a file"
    )
    parser.add_argument("--model-config", metavar="FILE", help="the model's config.json, for the spec's sizes")
    parser.add_argument("--trust-paths", action="store_true", help=TRUST_PATHS)
    add_reading(parser)
    run.add_sizes(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """The formats' options for reading a checkpoint."""
    for option in _reading().values():
        run.add_option(parser, option)


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_reading` that were given."""
    return {name: found for name in _reading() if (found := getattr(args, name, None)) is not None}


def _reading() -> dict[str, Option]:
    """The reading options of the built-in formats, except those that every command has itself or that none can give."""
    options = {option.name: option for known in formats.built_in() for option in known.read_options}
    elsewhere = ("trust_paths", "trust_client_state", "allow_approximate")
    return {
        name: option
        for name, option in options.items()
        if option.kind in (FLAG, TEXT, NAMES, SHAPES) and name not in elsewhere
    }


def add_division(parser: argparse.ArgumentParser) -> None:
    """Add the options for planning a resume. They belong to the format that says how its framework divides a model."""
    for option in formats.dividing().options:
        run.add_option(parser, option)


def division(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_division` that were given."""
    return {option.name: vars(args)[option.name] for option in formats.dividing().options if option.name in args}


def open_checkpoint(args: argparse.Namespace, path: str, tag: str | None = None) -> Checkpoint:
    """Open ``path`` as the arguments say."""
    import ucp

    return ucp.open(
        path,
        args.spec,
        args.tag if tag is None else tag,
        model_config=args.model_config,
        sizes=run.sizes(args.set),
        trust_paths=args.trust_paths,
        allow_approximate=True,  # what looks at a checkpoint shows that, and loads nothing
        options=reading(args),
    )
