"""What inspect says, against sums made another way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ucp
from tests.formats import raw
from tests.inspection.conftest import OLDER
from ucp.catalog import Catalog, SourceFile, TrainingState
from ucp.errors import BadArgument
from ucp.geometry import box, concat, flat_ranges, whole
from ucp.inspection.display import age_text, count_text, cut_text, seconds_text
from ucp.inspection.owners import FileOwners, file_owners
from ucp.inspection.summary import families, fragments, matching, summarise, tree
from ucp.parallel.mesh import Layout
from ucp.units import bytes_text


def test_sums(virtual: Path, made: raw.Raw) -> None:
    with ucp.open(virtual) as checkpoint:
        found = summarise(checkpoint)
    sizes = {key: array.nbytes for key, array in made.truth.items()}
    assert found.bytes == sum(sizes.values())
    assert found.elements == sum(array.size for (_, state), array in made.truth.items() if state == "param")
    assert {p.name: p.bytes for p in found.parameters} == {
        name: sum(n for (other, _), n in sizes.items() if other == name) for name in made.catalog.parameters
    }
    assert found.states["exp_avg"]["bytes"] == sum(n for (_, state), n in sizes.items() if state == "exp_avg")
    assert found.step == 7
    assert found.layout == {"dp": 3, "tp": 1, "pp": 1, "ep": 1, "zero": 1}
    assert {h.name: h.bytes for h in found.holders}["model.bin"] == 6 * 5 * 2 + 9 + 8
    assert sum(h.bytes for h in found.holders) == found.bytes
    assert found.file_bytes == sum((made.catalog.files[k]).size for k in range(4))
    body = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert body["schema"] == "ucp.inspect/1"


def test_a_native_checkpoint_holds_what_its_ranks_hold() -> None:
    """Bytes of each rank's masters (saved without their padding) by torch's own reading, and of as long two moments."""
    folder = OLDER / "0.14.4-z1-bf16"
    with ucp.open(folder) as checkpoint:
        found = summarise(checkpoint)
    rank = {h.name: h.bytes for h in found.holders}
    for r in range(2):
        path = folder / f"global_step3/bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt"
        state = torch.load(path, weights_only=False, map_location="cpu")["optimizer_state_dict"]
        assert rank[f"rank {r}"] == 3 * sum(t.nbytes for t in state["single_partition_of_fp32_groups"])


@pytest.mark.parametrize("state", raw.STATES)
def test_fragments_lead_to_the_elements(virtual: Path, made: raw.Raw, state: str) -> None:
    """Read at the places that are named, row by row."""
    truth = made.truth["layer.0.weight", state]
    with ucp.open(virtual) as checkpoint:
        found = fragments(checkpoint.catalog, "layer.0.weight", state)
    assert sum(int(np.prod(one.sizes)) for one in found) == truth.size
    for one in found:
        box = tuple(slice(o, o + n) for o, n in zip(one.offsets, one.sizes, strict=True))
        flat = np.fromfile(one.file, np.float32, int(np.prod(one.sizes)), offset=one.byte)
        assert np.array_equal(flat, truth[box].reshape(-1))


def test_the_tree_adds_up(virtual: Path) -> None:
    with ucp.open(virtual) as checkpoint:
        found = summarise(checkpoint)
    root = tree(found.parameters)
    assert (root.parameters, root.elements, root.bytes) == (len(found.parameters), found.elements, found.bytes)
    (layer,) = [child for child in root.children if child.name == "layer"]
    assert layer.bytes == sum(p.bytes for p in found.parameters if p.name.startswith("layer."))
    assert [leaf.name for leaf in layer.children[0].children] == ["weight", "bias"]


def test_layers_of_the_same_shapes_are_one_line(tmp_path: Path) -> None:
    shapes = {f"layers.{k}.{part}": (4, 3) for k in range(12) for part in ("up", "down")} | {"norm.0": (4,)}
    made = raw.make(tmp_path / "raw", shapes=shapes)
    with ucp.open(raw.virtual_checkpoint(tmp_path / "v", made)) as checkpoint:
        found = families(summarise(checkpoint).parameters)
    rows = {name: n for name, _, n in found}
    assert rows["layers.{0-11}.up"] == rows["layers.{0-11}.down"] == 12
    assert rows["norm.0"] == 1


def test_cuts_in_words() -> None:
    rows = concat([box((0, 0), (2, 3)), box((2, 0), (2, 3), buffer=1)], 2)
    ranks = ["rank 0", "rank 1"]
    assert cut_text((4, 3), rows, ranks) == "2 parts of dimension 0, over 2 ranks"
    assert cut_text((4, 3), rows, ["a.bin", "rank 1"]) == "2 parts of dimension 0, over 2 files"
    assert cut_text((4, 3), rows, ["a.bin"]) == "2 parts of dimension 0, in one file"
    assert cut_text((4, 3), flat_ranges((4, 3), [0, 5], [5, 12], [0, 0], [0, 1]), ranks) == "flat ranges over 2 ranks"
    assert cut_text((4, 3), whole((4, 3)), ranks[:1]) == "whole"


def test_what_training_wrote_is_from_nowhere_else(tmp_path: Path) -> None:
    ucp.save({"model": {"w": torch.ones(3)}}, tmp_path / "saved")
    ucp.convert(tmp_path / "saved", tmp_path / "converted")
    with ucp.open(tmp_path / "saved") as saved, ucp.open(tmp_path / "converted") as converted:
        assert ", from" not in saved.catalog.writer
        assert converted.catalog.writer == f"{saved.catalog.writer}, from a checkpoint of {saved.catalog.writer}"


def test_a_glob_that_matches_nothing() -> None:
    assert matching(["a.b", "a.c"], "*.c") == ["a.c"]
    with pytest.raises(BadArgument, match=r"--param x\*: matches none of 2 parameters"):
        matching(["a.b", "a.c"], "x*")


def owners(*paths: str) -> FileOwners:
    files = tuple(SourceFile(f"/run/{path}", 1, 0) for path in paths)
    return file_owners(Catalog("universal", "", Layout(), files, {}, {}, TrainingState()))


def test_who_wrote_a_file() -> None:
    def names(*paths: str) -> list[str]:
        found = owners(*paths)
        return [found[k] for k in range(len(paths))]

    assert names("zero_pp_rank_10_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt") == [
        "rank 10",
        "rank 2",
    ]
    assert names("zero_pp_rank_1_mp_rank_03_model_states.pt", "mp_rank_01_model_states.pt") == [
        "rank 1 of mp 3",
        "model file of mp 1",
    ]
    assert names("rank-00003-of-00016.safetensors", "__7_0.distcp", "model.safetensors") == [
        "rank 3",
        "rank 7",
        "model.safetensors",
    ]
    many = owners(*(f"rank-{r:05d}-of-00012.safetensors" for r in range(12)))
    assert many.names == tuple(f"rank {r}" for r in range(12))


def test_numbers_in_words() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 12_345, 123_456, 999_600, 7e12)] == [
        "0 B", "999 B", "1.00 kB", "12.3 kB", "123 kB", "1.00 MB", "7.00 TB",
    ]  # fmt: skip
    assert [count_text(n) for n in (12, 1234, 7_240_000_000)] == ["12", "1,234", "7.24 billion"]
    assert [seconds_text(n) for n in (1.44, 61, 3900)] == ["1.4 s", "1 min 01 s", "1 h 05 min"]
    assert [seconds_text(n) for n in (0, 0.04, 0.1)] == ["less than 0.1 s", "less than 0.1 s", "0.1 s"]
    assert [age_text(0, now) for now in (5, 120, 7200, 86400 * 3)] == [
        "just now",
        "2 minutes ago",
        "2 hours ago",
        "3 days ago",
    ]
