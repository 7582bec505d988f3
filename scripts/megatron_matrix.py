"""Megatron-Core's checkpoints of every layout into every other framework's and back, each tensor bit for bit.

    .venv/bin/python scripts/megatron_matrix.py RESULTS.jsonl --seconds 500     # goes on where the last call ended

A source is what real Megatron-Core wrote: {tp} × {pp} × {ep} × {dp} × {stacked, per layer} × {fully_reshardable,
dp_reshardable, none} × {bf16, fp32}. Values are made by a hash of key and index, so all layouts of one kind and type
hold the same; the truth is what Megatron's own loader reads of one of them. Each source is opened, converted to each
target, and from each target back to Megatron; at every stage every tensor is compared. A line of RESULTS is one source.
The order is drawn by a fixed seed, so that what a short call does is a sample of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import ucp  # noqa: E402
from tests.engines.megatron import cases  # noqa: E402
from tests.engines.megatron.cases import Case  # noqa: E402
from tests.engines.megatron.launch import by_name, launch  # noqa: E402
from tests.engines.truth import same  # noqa: E402

BUCKETS = {"distrib_optim_sharding_type": "dp_reshardable"}
AT_ONCE = 12  # runs that one start of Megatron makes
CONFIG = {
    "model_type": "llama",
    "hidden_size": cases.HIDDEN,
    "intermediate_size": cases.FFN,
    "num_hidden_layers": cases.LAYERS,
    "num_attention_heads": cases.HEADS,
    "num_key_value_heads": cases.GROUPS,
    "vocab_size": cases.VOCAB,
    "tie_word_embeddings": False,
}
Truth = dict[tuple[str, str], torch.Tensor]


def every(world_max: int) -> Iterator[tuple[Case, bool]]:
    """Each source: the run, and whether its optimizer is saved in buckets."""
    kinds = [("llama", 1, dp) for dp in (1, 2)] + [("moe", 2, 2), ("moe", 1, 1), ("gpt", 1, 1)]
    for (kind, ep, dp), tp, pp in itertools.product(kinds, (1, 2, 4), (1, 2, 4)):
        if tp * pp * dp > world_max:
            continue
        for per_layer, bf16, sharding in itertools.product((False, True), (True, False), ("fully_reshardable", None)):
            case = Case(tp=tp, pp=pp, ep=ep, dp=dp, kind=kind, bf16=bf16, per_layer=per_layer, sharding=sharding)
            yield case, False
            if sharding is not None:
                yield case, True


def name_of(case: Case, buckets: bool) -> str:
    return f"{case.name}{' buckets' if buckets else ''}"


def targets(case: Case, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each target, with what `ucp.convert` is given."""
    plain = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": case.bf16}}
    for stage in (1, 3):
        config = {**plain, "zero_optimization": {"stage": stage}}
        yield f"deepspeed Z{stage}", {"to": "deepspeed", "layout": f"dp=2,zero={stage}", "ds_config": config}
    yield "FSDP2 (dcp)", {"to": "dcp"}
    other = f"tp={4 // case.tp if case.tp != 2 else 1},pp={2 if case.pp == 1 else 1},dp={case.dp},ep={case.ep}"
    yield f"megatron {other}", {"to": "megatron", "layout": other, "per_layer": not case.per_layer}
    if case.kind == "llama":
        yield "huggingface", {"to": "huggingface", "spec": "llama", "model_config": CONFIG}


def differing(path: Path, truth: Truth, states: bool = True) -> list[str]:
    """The tensors that are not the truth's."""
    with ucp.open(path) as checkpoint:
        wanted = {key: value for key, value in truth.items() if states or key[1] == "param"}
        found = checkpoint.catalog.tensors
        odd = [f"{k}" for k in wanted.keys() ^ found.keys()]
        return odd + [f"{k}" for k, value in wanted.items() if k in found and not same(checkpoint.read(*k), value)]


def check(source: Path, case: Case, truth: Truth, folder: Path) -> dict[str, str]:
    """What of one source fails: stage -> why; empty where all is equal."""
    out: dict[str, str] = {}

    def stage(name: str, work: Any) -> None:
        try:
            odd = work()
            if odd:
                out[name] = f"{len(odd)} tensors differ: {odd[:3]}"
        except Exception as error:  # noqa: BLE001 (told, and the next stage goes on)
            out[name] = f"{type(error).__name__}: {error}"

    stage("opened", lambda: differing(source, truth))
    for name, given in targets(case, folder):
        there, back = folder / "there", folder / "back"
        stage(f"{name}", lambda given=given, there=there: ucp.convert(source, there, **given) and None)
        weights_only = name == "huggingface"
        if not weights_only:
            stage(f"{name}: equal", lambda there=there: differing(there, truth))
        again = {"to": "megatron", "layout": f"tp={case.tp},pp={case.pp},dp={case.dp},ep={case.ep}"}
        if weights_only:
            again.update(spec="llama", model_config=CONFIG)
        stage(f"{name}: back", lambda there=there, back=back, again=again: ucp.convert(there, back, **again) and None)
        stage(f"{name}: back, equal", lambda back=back, w=weights_only: _back(back, truth, w, case))
        shutil.rmtree(there, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)
    return out


def _back(back: Path, truth: Truth, weights_only: bool, case: Case) -> list[str]:
    if weights_only and case.bf16:
        return _weights(back, truth)
    return differing(back, truth, states=not weights_only)


def _weights(back: Path, truth: Truth) -> list[str]:
    """Weights that went through a folder of weights: the run's own 16-bit ones, or the masters."""
    with ucp.open(back) as checkpoint:
        pairs = {name: value for (name, state), value in truth.items() if state == "param"}
        found = {name: checkpoint.read(name) for name in pairs}
        return [name for name, value in pairs.items() if not same(found[name], value.to(found[name].dtype))]


def written(several: list[tuple[Case, bool]], folder: Path) -> dict[str, Path]:
    """The sources, made by real runs; one run for both forms of its optimizer."""
    jobs, out = [], {}
    for case in dict.fromkeys(case for case, _ in several):
        plain, buckets = folder / case.name, folder / f"{case.name} buckets"
        also = {str(buckets): BUCKETS} if (case, True) in several else {}
        jobs.append({"case": vars(case), "save": str(plain), "also": also})
        out[name_of(case, False)], out[name_of(case, True)] = plain, buckets
    launch(jobs, folder, timeout=1000)
    return out


def truths(kept: Path) -> dict[tuple[str, bool], Truth]:
    """By kind of model and type: what Megatron's own loader reads of a run on one rank."""
    ones = {(kind, bf16): Case(kind=kind, bf16=bf16) for kind in ("llama", "moe", "gpt") for bf16 in (True, False)}
    files = {key: kept / f"{key[0]} {key[1]}.pt" for key in ones}
    if not all(file.exists() for file in files.values()):
        with tempfile.TemporaryDirectory() as made:
            jobs = [{"case": vars(case), "save": f"{made}/{case.name}"} for case in ones.values()]
            load = {str(files[key]): f"{made}/{case.name}/iter_0000002" for key, case in ones.items()}
            kept.mkdir(exist_ok=True)
            launch([*jobs, {"do": "truths", "case": vars(Case()), "load": load}], Path(made))
    return {key: by_name(file) for key, file in files.items()}


def _ahead(
    batches: list[list[tuple[Case, bool]]], end: float
) -> Iterator[tuple[list[tuple[Case, bool]], Path, dict[str, Path] | None]]:
    """Each batch with the folder it lies in and its sources, None where its runs failed. While one is compared,
    Megatron writes the next."""

    def make(batch: list[tuple[Case, bool]], folder: Path) -> dict[str, Path] | None:
        try:
            return written(batch, folder)
        except Exception:  # noqa: BLE001 (told; the rest goes on)
            traceback.print_exc()
            return None

    with ThreadPoolExecutor(1) as pool:
        coming: tuple[list[tuple[Case, bool]], Path, Future[dict[str, Path] | None]] | None = None
        for batch in [*batches, None]:
            more = batch is not None and time.monotonic() < end
            made = Path(tempfile.mkdtemp()) if more else None
            following = None if made is None or batch is None else (batch, made, pool.submit(make, batch, made))
            if coming is not None:
                yield coming[0], coming[1], coming[2].result()
                shutil.rmtree(coming[1], ignore_errors=True)
            coming = following


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after this many seconds")
    parser.add_argument("--world-max", type=int, default=8, help="leave out runs of more ranks")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    lines = [json.loads(x) for x in given.results.read_text().splitlines()] if given.results.exists() else []
    done = {line["source"] for line in lines}
    runs = [list(both) for _, both in itertools.groupby(every(given.world_max), lambda one: one[0])]
    random.Random(18).shuffle(runs)
    left = [one for run in runs for one in run if name_of(*one) not in done]
    known = truths(given.results.with_suffix(".truths"))
    batches = [left[at : at + AT_ONCE] for at in range(0, len(left), AT_ONCE)]
    for now, made, sources in _ahead(batches, end):
        if sources is None:
            continue
        for case, buckets in now:
            failed = check(sources[name_of(case, buckets)], case, known[case.kind, case.bf16], made)
            line = {"source": name_of(case, buckets), "failed": failed}
            lines.append(line)
            with given.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
    bad = [line for line in lines if line["failed"]]
    remaining = len(left) + len(done) - len(lines)
    print(f"{len(lines)} sources, {len(lines) - len(bad)} equal at every stage, {remaining} left")
    for why, count in Counter(f"{k}: {v}" for line in bad for k, v in line["failed"].items()).most_common(20):
        print(f"{count} × {why[:300]}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
