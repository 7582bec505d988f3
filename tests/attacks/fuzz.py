"""The fuzzer: mutations by seed of every kind of file of every format, each judged in an arena.

What has a checksum has to be refused or to be read as the truth. What was made anew with a right checksum, or has none
in its format, may be another checkpoint by now; then it has to be refused or read, soon, and without an internal error.
"""

from __future__ import annotations

import fnmatch
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ucp
from tests.attacks import configs, formats, mutate
from tests.attacks.arena import Verdict, fight
from ucp.inspection.verify import verify
from ucp.spec import language, shipped

SEED = 20261129


@dataclass(frozen=True)
class Target:
    """files: a pattern for names. exact: what is read has to be the truth. converted: by a conversion, which reads and
    checks everything, and not by reading each tensor. how: arguments of that conversion, or of opening. few: fewer
    mutations of it are enough in CI, for they go through what other targets go through, too."""

    format: str
    files: str
    mutation: mutate.Mutation
    exact: bool
    converted: bool = False
    how: Mapping[str, Any] = field(default_factory=dict)
    few: bool = False


TARGETS: dict[str, Target] = {
    "stage 1, model file": Target("zero1", "*model_states.pt", mutate.of_bytes, True, True),
    "stage 1, model file's pickle": Target("zero1", "*model_states.pt", mutate.of_pickle, False),
    "stage 1, optimizer file": Target("zero1", "*optim_states.pt", mutate.of_bytes, True, True),
    "stage 1, optimizer file's pickle": Target("zero1", "*optim_states.pt", mutate.of_pickle, False),
    "stage 3, model file": Target("zero3", "*model_states.pt", mutate.of_bytes, True, True),
    "stage 3, model file's pickle": Target("zero3", "*model_states.pt", mutate.of_pickle, False),
    "stage 3, optimizer file": Target("zero3", "*optim_states.pt", mutate.of_bytes, True, True),
    "stage 3, optimizer file's pickle": Target("zero3", "*optim_states.pt", mutate.of_pickle, False),
    "stage 0, model file's pickle": Target("zero0", "*model_states.pt", mutate.of_pickle, False),
    "DCP, .metadata": Target("dcp", ".metadata", mutate.of_bytes, False),
    "DCP, .distcp": Target("dcp", "*.distcp", mutate.of_bytes, True, True),
    "Megatron's older layout, model's pickle": Target("megatron ranks", "model_optim_rng.pt", mutate.of_pickle, False),
    "Megatron's older layout, optimizer's pickle": Target(
        "megatron ranks", "distrib_optim.pt", mutate.of_pickle, False
    ),
    "Hugging Face, header": Target("huggingface", "*.safetensors", mutate.of_header, False),
    "Hugging Face, index": Target("huggingface", "*.index.json", mutate.of_json, True),
    "Hugging Face, config": Target("huggingface", "config.json", mutate.of_json, True),
    "Hugging Face, .bin's pickle": Target("bin", "*.bin", mutate.of_pickle, False),
    "fragmented, tensors": Target("fragmented", "*.safetensors", mutate.of_bytes, True),
    "fragmented, manifest": Target("fragmented", "ucp.json", mutate.of_bytes, True),
    "fragmented, manifest framed anew": Target("fragmented", "ucp.json", mutate.of_manifest, False),
    "consolidated, header": Target("consolidated", "*.safetensors", mutate.of_header, True),
    "consolidated, manifest framed anew": Target("consolidated", "ucp.json", mutate.of_manifest, False),
    "virtual, manifest framed anew": Target("virtual", "ucp.json", mutate.of_manifest, False),
    "affine maps, model file's pickle": Target("affine", "*model_states.pt", mutate.of_pickle, False),
    "quantised, header": Target("quantised", "*.safetensors", mutate.of_header, False),
    "quantised, config": Target("quantised", "config.json", mutate.of_json, False),
    "torch's Hugging Face shards, header": Target("shards", "*.safetensors", mutate.of_header, False),
    "torch_checkpointing, metadata": Target("ranks", "metadata.pkl", mutate.of_bytes, False),
    "torch_checkpointing, a rank's pickle": Target("ranks", "*.pt", mutate.of_pickle, False),
    "latest": Target("consolidated", "latest", mutate.of_bytes, True),
    "DeepSpeed's latest": Target("zero1", "latest", mutate.of_bytes, True),
    "merged, any file": Target("merged", "*", mutate.of_bytes, True, few=True),
    "merged, manifest framed anew": Target("merged", "ucp.json", mutate.of_manifest, False, few=True),
    "virtual of a merge, manifest framed anew": Target(
        "virtual of a merge", "ucp.json", mutate.of_manifest, False, few=True
    ),
    "repaired, manifest framed anew": Target(
        "repaired", "ucp.json", mutate.of_manifest, False, how={"allow_approximate": True}, few=True
    ),
    "local SGD, manifest framed anew": Target(
        "workers", "ucp.json", mutate.of_manifest, False, True, {"changes": {"workers": {"averaged": 2}}}, few=True
    ),
    "spec": Target("spec", "*", mutate.of_text, False),
    "merge file": Target("merge file", "*", mutate.of_text, False),
    "changes": Target("changes", "*", mutate.of_json, False, few=True),
    "names of parameters": Target("names", "*", mutate.of_json, False, few=True),
    'the "ucp" section of a config': Target("section", "*", mutate.of_json, False),
    "DeepSpeed config": Target("config", "*", mutate.of_json, False),
}


@dataclass(frozen=True)
class Outcome:
    """One mutation's end. number, seed: by which it is made again."""

    target: str
    seed: int
    number: int
    verdict: Verdict
    fine: bool

    def __str__(self) -> str:
        again = f"scripts/attack --target '{self.target}' --seed {self.seed} --number {self.number}"
        return f"{self.target}, mutation {self.number} of seed {self.seed} ({again}): {self.verdict}"


def attack(name: str, seed: int, numbers: range, place: Path) -> Iterator[Outcome]:
    """Try the mutations of these numbers on a target."""
    target = TARGETS[name]
    truth = None
    if target.format == "spec":
        attacks = [_spec(seed, number) for number in numbers]
    elif target.format in configs.MAKERS:
        attacks = [configs.MAKERS[target.format](seed, number, place) for number in numbers]
    else:
        run = formats.make(target.format, place)
        truth = repr(_truth(run, target, place))
        attacks = [_mutation(run, name, seed, number, place) for number in numbers]
    for number, verdict in zip(numbers, fight(attacks), strict=True):
        same = not target.exact or verdict.kind == "refused" or verdict.text in (truth, "unchanged")
        yield Outcome(name, seed, number, verdict, verdict.within_limits and same)


def mutated(run: Path, name: str, seed: int, number: int) -> tuple[Path, bytes]:
    """One of the target's files, and its bytes after the mutation of that seed and number: the same in any folder."""
    target = TARGETS[name]
    rng = random.Random(f"{seed}/{name}/{number}")
    path = rng.choice([path for path in formats.files(run) if fnmatch.fnmatch(path.name, target.files)])
    return path, target.mutation(rng, path.read_bytes())


def _mutation(run: Path, name: str, seed: int, number: int, place: Path) -> Callable[[], str]:
    target = TARGETS[name]

    def do() -> str:
        path, changed = mutated(run, name, seed, number)
        raw, stat = path.read_bytes(), path.stat()
        if changed == raw:
            return "unchanged"
        try:
            path.write_bytes(changed)
            found = repr(_truth(run, target, place))
            if not target.exact:
                verify(run)
            return found
        finally:
            path.write_bytes(raw)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return do


def _truth(run: Path, target: Target, place: Path) -> object:
    if not target.converted:
        return dict(formats.everything(run, **target.how))
    with tempfile.TemporaryDirectory(dir=place) as folder:
        ucp.convert(run, f"{folder}/out", **target.how)
        return dict(formats.everything(Path(folder, "out")))


def _spec(seed: int, number: int) -> Callable[[], str]:
    def do() -> str:
        rng = random.Random(f"{seed}/spec/{number}")
        path = rng.choice(sorted(shipped.FOLDER.rglob("*.yaml")))
        text = mutate.several_of_text(rng, path.read_bytes())
        if text is None:
            return "no text"
        language.loads(text, "spec.yaml")
        return "read"

    return do
