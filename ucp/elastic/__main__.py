"""``python -m ucp.elastic [--folder DIR] train.py ...``: runs a training program as torchrun's worker."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from ucp.elastic.running import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ucp.elastic", description=__doc__)
    parser.add_argument("--folder", help="the run's folder, where 'ucp elastic drain' leaves word and events are kept")
    parser.add_argument("program", help="the training program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    sys.argv = [args.program, *args.arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(args.program))
    run(lambda: runpy.run_path(args.program, run_name="__main__"), folder=args.folder)


if __name__ == "__main__":
    main()
