"""Make the folder of an older Megatron-Core beside this file, and its truth: a run on one rank.

    pip install --no-deps --target OLD megatron-core==0.13.1
    PYTHONPATH=OLD python -m tests.formats.megatron.older.make write 0.13.1
    python -m tests.formats.megatron.older.make truth 0.13.1

0.13 asks for a numpy before 2 (or one that is told numpy.product = numpy.prod). The truth is the same run by today's
release, saved without flattening and read by its own loader.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.engines.megatron import cases
from tests.engines.megatron.cases import Case

HERE = Path(__file__).parent
CASE = Case(bf16=True)
OLD = CASE.but(sharding="fully_sharded_model_space")


def smaller() -> None:
    """Sizes of a folder that is kept for ever."""
    cases.LAYERS, cases.HIDDEN, cases.FFN, cases.VOCAB = 2, 16, 16, 16


def main() -> int:
    from tests.engines.megatron import main as ranks

    what, release = sys.argv[1:]
    folder = HERE / release
    smaller()
    with tempfile.TemporaryDirectory() as made:
        jobs = Path(made) / "jobs.json"
        if what == "write":
            shutil.rmtree(folder, ignore_errors=True)
            jobs.write_text(json.dumps([{"case": vars(OLD), "save": str(folder)}]))
        else:
            load = {str(folder / "truth.pt"): f"{made}/today/iter_0000002"}
            today = {"case": vars(CASE), "save": f"{made}/today"}
            jobs.write_text(json.dumps([today, {"do": "truths", "case": vars(CASE), "load": load}]))
        return ranks.main(str(jobs))


if __name__ == "__main__":
    sys.exit(main())
