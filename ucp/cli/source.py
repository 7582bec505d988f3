"""The arguments that say which checkpoint is meant, and opening it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ucp.cli import run

if TYPE_CHECKING:
    from ucp.checkpoint import Checkpoint

CHECKPOINT = "a checkpoint's folder, or a folder of them (then what 'latest' says; without that file the newest)"
NEWEST = "newest"  # `ucp.run_folder.NEWEST`, which takes too long to import before arguments are known to be right


def add_tag(parser: argparse.ArgumentParser) -> None:
    """The options that say which checkpoint of a folder is meant; both set ``tag``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tag", help="the checkpoint to take, whatever 'latest' says")
    which.add_argument(
        "--newest",
        dest="tag",
        action="store_const",
        const=NEWEST,
        help="take the newest whole checkpoint, whatever 'latest' says",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for opening a checkpoint."""
    add_tag(parser)
    parser.add_argument(
        "--spec", metavar="SPEC", help="how tensor parallelism cuts it: a name in the catalogue or a file"
    )
    parser.add_argument("--model-config", metavar="FILE", help="the model's config.json, for the spec's sizes")
    run.add_sizes(parser)


def add_ds_config(parser: argparse.ArgumentParser) -> None:
    """The option of what plans a resume."""
    parser.add_argument(
        "--ds-config",
        metavar="FILE",
        help="DeepSpeed config of the resume: which layers each pipeline stage has, AutoTP, AutoEP (default: recorded)",
    )


def open_checkpoint(args: argparse.Namespace, path: str, tag: str | None = None) -> Checkpoint:
    """Open ``path`` as the arguments say."""
    import ucp

    return ucp.open(
        path, args.spec, args.tag if tag is None else tag, model_config=args.model_config, sizes=run.sizes(args.set)
    )
