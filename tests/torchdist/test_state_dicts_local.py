"""State dicts in one process, without a process group: every element type, every refusal, all or nothing."""

from __future__ import annotations

import copy
import re
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ucp
from tests.engines.truth import same
from tests.formats.dcp import states
from ucp import limits
from ucp.errors import DigestMismatch, Mismatch, NotACheckpoint, SaveFailed, Unsupported
from ucp.saving.save import SaveReport
from ucp.storage.metrics import read_metrics

Pair = namedtuple("Pair", "tensor number")


@pytest.mark.parametrize("make", [states.nested, states.flattened, states.types])
@pytest.mark.parametrize("save", ["save", "async_save", "consolidated"])
def test_what_is_saved_is_loaded(tmp_path: Path, make: Any, save: str) -> None:
    truth = make()
    if save == "async_save":
        pending = ucp.async_save(truth, tmp_path / "saved", memory=1)
        assert pending.result().path == str(tmp_path / "saved")
        assert pending.result().memory == limits.SAVE_WINDOW_BYTES
        assert pending.done()
    else:
        ucp.save(truth, tmp_path / "saved")
    path = tmp_path / "saved"
    if save == "consolidated":
        path = tmp_path / "consolidated"
        ucp.convert(tmp_path / "saved", path)
    loaded = states.blank(truth)
    places = {id(t) for t in leaves(loaded)}
    report = ucp.load(loaded, path)
    assert same(loaded, truth)
    assert {id(t) for t in leaves(loaded)} == places
    assert (report.left, report.unused) == ((), ())


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for item in items for t in leaves(item)]


def test_plain_values_of_all_kinds(tmp_path: Path) -> None:
    truth: dict[str, Any] = {
        "numbers": {"int": 1 << 70, "float": 0.1, "inf": float("inf"), "none": None, "yes": True, "complex": 1j},
        "texts": ["a", b"\x00\xff", "\u00fc"],
        "deep": [{"tensor": torch.arange(3), "pair": (torch.ones(2), "kept")}, []],
        "tuple": Pair(torch.arange(2.0), 4),
        "dtype": torch.bfloat16,
        "shape": torch.Size([3, 4]),
        "device": torch.device("cpu"),
        "empty": {},
        3: "a key that is no text",
    }
    ucp.save(truth, tmp_path / "saved")
    loaded = copy.deepcopy(truth)
    loaded["numbers"] = dict.fromkeys(truth["numbers"])
    loaded["texts"] = loaded["dtype"] = loaded["shape"] = loaded["device"] = loaded[3] = None
    loaded["deep"][0]["pair"] = (torch.zeros(2), None)
    loaded["tuple"] = Pair(torch.zeros(2), None)
    ucp.load(loaded, tmp_path / "saved")
    assert same(loaded, truth)
    assert isinstance(loaded["tuple"], Pair)


class Sparse(torch.Tensor):
    """A subclass, as quantisation libraries have them."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.eye(3).to_sparse(), "'deep.x' is a sparse or nested tensor"),
        (torch.ones(2, device="meta"), "'deep.x' is on the meta device"),
        (torch.ones(2).as_subclass(Sparse), "'deep.x' is of class Sparse"),
        (torch.ones(2, dtype=torch.complex64).conj(), "'deep.x' is one with its conjugate"),
        (torch.ones(2, dtype=torch.complex32), "'deep.x': dtype 'complex32' cannot be stored"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "'deep.x' is a quantised tensor"),
        (nn.Linear(2, 2), "deep.x: a value of class torch.nn.modules.linear.Linear cannot be stored"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path, value: Any, text: str) -> None:
    with pytest.raises(Unsupported, match=text.replace(".", r"\.")):
        ucp.save({"deep": {"x": value}, "y": torch.ones(1)}, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"two entries .* have the flat name 'a\.b'"):
        ucp.save({"a": {"b": 1}, "a.b": 2}, tmp_path / "saved")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ucp.save(states.nested(), tmp_path / "saved")
    return tmp_path / "saved"


def test_a_load_that_is_refused_changes_nothing(saved: Path) -> None:
    truth = states.nested()
    for change, text in (
        (
            {"model": {"up.weight": torch.zeros(5, 11)}},
            r"'model.up.weight' is \[11, 5\] in the checkpoint and \[5, 11\]",
        ),
        ({"model": {"up.weight": torch.zeros(11, 5).half()}}, "float32 in the checkpoint and float16 here"),
        ({"model": {"seen": torch.zeros((), dtype=torch.int32)}}, "int64 in the checkpoint and int32 here"),
        ({"model": {"other": torch.zeros(3)}}, "1 are not in the checkpoint: 'model.other'"),
        ({"epoch": None, "era": 3}, "1 are not in the checkpoint: 'era'"),
    ):
        asked = {**{k: v for k, v in states.blank(truth).items() if k not in change}, **change}
        before = copy.deepcopy(asked)
        with pytest.raises(Mismatch, match="nothing was loaded") as caught:
            ucp.load(asked, saved)
        assert re.search(text, str(caught.value))
        assert same(asked, before)


def test_damage_changes_nothing(saved: Path) -> None:
    file = next(saved.glob("rank-*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    asked = states.blank(states.nested())
    before = copy.deepcopy(asked)
    with pytest.raises(DigestMismatch):
        ucp.load(asked, saved)
    assert same(asked, before)


def test_part_of_a_checkpoint(saved: Path) -> None:
    """What is not asked for is told; what is missing can be left, by name; weights go into wider types."""
    truth = states.nested()
    wanted = {"model": {k: torch.zeros_like(v, dtype=torch.float64) for k, v in truth["model"].items() if v.dim() == 2}}
    wanted["model"]["lora.a"] = torch.ones(2)
    report = ucp.load(wanted, saved, allow_missing=["model.lora.*"])
    assert report.left == ("model.lora.a",)
    assert {"gain", "seen", "up.weight:exp_avg", "epoch", "data.position"} <= set(report.unused)
    assert same(wanted["model"]["up.weight"], truth["model"]["up.weight"].double())
    assert wanted["model"]["lora.a"].tolist() == [1, 1]


def test_the_optimizer_alone(saved: Path, tmp_path: Path) -> None:
    truth = {"optim": states.nested()["optim"]}
    loaded = states.blank(truth)
    ucp.load(loaded, saved)
    assert same(loaded, truth)
    ucp.save(truth, tmp_path / "alone")
    loaded = states.blank(truth)
    ucp.load(loaded, tmp_path / "alone")
    assert same(loaded, truth)


def test_hyperparameters_follow_their_parameters(tmp_path: Path) -> None:
    """Groups in another order, one of them split; what groups disagree about is refused."""
    net, optimizer = states.trained()
    ucp.save_training(tmp_path / "saved", model=net, optimizer=optimizer)
    again, _ = states.trained(seed=1)
    matrices = [p for p in again.parameters() if p.dim() > 1]
    rest = [p for p in again.parameters() if p.dim() < 2]
    other = torch.optim.AdamW([{"params": rest}, {"params": matrices[1:]}, {"params": matrices[:1]}], lr=9, fused=False)
    ucp.load_training(tmp_path / "saved", model=again, optimizer=other)
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in other.param_groups] == [
        (0.5, 0.0, (0.9, 0.98)),
        (0.01, 0.01, (0.9, 0.98)),
        (0.01, 0.01, (0.9, 0.98)),
    ]
    assert other.param_groups[0]["fused"] is False
    assert same(other.state[again.gain], optimizer.state[net.gain])
    merged = torch.optim.AdamW(again.parameters(), lr=9)
    with pytest.raises(Mismatch, match=r"'optim.param_groups.0.lr' is for parameters of .* groups \[0, 1\]"):
        ucp.load_training(tmp_path / "saved", model=again, optimizer=merged)


def test_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    """Saving it does not step it, and loading leaves none of another's states."""
    net, stepped = states.trained()
    fresh = torch.optim.AdamW(net.parameters(), lr=0.3)
    ucp.save_training(tmp_path / "saved", model=net, optimizer=fresh)
    assert not fresh.state
    assert net.gain.grad is not None
    weights = copy.deepcopy(net.state_dict())
    net(torch.tensor([1])).backward()
    stepped.step()
    report = ucp.load_training(tmp_path / "saved", model=net, optimizer=(other := torch.optim.AdamW(net.parameters())))
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.3
    assert same(net.state_dict(), weights)
    assert report.step is None
    used = torch.optim.AdamW(net.parameters())
    used.step()
    ucp.load_training(tmp_path / "saved", model=net, optimizer=used)
    assert not used.state


def test_a_training_state_that_does_not_fit(tmp_path: Path) -> None:
    net, optimizer = states.trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ucp.save_training(tmp_path / "saved", model=net, optimizer=optimizer, lr_scheduler=scheduler, step=3)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    with pytest.raises(Mismatch, match="it is another scheduler's"):
        ucp.load_training(tmp_path / "saved", model=net, optimizer=optimizer, lr_scheduler=other)
    smaller = states.Net()
    del smaller.up
    smaller.forward = lambda tokens: smaller.head(smaller.embed(tokens)).sum()  # type: ignore[method-assign]
    with pytest.raises(Mismatch, match=r"2 of the checkpoint would stay unused: up.bias, up.weight"):
        ucp.load_training(tmp_path / "saved", model=smaller)
    ucp.load_training(tmp_path / "saved", model=smaller, allow_unused=["up.*"])
    assert same(smaller.head.weight.detach(), net.head.weight.detach())


@pytest.mark.parametrize("how", ["save", "async_save", "training", "training in the background"])
def test_timings_are_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    path = tmp_path / "step1"
    model = nn.Linear(3, 2)
    state = {"model": model.state_dict()}
    with caplog.at_level("INFO", "ucp"):
        if how == "save":
            report = ucp.save(state, path, metrics=True)
        elif how == "async_save":
            report = ucp.async_save(state, path, metrics=True).result()
        else:
            found = ucp.save_training(path, model=model, background="background" in how, metrics=True)
            report = found if isinstance(found, SaveReport) else found.result()
        if "training" in how:
            loaded = ucp.load_training(path, model=model, metrics=True).tensors
        else:
            loaded = ucp.load(state, path, metrics=True)
    save, load = read_metrics(tmp_path)
    assert (save["what"], save["bytes"], save["checkpoint"]) == ("save", report.written, str(path))
    assert save["seconds"] == pytest.approx(report.seconds, abs=1e-5)
    assert (load["what"], load["bytes"], load["checkpoint"]) == ("load", loaded.bytes_read, str(path))
    assert [*load["seconds"]] == ["open", "plan", "read", "apply", "prove", "wait"]
    assert load["seconds"] == pytest.approx(loaded.seconds, abs=1e-5)
    assert load["overlapping"] == pytest.approx(loaded.overlapping, abs=1e-5)
    assert str(report) in caplog.messages
    assert str(loaded) in caplog.messages
    ucp.save(state, path)  # without being asked nothing is recorded
    ucp.load(state, path)
    assert len(read_metrics(tmp_path)) == 2


def test_replacing_and_refusing_a_destination(saved: Path, tmp_path: Path) -> None:
    ucp.save({"w": torch.ones(2)}, saved)
    with ucp.open(saved) as checkpoint:
        assert list(checkpoint.parameters) == ["w"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(ucp.UcpError, match="holds no checkpoint, so it is not replaced"):
        ucp.save({"w": torch.ones(2)}, tmp_path / "mine")
    with pytest.raises(NotACheckpoint):
        ucp.load({"w": torch.ones(2)}, tmp_path / "nothing")


def test_a_failure_in_the_background_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_writers: Callable[[], None]
) -> None:
    from ucp.saving import share

    def fail(*_: Any) -> None:
        raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(share, "write_at", fail)
        pending = ucp.async_save({"w": torch.ones(9)}, tmp_path / "saved")
        with pytest.raises(ucp.UcpError, match="broken"):
            pending.result()
    with pytest.raises(SaveFailed, match="the error was raised before"):
        pending.result()
    forked_writers()
    assert ucp.async_save({"w": torch.ones(9)}, tmp_path / "saved").result().nbytes > 0


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    """A tied parameter comes from whichever of its names the checkpoint has, and from both only where they agree."""
    ucp.save({"model": {"embed": torch.arange(6.0)}}, tmp_path / "one")
    ucp.save({"model": {"embed": torch.arange(6.0), "head": torch.arange(6.0)}}, tmp_path / "two")
    ucp.save({"model": {"embed": torch.arange(6.0), "head": torch.zeros(6)}}, tmp_path / "differ")
    shared = torch.zeros(6)
    tied = {"model": {"head": shared, "embed": shared}}
    for name in ("one", "two"):
        shared.zero_()
        ucp.load(tied, tmp_path / name)
        assert shared.tolist() == list(range(6))
    shared.fill_(7)
    with pytest.raises(Mismatch, match=r"'model\.\w+' and 'model\.\w+' are one tensor here, .*different values"):
        ucp.load(tied, tmp_path / "differ")
    assert shared.tolist() == [7] * 6
    apart = {"model": {"head": torch.ones(6), "embed": torch.ones(6)}}
    ucp.save(tied, tmp_path / "tied")
    ucp.load(apart, tmp_path / "tied")
    assert (apart["model"]["head"].tolist(), apart["model"]["embed"].tolist()) == ([7] * 6, [7] * 6)
    with pytest.raises(
        Unsupported, match=r"'model\.a' and 'model\.b' of the state dict are one memory seen in two ways"
    ):
        ucp.load({"model": {"a": shared, "b": shared.view(2, 3)}}, tmp_path / "one")
