"""Specs from what a checkpoint says of itself: DeepSpeed's own converter merges the same shards to the same tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.spec.shards import check_shards
from ucp.errors import DamagedCheckpoint, SpecError, Unsupported
from ucp.formats.deepspeed.experts import CAPTURES
from ucp.parallel.mesh import Coordinate, Layout
from ucp.spec.bound import bind
from ucp.spec.check import merge
from ucp.spec.infer import draft, infer
from ucp.spec.language import loads
from ucp.spec.placement import place

torch.manual_seed(0)
Shards = Sequence[Tensor]


def rows(*widths: int, columns: int = 6) -> list[Tensor]:
    return [torch.randn(n, columns) for n in widths]


def columns(*widths: int) -> list[Tensor]:
    return [torch.randn(6, n) for n in widths]


def copies(*shape: int, ranks: int = 2) -> list[Tensor]:
    return [torch.randn(shape)] * ranks


OLD = {"universal_checkpoint_version": 0.3}
NEW = {"universal_checkpoint_version": 0.4}
SUBS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"


def sub_params(shape: Sequence[Any], widths: Sequence[Sequence[int]] | None = None, dim: int = 0) -> dict[str, Any]:
    out: dict[str, Any] = {SUBS: [{"patterns": ["^w$"], "shape": shape, "partition_dim": dim}]}
    return out | ({} if widths is None else {WIDTHS: {"^w$": widths}})


LISTS: dict[str, tuple[dict[str, Any], Shards]] = {
    "not listed: dimension 0": (OLD, rows(4, 4)),
    "not listed, uneven, a rank without any": (NEW, rows(8, 4, 0)),
    "not listed: a bias": (OLD, [torch.randn(5), torch.randn(4)]),
    "row parallel": (OLD | {"parameter_with_row_parallelism_patterns": [r".*w"]}, columns(3, 2)),
    "replicated": (OLD | {"tp_replicated_parameter_patterns": [r"^w$"]}, copies(6)),
    "averaged": (OLD | {"parameter_to_average_patterns": [r"w"]}, [torch.ones(3), torch.ones(3) * 2]),
    "gate and up": (OLD | {"parameter_with_2_sub_params_cat_dim_0": [r"w"]}, rows(8, 8)),
    "padded vocabulary": (OLD | {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 11}, rows(7, 7)),
    "a vocabulary without padding": (
        OLD | {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 14},
        rows(7, 7),
    ),
    "equal sub-parameters, by their number": (OLD | sub_params([3, -1]), rows(6, 6)),
    "sub-parameters of given sizes": (OLD | sub_params([(8, 4, 4), 6]), rows(8, 8)),
    "columns of sub-parameters": (OLD | sub_params([6, (4, 2)], dim=1), columns(3, 3)),
    "three key heads on two ranks": (
        NEW | sub_params([(36, 9, 9), 6], [[24, 12], [6, 3], [6, 3]]),
        rows(36, 18),
    ),
    "two key heads on three ranks": (
        NEW | sub_params([(8, 2, 2), 6], [[4, 4, 0], [1, 1, 0], [1, 1, 0]]),
        rows(6, 6, 0),
    ),
}  # fmt: skip


def by_deepspeed(info: Mapping[str, Any], shards: Shards, tmp_path: Path) -> Tensor:
    """What DeepSpeed's converter makes of the shards of 'w'."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.cnt = 0
    for rank, shard in enumerate(shards):
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            flat = shard.reshape(-1)
            ds_to_universal.dump_param_fragment(tmp_path / "in", rank, 0, state, flat, "w", 0, flat.numel())
    shapes = [tuple(s.shape) for s in shards]
    ds_to_universal.merge_tp_slices(info, tmp_path / "out", tmp_path / "in", len(shards), ("w", shapes))
    return torch.load(tmp_path / "out" / "w" / "fp32.pt", weights_only=False)["param"]


def by_spec(info: Mapping[str, Any], shards: Shards) -> Tensor:
    parts = {Coordinate(r): {"w": tuple(s.shape)} for r, s in enumerate(shards)}
    bound = bind(infer(info, parts, Layout(tp=len(shards))))
    held = {"w": [({"tp": r}, s.numpy()) for r, s in enumerate(shards)]}
    cuttings = check_shards(bound, {"tp": len(shards)}, held)
    found = bound.find("w")
    assert found is not None
    return torch.from_numpy(merge(found.expression, bound.sizes, cuttings["w"], held["w"], "w"))


@pytest.mark.parametrize("name", LISTS)
def test_lists_mean_what_deepspeed_makes_of_them(name: str, tmp_path: Path) -> None:
    info, shards = LISTS[name]
    torch.testing.assert_close(by_spec(info, shards), by_deepspeed(info, shards, tmp_path), rtol=0, atol=0)


def affine_maps() -> dict[str, tuple[Any, Shards]]:
    """DeepSpeed's own maps of a tensor, and the shards that it cuts by them."""
    from deepspeed.checkpoint import affine

    made = {
        "replicated": affine.replicated_map((7,), 3),
        "rows": affine.contiguous_split_map((12, 5), [8, 4], 0),
        "rows, a rank without any": affine.contiguous_split_map((3, 5), [1, 1, 1, 0], 0),
        "columns": affine.contiguous_split_map((4, 9), [4, 3, 2], 1),
        "fused heads": affine.sub_param_map((54, 4), [36, 9, 9], [[24, 12], [6, 3], [6, 3]], 0),
        "fused columns": affine.sub_param_map((4, 20), [10, 10], [[6, 4], [6, 4]], 1),
        "one part cut, one whole": affine.segmented_map((20, 4), [(12, False), (8, True)], 0, 3, [[4, 4, 4]]),
        "blocks in turn": affine.block_gather_map((12, 3), {0: [0, 2], 1: [1, 3]}, 3, 0),
    }
    tensors = {name: torch.randn(m.logical_shape) for name, m in made.items()}
    return {n: (m, [m.extract(tensors[n], r) for r in range(len(m.shard_shapes))]) for n, m in made.items()}


def with_map(entry: Any) -> dict[str, Any]:
    return NEW | {"affine_map": {"version": 1, "params": {"^w$": entry}}}


def test_affine_maps_mean_what_deepspeed_rebuilds_by_them() -> None:
    for name, (found, shards) in affine_maps().items():
        rebuilt = found.rebuild(dict(enumerate(shards)))
        torch.testing.assert_close(by_spec(with_map(found.to_dict()), shards), rebuilt, rtol=0, atol=0, msg=name)


def test_a_map_of_a_padded_vocabulary_and_its_size_mean_what_deepspeed_makes_of_them(tmp_path: Path) -> None:
    from deepspeed.checkpoint import affine

    found = affine.contiguous_split_map((16, 4), [8, 8], 0)
    padded = torch.randn(16, 4)
    info = with_map(found.to_dict()) | {"vocabulary_parameter_patterns": ["^w$"], "original_vocab_size": 14}
    shards = [found.extract(padded, rank) for rank in range(2)]
    torch.testing.assert_close(by_spec(info, shards), by_deepspeed(info, shards, tmp_path), rtol=0, atol=0)


def unknown(info: Mapping[str, Any] | None, shapes: Sequence[tuple[int, ...]], **more: Any) -> str:
    """Why the draft is refused, and that its text says the same."""
    parts = {Coordinate(r): {"w": s} for r, s in enumerate(shapes)}
    text = draft(info, parts, Layout(tp=len(shapes)), **more)
    assert "# 1 line is marked unknown." in text
    with pytest.raises(SpecError, match="'w' is marked unknown") as caught:
        bind(loads(text))
    return str(caught.value)


def test_what_a_map_leaves_open_is_unknown() -> None:
    from deepspeed.checkpoint import affine

    scaled = affine.replicated_map((6,), 2, scale=0.5).to_dict()
    assert "rank 0 holds a part of it multiplied by 0.5" in unknown(with_map(scaled), [(6,), (6,)])
    crossed = affine.block_gather_map((4, 3), {0: [2, 0], 1: [1, 3]}, 1, 0).to_dict()
    assert "affine map can't be written as axes" in unknown(with_map(crossed), [(2, 3), (2, 3)])
    unlike = affine.sub_param_map((12, 2), [7, 5], [[4, 3], [3, 2]], 0).to_dict()
    assert "no cut of one axis makes" in unknown(with_map(unlike), [(7, 2), (5, 2)])
    other = affine.contiguous_split_map((12, 5), [8, 4], 0).to_dict()
    assert "and ranks hold [6, 5], [6, 5]" in unknown(with_map(other), [(6, 5), (6, 5)])


@pytest.mark.parametrize(
    ("info", "shapes", "why"),
    [
        (
            NEW | {"autotp_unsupported_parameter_patterns": {"^w$": "interleaved by Yuan"}},
            [(4, 4), (4, 4)],
            "interleaved by Yuan",
        ),
        (OLD | {"tp_replicated_parameter_patterns": ["w"]}, [(4,), (3,)], "replicated, and ranks hold [4], [3]"),
        (OLD | {"parameter_with_row_parallelism_patterns": ["w"]}, [(4,), (4,)], "along dimension 1, and ranks hold"),
        (OLD, [(4, 5), (4, 6)], "along dimension 0, and ranks hold [4, 5], [4, 6]"),
        (NEW | sub_params([3, -1]), [(6, 4), (6, 4)], "sub_param_shard_widths does not say"),
        (OLD | sub_params([(7, 4), 4]), [(6, 4), (5, 4)], "do not divide by 2 ranks"),
        (NEW | sub_params([(8, 4), 4], [[4, 4], [2, 2]]), [(5, 4), (7, 4)], "are not those of [5, 4], [7, 4]"),
        (
            OLD | {"vocabulary_parameter_patterns": ["w"], "original_vocab_size": 17},
            [(7, 4), (7, 4)],
            "a vocabulary of 17",
        ),
    ],
)
def test_what_lists_leave_open_is_unknown(info: dict[str, Any], shapes: list[tuple[int, ...]], why: str) -> None:
    assert why in unknown(info, shapes)


def test_averages_are_marked_as_such() -> None:
    info, shards = LISTS["averaged"]
    parts = {Coordinate(r): {"w": tuple(s.shape)} for r, s in enumerate(shards)}
    placed = place(bind(infer(info, parts, Layout(tp=2))), parts, Layout(tp=2))
    assert [p.average for places in placed.values() for p in places] == [True, True]


def test_without_info_only_what_shapes_and_contents_show_is_known() -> None:
    assert "whole on every rank, or cut; say which" in unknown(None, [(4,), (4,)])
    assert "all of one value" in unknown(None, [(4,), (4,)], contents={"w": "constant"})
    assert "along which dimension" in unknown(None, [(4, 2), (4, 2)], contents={"w": "differ"})
    assert "the ranks hold [4, 2], [3, 2]" in unknown(None, [(4, 2), (3, 2)])
    parts = {Coordinate(r): {"w": (4, 2)} for r in range(2)}
    assert '  w: "4 2"' in draft(None, parts, Layout(tp=2), contents={"w": "equal"})
    assert '  w: "5 7"' in draft(None, {Coordinate(): {"w": (5, 7)}}, Layout())


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        ({"universal_checkpoint_version": 0.5}, Unsupported, "version 0.5; this program knows those up to 0.4"),
        (NEW | {"affine_map": {"version": 2, "params": {}}}, Unsupported, "affine_map is of version 2"),
        (OLD | {"tp_replicated_parameter_patterns": "w"}, DamagedCheckpoint, "is no list of patterns"),
        (OLD | {"tp_replicated_parameter_patterns": ["w("]}, DamagedCheckpoint, "'w\\(' is no regular expression"),
        (NEW | {"affine_map": {"params": {"^w$": {"ranks": 3}}}}, DamagedCheckpoint, "of 'w' can't be read"),
        (NEW | sub_params([3], dim="x"), DamagedCheckpoint, "of 'w' can't be read"),  # type: ignore[arg-type]
    ],
)
def test_info_that_is_newer_or_none_is_refused(info: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        infer(info, {Coordinate(r): {"w": (4, 2)} for r in range(2)}, Layout(tp=2))
    assert "\n" not in str(caught.value)


def test_numbered_parameters_share_a_line() -> None:
    names: dict[str, tuple[int, ...]] = {
        f"h.{i}.{part}": (4, 2) for i in range(12) for part in ("a.weight", "b.1.weight", "b.2.weight")
    }
    names |= {"h.3.a.weight": (5, 2), "m.deepspeed_moe.experts.deepspeed_experts.3.w": (2, 2), "2.norm.bias": (3,)}
    held = {name: shape for name, shape in names.items() if "norm" not in name and "moe" not in name}
    parts = {Coordinate(0, 0): names, Coordinate(1, 0): held}
    info = NEW | {"tp_replicated_parameter_patterns": [r"h\.\d+\.b"]}
    text = draft(info, parts, Layout(tp=2), buffers=["buffer"], captures=CAPTURES)
    lines = [line.strip() for line in text.splitlines()]
    assert 'h.{i}.a.weight: "axis_8/tp 2"' in lines
    assert 'h.3.a.weight: "axis_10/tp 2"' in lines
    assert 'h.{i}.b.{j}.weight: "4 2"' in lines
    assert '"2.norm.bias": {unknown: "only the tensor-parallel ranks [0] have it"}' in lines
    assert any(
        line.startswith('"m.deepspeed_moe.experts.deepspeed_experts.{experts/ep}.w": {unknown') for line in lines
    )
    assert "axis_8: 8  # 4 on each of 2 ranks" in lines
    assert "experts: 4  # the numbers in the parameters' names" in lines
    with pytest.raises(SpecError, match=r"'m\.deepspeed_moe.*' is marked unknown.*; 1 more are: '2\.norm"):
        bind(loads(text))


def test_buffers_need_no_line() -> None:
    parts = {Coordinate(r): {"w": (4, 2), "seen": ()} for r in range(2)}
    bound = bind(infer(NEW, parts, Layout(tp=2), buffers=["seen"]))
    assert bound.find("seen") is None
    placed = place(bound, parts, Layout(tp=2), ["seen"])
    assert placed[Coordinate(1), "w"][0].shape == (8, 2)
    np.testing.assert_array_equal(placed[Coordinate(1), "w"][0].blocks.offsets, [[4, 0]])


def test_names_that_no_pattern_can_spell_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"can't spell the parameter name 'a\*'"):
        draft(None, {Coordinate(): {"a*": (2,)}}, Layout())
