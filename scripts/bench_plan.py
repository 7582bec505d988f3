"""Planning at a scale that no test machine has: ZeRO-1 under tp and pp to ZeRO-3 under tp, simulated without data.

The cuts of tensor parallelism come from the specs of the catalogue, those of ZeRO from `ucp.parallel.zero`, and the
plan is the intersection that every load and conversion makes. The three states of a parameter are cut alike; one of
them is planned. A job is planned parameter by parameter, and nothing needs the copies of all of them at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import bench_tools
import numpy as np

from ucp.geometry import Blocks, Copies, collapse, compose, concat, flat_ranges, intersect, intersect_grouped, numel
from ucp.parallel.mesh import Layout, parse_layout
from ucp.parallel.zero import ceil_partition, ceil_size, flat_offsets, flat_partition, partition_size
from ucp.spec import shipped
from ucp.spec.bound import Bound, bind
from ucp.spec.evaluate import Cutting, Shard, shape_of, shard
from ucp.spec.grammar import Expression, cuts

SOURCE, TARGET = "dp=32,tp=8,pp=16,zero=1", "dp=2048,tp=4,zero=3"
DENSE = {
    "model_type": "llama",
    "hidden_size": 20480,
    "intermediate_size": 69632,
    "num_hidden_layers": 192,
    "num_attention_heads": 160,
    "num_key_value_heads": 16,
    "vocab_size": 128000,
}
EXPERTS = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 0,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default=SOURCE, help=f"layout of the checkpoint (default: {SOURCE})")
    parser.add_argument("--target", default=TARGET, help=f"layout that resumes (default: {TARGET})")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of this measurement plans


@dataclass(frozen=True)
class Model:
    """Every parameter in order: (name, expression, layer or None)."""

    bound: Bound
    layers: int
    parameters: tuple[tuple[str, Expression, int | None], ...]

    @property
    def numel(self) -> int:
        return sum(numel(shape_of(expression, self.bound.sizes)) for _, expression, _ in self.parameters)


def model(config: Mapping[str, Any]) -> Model:
    """The parameters that the catalogue's spec for this config gives a model, `{i}` filled with every layer."""
    spec = shipped.for_model(str(config["model_type"]))
    if spec is None:
        raise ValueError(f"no spec for {config['model_type']}")
    bound = bind(spec, config)
    layers = int(config["num_hidden_layers"])
    names: list[tuple[str, int | None]] = []
    layered = [str(line.pattern) for line in bound.lines if "{i}" in str(line.pattern)]
    for line in bound.lines:
        text = str(line.pattern)
        if text == layered[0]:
            names += [(name.replace("{i}", str(i)), i) for i in range(layers) for t in layered for name in _norms(t)]
        elif text not in layered:
            names.append((text, None))
    found = [(name, bound.find(name), layer) for name, layer in names]
    return Model(
        bound,
        layers,
        tuple(
            (name, one.expression, layer)
            for name, one, layer in found
            # A mixture of experts in every layer has no plain MLP beside it.
            if one is not None and not ("n_routed_experts" in config and _is_plain_mlp(name))
        ),
    )


def _norms(pattern: str) -> list[str]:
    """The names that a line for all of a layer's norms stands for."""
    return [pattern.replace("*norm", f"{place}_layernorm") for place in ("input", "post_attention")][
        : 1 + ("*" in pattern)
    ]


def _is_plain_mlp(name: str) -> bool:
    return name.endswith(tuple(f".mlp.{part}_proj.weight" for part in ("gate", "up", "down")))


@cache
def _shard(expression: Expression, sizes: tuple[tuple[str, int], ...], tp: int, rank: int) -> Shard:
    return shard(expression, dict(sizes), Cutting({"tp": tp}), {"tp": rank})


class Cuts:
    """A model under a layout: every rank's blocks of a parameter. ``buffers`` is the global rank, dp inside pp, tp
    innermost, and ``starts`` the place in its partition, in elements."""

    def __init__(self, whole: Model, layout: Layout) -> None:
        self.whole, self.layout = whole, layout
        self._sizes = tuple(sorted(whole.bound.sizes.items()))
        self._lifted: dict[Any, tuple[Blocks, Any]] = {}
        self._offsets: dict[tuple[str, int], int] = {}
        self._partition: dict[tuple[int, int], int] = {}
        for stage in range(layout.pp):
            names = [
                (name, expression) for name, expression, layer in whole.parameters if self.stage(layer, name) == stage
            ]
            for tp in range(layout.tp):
                counts = [numel(self.local(expression, tp).shape) for _, expression in names]
                if layout.zero == 3:
                    counts = [ceil_size(n, layout.dp) for n in counts]
                offsets, total = flat_offsets(counts)
                self._partition[stage, tp] = partition_size(total, layout.dp)
                for (name, _), offset in zip(names, offsets, strict=True):
                    self._offsets[name, tp] = offset

    def stage(self, layer: int | None, name: str) -> int:
        if layer is None:
            return 0 if name == self.whole.parameters[0][0] else self.layout.pp - 1
        return layer * self.layout.pp // self.whole.layers

    def local(self, expression: Expression, tp: int) -> Shard:
        return _shard(expression, self._sizes, self.layout.tp, tp)

    def holders(self, expression: Expression) -> range:
        """The tp ranks that hold different elements."""
        return range(self.layout.tp if any("tp" in cut.over for cut in cuts(expression)) else 1)

    def blocks(self, name: str, expression: Expression, layer: int | None, copies: bool) -> Blocks:
        """All ranks' blocks of a parameter; copies: those that several tp ranks hold alike from each, not the first."""
        layout = self.layout
        parts = []
        for tp in range(layout.tp) if copies else self.holders(expression):
            local = self.local(expression, tp)
            offset = self._offsets[name, tp]
            if layout.zero == 3:
                key = (id(expression), tp)
                if key not in self._lifted:
                    inner = ceil_partition(local.shape, 0, layout.dp)
                    self._lifted[key] = compose(inner, local.blocks, local.shape, local.logical)
                found = self._lifted[key][0]
                found = dataclasses.replace(found, starts=found.starts + offset)
            else:
                inner = flat_partition(local.shape, offset, self._partition[self.stage(layer, name), tp])
                found, _ = compose(inner, local.blocks, local.shape, local.logical)
            rank = (self.stage(layer, name) * layout.dp + found.buffers) * layout.tp + tp
            parts.append(dataclasses.replace(found, buffers=rank))
        return concat(parts, len(local.logical))

    def of_rank(self, name: str, expression: Expression, dp: int, tp: int) -> Blocks:
        """One rank's blocks under ZeRO-3, as it makes them for itself."""
        local = self.local(expression, tp)
        n = numel(local.shape)
        piece = ceil_size(n, self.layout.dp)
        inner = flat_ranges(
            local.shape, [min(dp * piece, n)], [min((dp + 1) * piece, n)], [self._offsets[name, tp]], [0]
        )
        return compose(inner, local.blocks, local.shape, local.logical)[0]


def copies_of(source: Blocks, target: Blocks) -> Copies:
    """The plan of one parameter. Raises RuntimeError unless it brings every element that is wanted, once."""
    found = collapse(intersect(source, target))
    if found.counts.sum() != target.counts.sum():
        raise RuntimeError(f"{target.counts.sum()} elements are wanted and {found.counts.sum()} found")
    return found


def _copies_together(sources: Sequence[Blocks], targets: Sequence[Blocks]) -> int:
    """How many copies bring all parameters, planned together as a load does it. Raises RuntimeError unless they bring
    every element that is wanted, once."""
    count = 0
    for ndim in sorted({each.ndim for each in targets}):
        alike = [k for k, each in enumerate(targets) if each.ndim == ndim]
        numbers = np.arange(len(alike))
        source, target = (concat((side[k] for k in alike), ndim) for side in (sources, targets))
        source_of, target_of = (np.repeat(numbers, [len(side[k]) for k in alike]) for side in (sources, targets))
        found = collapse(intersect_grouped(source, source_of, target, target_of))
        brought, wanted = np.zeros(len(alike), np.int64), np.zeros(len(alike), np.int64)
        np.add.at(brought, target_of[found.target], found.counts)
        np.add.at(wanted, target_of, target.counts)
        if not np.array_equal(brought, wanted):
            raise RuntimeError(f"{wanted.sum()} elements are wanted and {brought.sum()} found")
        count += len(found)
    return count


def plan_job(whole: Model, source: Layout, target: Layout) -> dict[str, Any]:
    """Plan all ranks of the target together; returns counts."""
    began = time.perf_counter(), time.process_time()
    here, there = Cuts(whole, source), Cuts(whole, target)
    fragments = pieces = copies = 0
    wanted = np.zeros(target.world_size, np.int64)
    for name, expression, layer in whole.parameters:
        held = here.blocks(name, expression, layer, copies=False)
        wants = there.blocks(name, expression, layer, copies=True)
        found = copies_of(held, wants)
        fragments, pieces, copies = fragments + len(held), pieces + len(wants), copies + len(found)
        wanted += np.bincount(wants.buffers[found.target], found.counts, minlength=len(wanted)).astype(np.int64)
    return {
        "source fragments": fragments,
        "target fragments": pieces,
        "copies": copies,
        "elements a rank": [int(wanted.min()), int(wanted.max())],
        "seconds": time.perf_counter() - began[0],
        "processor": time.process_time() - began[1],
    }


def plan_rank(whole: Model, source: Layout, target: Layout, rank: int) -> dict[str, Any]:
    """Plan one rank of the target against a catalog that is there already (it is read once for a job)."""
    here, there = Cuts(whole, source), Cuts(whole, target)
    catalog = [here.blocks(name, expression, layer, copies=False) for name, expression, layer in whole.parameters]
    dp, tp = divmod(rank, target.tp)
    began = time.perf_counter(), time.process_time()
    wants = [there.of_rank(name, expression, dp, tp) for name, expression, _ in whole.parameters]
    copies = _copies_together(catalog, wants)
    return {
        "source fragments": sum(map(len, catalog)),
        "copies": copies,
        "seconds": time.perf_counter() - began[0],
        "processor": time.process_time() - began[1],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    source, target = parse_layout(args.source), parse_layout(args.target)
    if args.one:
        return _measured(args.one, source, target)
    rows = []
    for kind in ("dense", "experts"):
        for share in (4, 2, 1):
            rows.append(_row(args, f"{kind}/{share}/job"))
        rows.append(_row(args, f"{kind}/1/rank"))
    return {
        "title": f"plan: {source} ({source.world_size:,} ranks) to {target} ({target.world_size:,} ranks), no data",
        "rows": rows,
        "notes": [
            "per million: processor seconds for a million target fragments; one rank: from the catalog to its copies"
        ],
    }


def _row(args: argparse.Namespace, one: str) -> dict[str, Any]:
    """A process of its own for each, so that its peak memory is known."""
    command = [sys.executable, __file__, one, args.source, args.target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout)
    bench_tools.progress(f"{one}: {found['s']} s, {found['MiB']} MiB")
    return found


def _measured(one: str, source: Layout, target: Layout) -> dict[str, Any]:
    kind, share, what = one.split("/")
    config = dict(DENSE if kind == "dense" else EXPERTS)
    config["num_hidden_layers"] = config["num_hidden_layers"] // int(share)
    whole = model(config)
    if what == "job":
        found = plan_job(whole, source, target)
    else:
        found = plan_rank(whole, source, target, target.world_size // 3)
    out = {
        "what": f"{kind}, {whole.numel / 1e12:.2f}T parameters, {'all ranks' if what == 'job' else 'one rank'}",
        "tensors": len(whole.parameters),
        **{key: value for key, value in found.items() if isinstance(value, int)},
        "s": round(found["seconds"], 2),
        "processor s": round(found["processor"], 2),
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    if what == "job":
        out["per million"] = round(found["processor"] / found["target fragments"] * 1e6, 2)
    return out


def main(arguments: Sequence[str]) -> None:
    one, source, target = arguments
    print(json.dumps(_measured(one, parse_layout(source), parse_layout(target))))


if __name__ == "__main__":
    main(sys.argv[1:])
