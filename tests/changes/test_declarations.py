"""A declaration of changes that says two things of a tensor, or that would change what it has changed, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ucp
from tests.changes.test_changes import ROWS, WIDTH, Net, Run, adam, made, resumed, same, states
from ucp.errors import BadArgument, SpecError


class WithRamp(Net):
    """With a buffer of floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.arange(7) / 3)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    torch.manual_seed(0)
    return Run(tmp_path / "saved", WithRamp())


def converted(run: Run, changes: dict[str, Any]) -> ucp.Checkpoint:
    out = run.folder.with_name("out")
    ucp.convert(run.folder, out, changes=changes)
    return ucp.open(out)


@pytest.mark.parametrize("state_first", [True, False])
def test_a_state_that_is_named_keeps_its_type_beside_the_others(run: Run, state_first: bool) -> None:
    """It was rounded with all others, and widened again."""
    parts = [("*:exp_avg_sq", "float32"), ("*", "bfloat16")]
    changes = {"dtype": dict(parts if state_first else parts[::-1])}
    with converted(run, changes) as out:
        for name, had in run.had.items():
            assert torch.equal(out.read(name, "exp_avg_sq"), had["exp_avg_sq"])
            assert torch.equal(out.read(name, "exp_avg"), had["exp_avg"].bfloat16())


def test_two_element_types_of_a_tensor(run: Run) -> None:
    with pytest.raises(BadArgument, match=r"'\*' says bfloat16 and 'norm.\*' says float16 of 'norm.weight:"):
        converted(run, {"dtype": {"*": "bfloat16", "norm.*": "float16"}})
    assert not run.folder.with_name("out").exists()


def test_buffers_are_no_masters(run: Run) -> None:
    """A pattern that is about parameters does not round them; one that is about them alone does."""
    with converted(run, {"dtype": {"*": "bfloat16"}}) as out:
        assert torch.equal(out.read("ramp"), run.model.ramp)
        assert out.read("norm.weight").dtype == torch.bfloat16
    model = WithRamp()
    model.ramp = torch.zeros(7, dtype=torch.bfloat16)
    found, report = resumed(run, model, {"dtype": {"r*p": "bfloat16"}})
    assert torch.equal(model.ramp, run.model.ramp.bfloat16())
    assert report.changes == ("dtype: 1 tensor from float32 to bfloat16, rounded once",)
    same(found["norm.weight"], run.had["norm.weight"])


def test_two_sizes_of_a_parameter(run: Run) -> None:
    """It was made smaller, and then larger again with rows of zeros in place of its own."""
    sizes = {"embed.*": [5, WIDTH], "embed.weight": [ROWS + 1, WIDTH]}
    with pytest.raises(BadArgument, match=r"'embed.\*' says \[5, 6\] and 'embed.weight' says \[12, 6\]"):
        converted(run, {"resized": sizes, "new_rows": "zeros"})


TURNED: dict[str, dict[str, Any]] = {
    "two change names": {
        "names": {
            "layers.0.q.weight": "layers.0.k.weight",
            "layers.0.k.weight": "layers.0.q.weight",
        }
    },
    "another order within": {
        "sizes": {"two": 2, "half": WIDTH // 2, "hidden": WIDTH},
        "parameters": {"layers.0.q.weight": "(two half) hidden"},
        "names": {"layers.0.q.weight": {"from": "layers.0.q.weight", "as": "(half two) hidden"}},
    },
}


@pytest.mark.parametrize("what", TURNED)
def test_what_the_next_restart_would_change_again(run: Run, what: str) -> None:
    """Nothing tells the changed checkpoint from the first, so a load with the same declaration would change it once
    more. A conversion is made once."""
    model = WithRamp()
    before = states(model, adam(model))
    with pytest.raises(BadArgument, match=r"would change it once more.*ucp convert --changes"):
        resumed(run, model, TURNED[what])
    for name, had in before.items():
        assert torch.equal(dict(model.named_parameters())[name], had["param"])
    q, k = (run.had[f"layers.0.{one}.weight"] for one in "qk")
    with converted(run, TURNED[what]) as out:
        for state in ("param", "exp_avg"):
            found = out.read("layers.0.q.weight", state)
            if what == "two change names":
                assert torch.equal(found, k[state])
                assert torch.equal(out.read("layers.0.k.weight", state), q[state])
            else:
                turned = q[state].view(2, WIDTH // 2, WIDTH).transpose(0, 1).reshape(WIDTH, WIDTH)
                assert torch.equal(found, turned)


def test_a_new_name_and_what_was_removed_serve_all_restarts(run: Run, tmp_path: Path) -> None:
    """The second checkpoint has nothing of what was removed, and that is no error."""
    changes = {"names": {"tail.weight": "head.weight"}, "removed": ["ramp"]}
    first, again = made(5, head="tail"), made(6, head="tail")
    optimizer = adam(first)
    ucp.load_training(run.folder, model=first, optimizer=optimizer, changes=changes)
    ucp.save_training(tmp_path / "again", model=first, optimizer=optimizer, step=4)
    report = ucp.load_training(tmp_path / "again", model=again, optimizer=adam(again), changes=changes)
    assert report.tensors.changes == ()
    assert torch.equal(again.tail.weight, run.had["head.weight"]["param"])


def test_weights_that_are_kept_in_more_bits_are_not_rounded_at_each_restart(run: Run) -> None:
    """A model in float32 beside a declaration of bfloat16, as masters beside a config's bf16."""
    changes = {"dtype": {"*": "bfloat16"}, "removed": ["ramp"]}
    with pytest.raises(BadArgument, match=r"would be rounded to bfloat16, and here it is float32"):
        resumed(run, made(5), changes)
    resumed(run, made(5).bfloat16(), changes)


@pytest.mark.parametrize("changes", [{"resized": {"*": [0, 4]}}, {"old_sizes": {"vocab": 0}}])
def test_sizes_are_from_1(run: Run, changes: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"whole numbers? from 1") as caught:
        converted(run, changes)
    assert "\n" not in str(caught.value)
    assert not run.folder.with_name("out").exists()
