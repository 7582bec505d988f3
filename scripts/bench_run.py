"""Dispatch `scripts/bench WORK`: every work is a module bench_WORK with `add_arguments(parser)` and `run(args)`.

`run` returns {"title": ..., "rows": [...], ...}; the rows are printed as a table and everything goes to --json.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import os
import sys
from pathlib import Path

import bench_tools
import gpu_builds

ROOT = Path(__file__).resolve().parents[1]
WORKS = {
    "convert": "ZeRO-1 on 4 ranks to the universal forms, beside cp -r and ds_to_universal",
    "load": "ZeRO-1 on 4 ranks into ZeRO-3 on 2, beside DeepSpeed's native load and DCP with FSDP2",
    "save": "saving during training, beside DeepSpeed's own save",
    "prove": "the proof after a load, its share of the load, on the host or a device",
    "merge": "two checkpoints into one, beside cp of the same bytes and mergekit on folders",
    "survive": "snapshots in memory: their cost in a step, recovery from them, what they take",
    "many": "10,000 small tensors beside DCP and torch.load, and opening the files of 1,024 ranks",
    "plan": "planning a change of layout for 1T parameters, with no data",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    works = parser.add_subparsers(dest="work", required=True)
    modules = {}
    for name, text in WORKS.items():
        if (ROOT / "scripts" / f"bench_{name}.py").exists():
            modules[name] = importlib.import_module(f"bench_{name}")
            one = works.add_parser(name, help=text, description=text)
            modules[name].add_arguments(one)
            one.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
            one.add_argument(
                "--data",
                type=Path,
                default=ROOT / "bench-run",
                help="folder for checkpoints, kept and reused by later runs (default: bench-run)",
            )
    args = parser.parse_args()
    args.data = args.data.absolute()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # As an installer leaves a package, the peers among them: loads are in processes of their own, and import it.
    compileall.compile_dir(str(ROOT / "ucp"), quiet=1)
    gpu_builds.plain_architectures()
    result = modules[args.work].run(args)
    result["machine"] = bench_tools.machine(args.data)
    print(bench_tools.table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
