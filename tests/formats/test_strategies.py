"""Trainer, Accelerate and Lightning under DDP, FSDP and DeepSpeed on two ranks: what they write is read whole.

The truth is what the writers' models and optimizers held. A plain program then takes the framework's next losses.
"""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ucp
from tests.engines.pool import RankPool
from tests.formats import harm, live_jobs, strategies
from tests.formats.live_jobs import LlamaRun
from ucp.cli import main as commands
from ucp.errors import DamagedCheckpoint, UcpError, UnsafePickle
from ucp.inspection.listing import listing
from ucp.inspection.verify import verify

pytestmark = pytest.mark.slow

LOOPS = {"callbacks", "epoch", "global_step", "loops", "pytorch-lightning_version"}


@dataclass(frozen=True)
class Kind:
    """Who writes, and how; what it is opened as, and what of the training state is found."""

    program: str
    strategy: str
    format: str
    client: frozenset[str]
    step: int | None = strategies.SAVED
    ranks: int = 2  # whose generators are kept
    own: bool = True  # whether the framework's own resume goes on as the run that wrote it

    @property
    def prefix(self) -> str:
        return "model." if self.program == "lightning" else ""

    @property
    def run(self) -> LlamaRun:
        scheduler = {"trainer": "linear", "accelerate": "twice"}.get(self.program, "exponential")
        return LlamaRun(self.program == "lightning", self.program == "trainer", scheduler)


TRAINER, ACCELERATE = frozenset({"trainer_state"}), frozenset({"step"})
KINDS = [
    Kind("trainer", "ddp", "trainer", TRAINER),
    Kind("trainer", "fsdp1-sharded", "trainer", TRAINER, own=False),
    Kind("trainer", "fsdp1-full", "trainer", TRAINER),
    Kind("trainer", "fsdp2-sharded", "trainer", TRAINER),
    Kind("trainer", "fsdp2-full", "trainer", TRAINER),
    Kind("trainer", "deepspeed2", "deepspeed", TRAINER),
    Kind("trainer", "deepspeed3", "deepspeed", TRAINER),
    Kind("accelerate", "sharded", "accelerate", ACCELERATE, step=None, own=False),
    Kind("accelerate", "full", "accelerate", ACCELERATE, step=None),
    Kind("lightning", "sharded", "lightning", frozenset(LOOPS), ranks=0),
    Kind("lightning", "full", "torch-file", frozenset(LOOPS), ranks=0),
    Kind("lightning", "deepspeed", "deepspeed", frozenset({*LOOPS, "lr_schedulers"}), ranks=0),
]
EACH = pytest.mark.parametrize("kind", KINDS, ids=[f"{kind.program}-{kind.strategy}" for kind in KINDS])
Written = Callable[[Kind], tuple[Path, strategies.Wrote]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """What a kind's program has written, once."""
    folder, made = tmp_path_factory.mktemp("strategies"), dict[Kind, tuple[Path, strategies.Wrote]]()
    with RankPool() as pool:

        def write(kind: Kind) -> tuple[Path, strategies.Wrote]:
            if kind not in made:
                path = folder / f"{kind.program}-{kind.strategy}"
                if kind.format == "torch-file":
                    path = path.with_suffix(".ckpt")
                job = getattr(strategies, kind.program)
                wrote = pool.run(
                    job,
                    str(path),
                    kind.strategy,
                    world_size=2,
                    distributed=False,
                    preload=strategies.PRELOAD,
                    environment=_environment(),
                )[0]
                made[kind] = (path / "checkpoint-2" if kind.program == "trainer" else path), wrote
            return made[kind]

        yield write


def _environment() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@EACH
def test_it_is_read_whole(written: Written, kind: Kind) -> None:
    path, wrote = written(kind)
    with ucp.open(path, **_names(kind, wrote)) as opened:
        assert opened.format == kind.format
        inside = opened.path == path and (path / "training_args.bin").exists()
        assert opened.unread == (("training_args.bin",) if inside else ())
        assert len(wrote.truth) == 20
        for name, states in wrote.truth.items():
            info = opened.parameters[kind.prefix + name]
            assert {*info.states, *info.scalars} - {"step"} == states.keys() - {"step"}
            assert info.scalars.get("step", strategies.SAVED) == strategies.SAVED
            for state in info.states:
                assert torch.equal(opened.read(info.name, state), states[state]), (name, state)
        # A tied weight is a copy under both names, where the writer says of no tie.
        assert opened.parameters.keys() - {kind.prefix + n for n in wrote.truth} <= {f"{kind.prefix}lm_head.weight"}
        kept = opened.training_state
        assert kept.global_steps == kind.step
        assert kept.lr_scheduler is not None
        assert len(kept.extra.get("ranks", ())) == kind.ranks
        assert kept.client_state.keys() == kind.client
        assert sum(len(group.names) for group in kept.param_groups) == len(wrote.truth)
    assert not [found for found in verify(path).findings if found.fault]


@EACH
def test_a_plain_program_goes_on_with_its_losses(
    written: Written, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    path, wrote = written(kind)
    if kind.own and wrote.onward:
        assert wrote.further == wrote.onward
    model = strategies.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    outer = nn.Module()
    outer.model = model
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    groups = [{"params": others}, {"params": norms}] if kind.program == "trainer" else [{"params": model.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=7.0)
    scheduler: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if kind.program == "trainer":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (5 - step) / 5))
    loaded = ucp.load_training(
        path,
        model=outer if kind.prefix else model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        rng=False,
    )
    assert loaded.step == kind.step
    left = "not read, though training state is kept under such names: 'training_args.bin', beside it"
    assert (left in caplog.text) == (kind.strategy.startswith("deepspeed") and kind.program == "trainer")
    rows, losses = torch.arange(strategies.ROW).expand(2, strategies.ROW), []
    for _ in range(strategies.FURTHER):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        for _ in range(2 if kind.program == "accelerate" else 1):  # Accelerate's steps once for every rank
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert tuple(losses) == (wrote.further if kind.own else wrote.onward)


@pytest.fixture(scope="module")
def resumed(written: Written, ranks: RankPool) -> Callable[[str], dict[str, live_jobs.Resumed]]:
    """What a target on two ranks held and saw after it had loaded each kind's checkpoint, one after the other."""
    done: dict[str, dict[str, live_jobs.Resumed]] = {}

    def resume(target: str) -> dict[str, live_jobs.Resumed]:
        if target not in done:
            sources = {str(kind): (kind.run, str(written(kind)[0])) for kind in KINDS}
            job, preload = live_jobs.llama_goes_on, strategies.PRELOAD[:2]
            done[target] = ranks.run(job, target, sources, world_size=2, preload=preload, timeout=300)[0]
        return done[target]

    return resume


@EACH
@pytest.mark.parametrize("target", live_jobs.TARGETS)
def test_live_engines_go_on_with_its_losses(
    written: Written, resumed: Callable[[str], dict[str, live_jobs.Resumed]], kind: Kind, target: str
) -> None:
    _, wrote = written(kind)
    found = resumed(target)[str(kind)]
    for name, states in wrote.truth.items():
        held = found.truth[kind.prefix + name]
        assert held.keys() == {*states, "step"}
        for state, tensor in held.items():
            assert torch.equal(tensor, states.get(state, torch.tensor(float(strategies.SAVED)))), (name, state)
    assert found.further == pytest.approx(wrote.further if kind.own else wrote.onward, rel=1e-6)


@EACH
def test_it_is_converted(written: Written, kind: Kind, tmp_path: Path) -> None:
    path, wrote = written(kind)
    ucp.convert(path, tmp_path / "out", "deepspeed", "dp=3,zero=3", ds_config={}, **_names(kind, wrote))
    with ucp.open(tmp_path / "out") as opened:
        for name, states in wrote.truth.items():
            for state in states.keys() - {"step"}:
                assert torch.equal(opened.read(kind.prefix + name, state), states[state]), (name, state)


def _names(kind: Kind, wrote: strategies.Wrote) -> dict[str, Any]:
    """What tells a file's optimizer, which has numbers for names, of a tie that FSDP has saved as two tensors."""
    if kind.format != "torch-file":
        return {}
    return {"param_names": [[kind.prefix + name for name in wrote.truth]]}


def test_numbers_that_a_tie_leaves_open_are_kept_and_said(written: Written, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = written(next(kind for kind in KINDS if kind.format == "torch-file"))
    with caplog.at_level(logging.WARNING, "ucp"), ucp.open(path) as opened:
        assert not opened.training_state.param_groups
    assert "it has 1 parameters of shape [30, 12], and the model 2" in caplog.text


def _other_names(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["other"] = weights.pop("model.norm.weight")
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize(
    ("strategy", "name", "says"),
    [
        ("ddp", "rng_state_1.pth", "has 'rng_state_0.pth' and no such file of rank 1; a part is missing"),
        ("fsdp2-sharded", "rng_state_1.pth", "has 'rng_state_0.pth' and no such file of rank 1; a part is missing"),
        ("sharded", "random_states_1.pkl", "has 'random_states_0.pkl' and no such file of rank 1; a part is missing"),
    ],
)
def test_the_last_ranks_generators_are_missed(
    written: Written, strategy: str, name: str, says: str, tmp_path: Path
) -> None:
    path, _ = written(next(kind for kind in KINDS if kind.strategy == strategy))
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=says):
        ucp.open(tmp_path / "copy")


@pytest.mark.parametrize(("strategy", "name"), [("ddp", "rng_state_1.pth"), ("sharded", "random_states_1.pkl")])
def test_generators_of_other_devices_are_kept(written: Written, strategy: str, name: str, tmp_path: Path) -> None:
    path, _ = written(next(kind for kind in KINDS if kind.strategy == strategy))
    shutil.copytree(path, tmp_path / "copy")
    states = torch.load(tmp_path / "copy" / name, weights_only=False)
    torch.save({**states, "npu": torch.arange(3)}, tmp_path / "copy" / name)
    with ucp.open(tmp_path / "copy") as opened:
        of_first, of_second = opened.training_state.client_state["other_generators"]
        assert (of_first, of_second["npu"].tolist()) == ({}, [0, 1, 2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda path: shutil.copy(path.parent / "of_4/model.safetensors", path / "model.safetensors"),
            r"(?s)is not what .*pytorch_model_fsdp.bin' has of the same elements: .* two steps are mixed",
        ),
        (_other_names, "'other' has shape .12. in the model's own files, and 'pytorch_model_fsdp.bin' has no such"),
    ],
)
def test_two_models_of_a_trainer_that_are_not_the_same(
    written: Written, tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    path, _ = written(next(kind for kind in KINDS if kind.strategy == "fsdp1-full"))
    shutil.copytree(path, tmp_path / "checkpoint-2")
    (tmp_path / "of_4").symlink_to(path.with_name("checkpoint-4"))
    change(tmp_path / "checkpoint-2")
    with pytest.raises(DamagedCheckpoint, match=says):
        ucp.open(tmp_path / "checkpoint-2")


def test_their_parent_lists_them(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    folder = next(path for path, _ in map(written, KINDS)).parents[1]
    found = {entry.tag: entry for entry in listing(folder).checkpoints}
    for kind in KINDS:
        path, _ = written(kind)
        (entry,) = (found[tag] for tag in found if (folder / tag) == path or (folder / tag).parent == path)
        assert (entry.format, entry.step, entry.whole) == (kind.format, kind.step, True)
        assert entry.bytes > 10_000
    trainers = [entry for entry in found.values() if entry.tag.startswith("trainer-fsdp2-full/")]
    assert sorted(entry.step or 0 for entry in trainers) == [2, 4, 5]
    assert commands.main(["ls", str(folder / "trainer-fsdp2-full")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines if line.rstrip().endswith("newest")] == ["checkpoint-5"]


# The loss of these files nothing tells: the first say nothing of a run; not every run has a scheduler; weights are
# there twice under FSDP's full form, and a second time beside DeepSpeed's.
NOTHING = {"generation_config.json", "zero_to_fp32.py", "zero_to_torch.py", "training_args.bin", "latest"}
SPARE = {
    "accelerate-sharded": {"scheduler.bin"},
    "accelerate-full": {"scheduler.bin", "random_states_1.pkl"},
    "trainer-fsdp1-full": {"config.json", "model.safetensors", "pytorch_model_fsdp.bin"},
    "trainer-fsdp2-full": {"config.json", "model.safetensors", "pytorch_model_fsdp.bin"},
    "trainer-deepspeed2": {"config.json", "model.safetensors"},
    "trainer-deepspeed3": {"config.json"},
}
NOT_READ = {"trainer-deepspeed2": {"config.json", "model.safetensors"}, "trainer-deepspeed3": {"config.json"}}


@EACH
def test_no_loss_goes_unsaid(written: Written, kind: Kind) -> None:
    path, name = written(kind)[0], f"{kind.program}-{kind.strategy}"
    assert harm.unnoticed(path, harm.remove) - NOTHING == SPARE.get(name, set())
    assert harm.unnoticed(path, harm.truncate) - NOTHING == NOT_READ.get(name, set())
    assert issubclass(harm.of_half(path)[0], UcpError)


@EACH
def test_a_key_too_many_is_kept_and_its_class_named(written: Written, kind: Kind) -> None:
    path, _ = written(kind)
    for says in harm.with_surplus(path, {}).values():
        assert "tests.formats.harm.Own" in says
        assert "--skip-unknown-objects" in says
    assert set(harm.with_surplus(path, {"skip_unknown_objects": True}).values()) == {"kept"}


@pytest.mark.parametrize(
    ("strategy", "untold"),
    [
        ("ddp", {"model.safetensors"}),
        ("fsdp1-full", set()),
        ("fsdp2-sharded", {f"pytorch_model_fsdp_0/__{rank}_0.distcp" for rank in (0, 1)}),
        ("deepspeed3", set()),
    ],
)
def test_files_of_another_step_are_told(written: Written, strategy: str, untold: set[str]) -> None:
    """But for weights and generators, which tell no step."""
    path, _ = written(next(kind for kind in KINDS if (kind.program, kind.strategy) == ("trainer", strategy)))
    found = harm.unnoticed(path, harm.of_another(path, path.with_name("checkpoint-4")))
    same = {"rng_state_0.pth", "rng_state_1.pth", "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"}
    assert found - same == untold


class Stopper:
    """A callback's state of a class that nothing here knows."""

    def __init__(self) -> None:
        self.patience = torch.tensor([3])


@pytest.mark.parametrize(
    ("strategy", "name", "key"),
    [
        ("deepspeed", "checkpoint/mp_rank_00_model_states.pt", "callbacks"),
        ("sharded", "meta.pt", "callbacks"),
    ],
)
def test_callbacks_of_unknown_classes_are_skipped_when_asked(
    written: Written, strategy: str, name: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, wrote = written(next(k for k in KINDS if (k.program, k.strategy) == ("lightning", strategy)))
    shutil.copytree(path, tmp_path / "copy")
    state = torch.load(tmp_path / "copy" / name, weights_only=False)
    torch.save({**state, key: {"stop": Stopper(), "best": 0.5}}, tmp_path / "copy" / name)
    with pytest.raises(UnsafePickle, match=r"Stopper.*skip_unknown_objects \(--skip-unknown-objects\)"):
        ucp.open(tmp_path / "copy")
    ucp.convert(tmp_path / "copy", tmp_path / "out", options={"skip_unknown_objects": True})
    assert "objects of tests.formats.test_strategies.Stopper are left out" in caplog.text
    with ucp.open(tmp_path / "out") as opened:
        kept = opened.training_state.client_state[key]
        assert kept["best"] == 0.5
        assert kept["stop"]["patience"].tolist() == [3]
        name = "model.model.norm.weight"
        assert torch.equal(opened.read(name, "exp_avg"), wrote.truth["model.norm.weight"]["exp_avg"])
