"""What does not fit is refused before anything changes, by all ranks together, and says what is wrong.

Every engine here takes several bad loads in turn; each has to leave it as it was, to the bit, and none may hang. At
the end the same engine takes a good one.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import ucp
from tests.attacks import formats, plant
from tests.attacks.test_virtual_paths import move
from tests.deepspeed import jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.jobs import Attempt, Refusal
from tests.engines import releases
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.sources import Sources
from tests.engines.truth import Truth, known
from ucp.formats.universal import manifest

pytestmark = pytest.mark.slow

PLAIN = Case(stage=1, dp=2)
TARGETS = [Case(stage=0, dp=2), Case(stage=1, dp=3), Case(stage=2, dp=2, dtype="bf16"), Case(stage=3, dp=2)]

# Sources that do not fit a plain engine, with the error's class and what its text has to say.
MISFITS: list[tuple[Case, str, list[str]]] = [
    (
        PLAIN.but(frozen=True),
        "Mismatch",
        [r"3 of the checkpoint would stay unused: ", r"parameter 'adapter\.weight' \[11, 7\]", r"'adapter_gain' \[1\]"],
    ),
    (PLAIN.but(buffers=False), "Mismatch", [r"2 would stay unrestored: buffer 'running' \[7\], buffer 'seen' \[\]"]),
    (
        PLAIN.but(optimizer="sgd"),
        "Mismatch",
        [r"optimizer state 'exp_avg_sq' of", r"optimizer state 'momentum_buffer' of", "would stay unused"],
    ),
    (PLAIN.but(optimizer="plain_sgd"), "Mismatch", [r"would stay unrestored: optimizer state 'exp_avg' of"]),
    (
        PLAIN.but(groups=2),
        "Mismatch",
        [r"param group 0 here holds parameters of the checkpoint's groups 0 and 1", "weight_decay"],
    ),
    (
        PLAIN.but(tied=True),
        "Mismatch",
        [r"parameter 'head\.weight' \[29, 7\]"],
    ),
]


def check(found: list[list[Refusal]], k: int, kind: str, patterns: list[str]) -> None:
    """The k-th attempt was refused by every rank, in the same words, and nothing had changed."""
    of_ranks = [attempts[k] for attempts in found]
    assert {r.kind for r in of_ranks} == {kind}, of_ranks[0]
    assert {r.text.partition(": ")[2] if r.text.startswith("rank ") else r.text for r in of_ranks} == {
        of_ranks[0].text.partition(": ")[2] if of_ranks[0].text.startswith("rank ") else of_ranks[0].text
    }
    for pattern in patterns:
        assert re.search(pattern, of_ranks[0].text), of_ranks[0].text
    assert [r.changed for r in of_ranks] == [()] * len(of_ranks)


@pytest.mark.parametrize("target", TARGETS, ids=lambda case: case.label)
def test_checkpoints_of_other_models_and_optimizers(ranks: RankPool, sources: Sources, target: Case) -> None:
    tries = []
    for case, _, _ in MISFITS:
        run = sources.get(case)
        tries.append(Attempt(run.folder, run.tag))
    good = sources.get(PLAIN)
    tries += [
        Attempt(good.folder, "global_step7"),
        Attempt(good.folder, good.tag, {"custom_load_fn": print}),
        Attempt(good.folder, good.tag),
    ]
    found = ranks.run(jobs.attempts, target, tries, world_size=target.dp)
    for k, (_, kind, patterns) in enumerate(MISFITS):
        check(found, k, kind, patterns)
    k = len(MISFITS)
    check(found, k, "NotACheckpoint", [r"no checkpoint with the tag 'global_step7'; did you mean 'global_step3'"])
    check(found, k + 1, "Unsupported", ["custom_load_fn is not supported"])
    assert [r[k + 2].kind for r in found] == [""] * target.dp
    assert found[0][k + 2].changed


@pytest.mark.parametrize(
    ("change", "patterns"),
    [
        ("wider_gain", [r"1 does not fit: parameter 'gain' \[3\] has shape \[1\] in the checkpoint"]),
        ("another_buffer", [r"1 would stay unrestored: buffer 'extra_buffer' \[2\]"]),
        ("another_parameter", [r"1 would stay unrestored: parameter 'extra' \[2, 3\]"]),
        ("no_shift", [r"1 of the checkpoint would stay unused: parameter 'shift' \[3\]"]),
    ],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_models_that_have_changed(
    ranks: RankPool, sources: Sources, stage: int, change: str, patterns: list[str]
) -> None:
    run = sources.get(PLAIN)
    found = ranks.run(
        jobs.attempts, Case(stage=stage, dp=2), [Attempt(run.folder, run.tag)], change=change, world_size=2
    )
    check(found, 0, "Mismatch", patterns)


def test_engines_that_ask_for_more(ranks: RankPool, sources: Sources) -> None:
    plain, tied = sources.get(PLAIN), sources.get(PLAIN.but(tied=True))
    three = sources.get(Case(stage=2, dp=3, groups=3))
    for target, run, patterns in (
        (
            Case(stage=1, dp=2, tied=True),
            plain,
            [r"'head\.weight' is tied to 'embed\.weight' here, and the checkpoint has different values for them"],
        ),
        (Case(stage=3, dp=2), tied, [r"1 would stay unrestored: parameter 'head\.weight' \[29, 7\]"]),
        (Case(stage=3, dp=2, frozen=True), plain, [r"3 would stay unrestored: parameter 'adapter_gain' \[1\], "]),
        (
            Case(stage=2, dp=3, scheduler=True),
            plain,
            ["has an lr scheduler .WarmupLR., the checkpoint has no state for one"],
        ),
        (Case(stage=0, dp=2, optimizer="sgd"), plain, ["would stay unrestored: optimizer state 'momentum_buffer' of"]),
        (
            Case(stage=3, dp=2, groups=2),
            three,
            [
                r"groups 0 and 2, whose 'betas' differ \(\[0.9, 0.98\] and \(0.8, 0.95\)\)|"
                r"groups 0 and 2, whose '\w+' differ"
            ],
        ),
        (
            Case(stage=2, dp=2, dtype="bf16", low_masters=True, low_states=True),
            plain,
            ["float32 in the checkpoint and bfloat16 here, which would lose bits"],
        ),
    ):
        if target.low_masters and not releases.knows("bf16_master_weights_and_grads"):
            continue  # such a release ignores it, and the engine asks for nothing more
        found = ranks.run(jobs.attempts, target, [Attempt(run.folder, run.tag)], world_size=target.dp)
        check(found, 0, "Mismatch", patterns)


def damage(path: Path, at: int) -> None:
    """Flip one bit."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def middle_of_a_record(path: Path, k: int) -> int:
    """A byte in the middle of the k-th of the longest records."""
    with zipfile.ZipFile(path) as archive:
        info = sorted(archive.infolist(), key=lambda one: -one.file_size)[k]
    header = path.read_bytes()[info.header_offset :]
    name, more = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + 30 + name + more + info.file_size // 2


@pytest.mark.parametrize(
    "target",
    [Case(stage=3, dp=3), Case(stage=0, dp=2, dtype="bf16"), Case(stage=1, dp=3, dtype="bf16")],
    ids=lambda case: case.label,
)
def test_damaged_checkpoints(ranks: RankPool, sources: Sources, target: Case, tmp_path: Path) -> None:
    run = sources.copy(PLAIN, tmp_path / "truncated")
    part = Path(run.folder) / run.tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    middles = [middle_of_a_record(part, k) for k in range(3)]
    part.write_bytes(part.read_bytes()[:-3000])
    good = sources.get(PLAIN)
    ucp.convert(good.folder, tmp_path / "flipped")
    states = next(p for p in (tmp_path / "flipped").rglob("*exp_avg_sq*.safetensors"))
    damage(states, states.stat().st_size // 2)
    records = [sources.copy(PLAIN, tmp_path / f"record-{k}") for k in range(3)]  # masters and states, a bit in each
    for middle, damaged in zip(middles, records, strict=True):
        damage(Path(damaged.folder) / damaged.tag / part.name, middle)
    tries = [
        *(Attempt(damaged.folder, damaged.tag) for damaged in records),
        Attempt(run.folder, run.tag),
        Attempt(str(tmp_path / "flipped")),
        Attempt(good.folder, good.tag),
    ]
    found = ranks.run(jobs.attempts, target, tries, world_size=target.dp)
    for k in range(len(records)):  # no rank reads the whole of one at stages 1 and 3
        check(found, k, "DigestMismatch", [re.escape(part.name), "CRC-32"])
    check(found, -3, "DamagedCheckpoint", [re.escape(part.name)])
    check(found, -2, "DigestMismatch", [re.escape(states.name)])
    assert [r[-1].kind for r in found] == [""] * target.dp


@pytest.mark.parametrize(
    ("target", "source"),
    [(Case(stage=3, dp=3), PLAIN), (Case(stage=1, dp=2), PLAIN.but(stage=3))],
    ids=lambda case: case.label,
)
def test_planted_pickles(ranks: RankPool, sources: Sources, target: Case, source: Case, tmp_path: Path) -> None:
    """Each of a checkpoint's files has a call in its pickle: nothing runs it, and the engine stays as it was."""
    good = sources.get(source)
    planted, flags = [], []
    for path in sorted((Path(good.folder) / good.tag).glob("*.pt")):
        run = sources.copy(source, tmp_path / path.stem)
        planted.append(Path(run.folder) / run.tag / path.name)
        flags.append(tmp_path / f"flag-{path.stem}")
        plant.set_item(planted[-1], ["planted"], plant.call(f"touch {flags[-1]}"))
    assert len(planted) == (4 if source.stage == 3 else 3)
    dcp = formats.make("dcp", tmp_path)
    flags.append(tmp_path / "flag-dcp")
    (dcp / ".metadata").write_bytes(b"\x80\x02" + plant.call(f"touch {flags[-1]}") + b".")
    tries = [*(Attempt(str(path.parents[1]), path.parent.name) for path in planted), Attempt(str(dcp))]
    found = ranks.run(jobs.attempts, target, [*tries, Attempt(good.folder, good.tag)], world_size=target.dp)
    for k in range(len(tries)):
        check(found, k, "UnsafePickle", [r"names posix\.system"])
    assert [flag.name for flag in flags if flag.exists()] == []
    assert [r[-1].kind for r in found] == [""] * target.dp
    for path, flag in zip(planted, flags, strict=False):  # the attacks are real ones
        torch.load(path, weights_only=False)
        assert flag.exists()


def test_a_virtual_checkpoint_that_leads_elsewhere(ranks: RankPool, sources: Sources, tmp_path: Path) -> None:
    run = sources.copy(PLAIN, tmp_path / "run")
    ucp.convert(run.folder, tmp_path / "virtual", virtual=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (first, *_) = json.loads((tmp_path / "virtual" / manifest.NAME).read_bytes())["files"]["path"]
    move(tmp_path / "virtual", shutil.copy2(tmp_path / "virtual" / first, elsewhere / Path(first).name))
    tries = [Attempt(str(tmp_path / "virtual"))]
    found = ranks.run(jobs.attempts, PLAIN, tries, world_size=2)
    check(found, 0, "Unsupported", [r"outside '.*', which it names as its source", r'"ucp": \{"load": \{"trust_paths'])
    trusting = {"load": {"trust_paths": True}}
    found = ranks.run(jobs.attempts, PLAIN, tries, section=trusting, world_size=2)
    assert [r[0].kind for r in found] == ["", ""]
    assert found[0][0].changed


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_rank_that_cannot_read(ranks: RankPool, sources: Sources, stage: int) -> None:
    """The others could load, and do not; none waits for ever."""
    run = sources.get(PLAIN)
    found = ranks.run(jobs.one_rank_cannot_read, Case(stage=stage, dp=3), run.folder, run.tag, world_size=3)
    for rank, (kind, text, changed, loaded) in enumerate(found):
        assert kind == "DamagedCheckpoint"
        assert text.startswith("rank 2: ") == (rank != 2)
        assert "Too many open files" in text
        assert changed == ()
        assert loaded


def test_in_the_middle_of_accumulation(ranks: RankPool, sources: Sources) -> None:
    run = sources.get(PLAIN)
    for stage in (1, 3):
        outcomes = ranks.run(
            jobs.mid_accumulation, Case(stage=stage, dp=2, accumulation=2), run.folder, run.tag, world_size=2
        )
        for kind, text, second in outcomes:
            assert kind == "Mismatch"
            assert "in the middle of gradient accumulation (1 of 2 micro-steps done)" in text
            assert second == "loaded"


@pytest.mark.parametrize(
    ("stage", "zero", "text"),
    [
        (2, {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, r"NVMe offload \(offload_optimizer"),
        (2, {"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, r"NVMe offload \(offload_param"),
        (3, {"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
        (3, {"offload_optimizer": {"device": "cpu", "super_offload": True}}, "SuperOffload"),
        (2, {"zenflow": {"topk_ratio": 0.1}}, "ZenFlow"),
    ],
)
def test_features_that_are_not_supported(
    ranks: RankPool, sources: Sources, stage: int, zero: dict[str, object], text: str
) -> None:
    """The configuration is DeepSpeed's own; it is put into an engine that is built already, since most of these
    features cannot be built without a GPU."""
    run = sources.get(PLAIN)
    found = ranks.run(jobs.unsupported, Case(stage=stage, dp=1), zero, run.folder, run.tag, world_size=1)
    kind, message, changed = found[0]
    assert kind == "Unsupported"
    assert re.search(text, message)
    assert "nothing was changed" in message
    assert changed == ()


def test_versions_of_deepspeed_that_have_not_been_tested(ranks: RankPool) -> None:
    (text,) = ranks.run(jobs.version, "0.99.1", False, world_size=1)
    assert "DeepSpeed 0.99.1 has not been tested" in text
    assert '"allow_untested_version": true' in text
    assert ranks.run(jobs.version, "0.99.1", True, world_size=1) == [""]


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"enable": True}, r"unknown key 'enable'; did you mean 'enabled'\?"),
        ({"load": {"allow_mising": []}}, r"unknown key 'allow_mising'; did you mean 'allow_missing'\?"),
        ({"zzz": 1}, "unknown key 'zzz'; known are enabled"),
        ({"enabled": "yes"}, "'enabled' needs true or false, found 'yes'"),
        ({"load": []}, "'load' needs a dict"),
        ({"load": {"allow_missing": "a"}}, "'allow_missing' needs a list, found 'a'"),
        ({"load": {"allow_unused": [3]}}, r"needs a list of name patterns, found \[3\]"),
        ({"trust_client_state": 1}, "'trust_client_state' needs true or false, found 1"),
    ],
)
def test_mistakes_in_the_configuration(ranks: RankPool, section: dict[str, object], text: str) -> None:
    (found,) = ranks.run(jobs.bad_section, section, world_size=1)
    assert re.search(text, found), found


def test_a_section_that_is_no_object(ranks: RankPool) -> None:
    assert "needs an object" in ranks.run(jobs.bad_section, True, world_size=1)[0]


class TestPermissions:
    """What the caller allows to stay or to go unused, and nothing beside it."""

    def test_allow_missing(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN)
        for stage in (1, 3):
            found = ranks.run(
                jobs.partial,
                Case(stage=stage, dp=2, frozen=True, seed=5),
                Attempt(run.folder, run.tag),
                section={"load": {"allow_missing": ["adapter*"]}},
                world_size=2,
            )[0]
            assert sorted(found.left) == ["adapter.bias", "adapter.weight", "adapter_gain"]
            before, after, truth = known(found.before), known(found.after), known(run.truth)
            assert differences(truth, without_frozen(after)) == []
            assert {n: t.tolist() for n, t in after.frozen.items()} == {n: t.tolist() for n, t in before.frozen.items()}

    def test_allow_unused(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN.but(frozen=True))
        found = ranks.run(
            jobs.partial,
            Case(stage=3, dp=3, seed=5),
            Attempt(run.folder, run.tag),
            section={"load": {"allow_unused": ["adapter.*", "adapter_gain"]}},
            world_size=3,
        )[0]
        assert sorted(found.unused) == ["adapter.bias", "adapter.weight", "adapter_gain"]
        assert differences(without_frozen(known(run.truth)), known(found.after)) == []

    @pytest.mark.parametrize("stage", [0, 1, 3])
    def test_states_by_name(self, ranks: RankPool, sources: Sources, stage: int) -> None:
        """AdamW's checkpoint into SGD with momentum: weights come, the momentum stays."""
        run = sources.get(PLAIN)
        found = ranks.run(
            jobs.partial,
            Case(stage=stage, dp=2, optimizer="sgd", seed=5),
            Attempt(run.folder, run.tag),
            section={"load": {"allow_missing": ["*:momentum_buffer"], "allow_unused": ["*:exp_avg", "*:exp_avg_sq"]}},
            world_size=2,
        )[0]
        before, after, truth = known(found.before), known(found.after), known(run.truth)
        assert differences(truth, after, optimizer=False) == []
        for name, states in after.params.items():
            assert states.keys() == {"param", "momentum_buffer"}
            assert states["momentum_buffer"].tolist() == before.params[name]["momentum_buffer"].tolist()
            assert after.scalars[name] == before.scalars[name]

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_some_states_by_name(self, ranks: RankPool, sources: Sources, stage: int) -> None:
        """amsgrad has one state more than AdamW."""
        run = sources.get(PLAIN)
        found = ranks.run(
            jobs.partial,
            Case(stage=stage, dp=2, optimizer="amsgrad", seed=5),
            Attempt(run.folder, run.tag),
            section={"load": {"allow_missing": ["*:max_exp_avg_sq"]}},
            world_size=2,
        )[0]
        before, after, truth = known(found.before), known(found.after), known(run.truth)
        for name, states in after.params.items():
            for state in ("param", "exp_avg", "exp_avg_sq"):
                assert states[state].tolist() == truth.params[name][state].tolist()
            assert states["max_exp_avg_sq"].tolist() == before.params[name]["max_exp_avg_sq"].tolist()
            assert after.scalars[name] == truth.scalars[name]

    def test_a_parameter_of_a_buffer_by_name(self, ranks: RankPool, sources: Sources) -> None:
        """A new parameter in the middle of flat buffers keeps its weight; everything around it is restored."""
        run = sources.get(PLAIN)
        for stage in (1, 3):
            found = ranks.run(
                jobs.partial,
                Case(stage=stage, dp=2, seed=5),
                Attempt(run.folder, run.tag),
                change="another_parameter",
                section={"load": {"allow_missing": ["extra"]}},
                world_size=2,
            )[0]
            before, after, truth = known(found.before), known(found.after), known(run.truth)
            assert found.left == ("extra",)
            assert after.params["extra"]["param"].tolist() == before.params["extra"]["param"].tolist()
            for name, states in truth.params.items():
                assert {s: t.tolist() for s, t in after.params[name].items()} == {
                    s: t.tolist() for s, t in states.items()
                }

    def test_not_strict(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN.but(buffers=False, frozen=True))
        found = ranks.run(
            jobs.partial,
            Case(stage=2, dp=2, seed=5),
            Attempt(run.folder, run.tag, {"load_module_strict": False}),
            world_size=2,
        )[0]
        before, after, truth = known(found.before), known(found.after), known(run.truth)
        assert sorted(found.left) == ["running", "seen"]
        assert sorted(found.unused) == ["adapter.bias", "adapter.weight", "adapter_gain"]
        assert after.buffers["seen"].tolist() == before.buffers["seen"].tolist() == 2
        assert [d for d in differences(without_frozen(truth), after) if not d.startswith("buffers")] == []

    @pytest.mark.parametrize("target", TARGETS, ids=lambda case: case.label)
    def test_without_optimizer_states(self, ranks: RankPool, sources: Sources, target: Case) -> None:
        run = sources.get(PLAIN.but(optimizer="sgd"))  # whose states would not even fit
        found = ranks.run(
            jobs.partial,
            target.but(seed=5),
            Attempt(run.folder, run.tag, {"load_optimizer_states": False}),
            world_size=target.dp,
        )[0]
        before, after, truth = known(found.before), known(found.after), known(run.truth)
        assert differences(truth, after, optimizer=False) == []
        assert after.groups == before.groups
        assert after.scalars == before.scalars
        for name, states in after.params.items():
            for state in states.keys() - {"param"}:
                assert states[state].tolist() == before.params[name][state].tolist()

    def test_without_the_lr_scheduler(self, ranks: RankPool, sources: Sources) -> None:
        for source in (PLAIN, PLAIN.but(scheduler=True)):
            run = sources.get(source)
            found = ranks.run(
                jobs.partial,
                Case(stage=3, dp=2, scheduler=True, seed=5),
                Attempt(run.folder, run.tag, {"load_lr_scheduler_states": False}),
                world_size=2,
            )[0]
            after = known(found.after)
            assert after.lr_scheduler == known(found.before).lr_scheduler
            assert [d for d in differences(known(run.truth), after) if not d.startswith("lr_scheduler")] == []

    @pytest.mark.parametrize("target", TARGETS, ids=lambda case: case.label)
    def test_weights_only(self, ranks: RankPool, sources: Sources, target: Case) -> None:
        run = sources.get(PLAIN.but(scheduler=True))
        found = ranks.run(
            jobs.partial,
            target.but(seed=5, scheduler=True),
            Attempt(run.folder, run.tag, {"load_module_only": True}),
            world_size=target.dp,
        )[0]
        before, after, truth = known(found.before), known(found.after), known(run.truth)
        assert differences(truth, after, optimizer=False, rest=False) == []
        for part in ("counters", "groups", "lr_scheduler", "loss_scaler", "scalars"):
            assert getattr(after, part) == getattr(before, part)


def without_frozen(truth: Truth) -> Truth:
    """The truth without its frozen parameters."""
    from dataclasses import replace

    return replace(truth, frozen={}, module={n: t for n, t in truth.module.items() if n not in truth.frozen})
