"""How the plugin meets a program: DeepSpeed's own signatures, configs, folders, client state, and what it tells."""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.deepspeed import jobs, plugin_jobs
from tests.deepspeed.agree import differences
from tests.deepspeed.jobs import Attempt
from tests.engines import load_jobs
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.engines.runs import CLIENT_STATE
from tests.engines.sources import Sources
from tests.engines.truth import Truth, compare, known
from ucp.errors import Unsupported

pytestmark = pytest.mark.slow(seconds=90)

PLAIN = Case(stage=1, dp=2)


class TestInitialize:
    def test_has_deepspeeds_signature(self, ranks: RankPool) -> None:
        ((stock, ours),) = ranks.run(plugin_jobs.signatures, world_size=1)
        assert ours == stock

    def test_returns_what_deepspeed_returns(self, ranks: RankPool) -> None:
        ((stock, ours),) = ranks.run(plugin_jobs.returned, world_size=1)
        assert ours == stock
        assert stock[2].endswith("DeepSpeedDataLoader")
        assert stock[3].endswith("LinearLR")

    def test_finds_its_section_wherever_the_config_comes_from(self, ranks: RankPool, tmp_path: Path) -> None:
        (found,) = ranks.run(plugin_jobs.ways_to_configure, str(tmp_path), world_size=1)
        off = ("enabled is false", "no section", "empty section")
        assert found == {way: way not in off for way in found}
        assert len(found) == 10

    def test_attach_binds_an_engine_that_exists(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN)
        assert ranks.run(plugin_jobs.attached, run.folder, run.tag, world_size=2) == [(False, True, True)] * 2

    def test_auto_replaces_one_function(self, ranks: RankPool) -> None:
        ((changed, bound, without),) = ranks.run(plugin_jobs.what_auto_replaces, world_size=1)
        assert changed == ["deepspeed.initialize"]
        assert (bound, without) == (True, False)


class TestReturns:
    @pytest.mark.parametrize("stage", [0, 1, 3])
    def test_path_and_client_state_are_deepspeeds(self, ranks: RankPool, sources: Sources, stage: int) -> None:
        case = Case(stage=stage, dp=2)
        run = sources.get(case)
        (stock_path, stock), (path, ours) = ranks.run(
            plugin_jobs.both_returns, case, run.folder, run.tag, world_size=2
        )[0]
        assert path == stock_path
        # DeepSpeed's also has its own entries of the file.
        assert ours == CLIENT_STATE == {k: stock[k] for k in CLIENT_STATE}

    @pytest.mark.parametrize("stage", [1, 3])
    def test_client_state_of_plain_data_tensors_arrays_and_namespaces(
        self, ranks: RankPool, tmp_path: Path, stage: int
    ) -> None:
        ranks.run(plugin_jobs.save_client_state, Case(stage=stage, dp=2), str(tmp_path), "plain", world_size=2)
        for rank, (kind, text, found) in enumerate(
            ranks.run(plugin_jobs.load_client_state, Case(stage=1, dp=3), str(tmp_path), False, world_size=3)
        ):
            assert (kind, text) == ("", ""), rank
            expected = plugin_jobs.client_state("plain")
            assert found.keys() == expected.keys()
            assert found["tensor"].dtype == torch.bfloat16
            assert torch.equal(found["tensor"], expected["tensor"])
            assert found["rng"].dtype == torch.uint8
            assert isinstance(found["array"], np.ndarray)
            assert found["array"].dtype == np.int16
            assert found["array"].tolist() == expected["array"].tolist()
            assert type(found["number"]) is np.float32
            assert found["number"] == expected["number"]
            assert isinstance(found["args"], argparse.Namespace)
            for key in ("args", "plain", "dtype"):
                assert found[key] == expected[key]

    def test_other_classes_are_refused_by_name_unless_trusted(self, ranks: RankPool, tmp_path: Path) -> None:
        ranks.run(plugin_jobs.save_client_state, PLAIN, str(tmp_path), "custom", world_size=2)
        for kind, text, changed in ranks.run(plugin_jobs.load_client_state, PLAIN, str(tmp_path), False, world_size=2):
            assert kind in ("UnsafePickle", "Unsupported")
            assert "OfTheProgram" in text
            assert "trust_client_state" in text
            assert changed is False
        for kind, _, found in ranks.run(plugin_jobs.load_client_state, PLAIN, str(tmp_path), True, world_size=2):
            assert kind == ""
            assert found == plugin_jobs.client_state("custom")


@pytest.fixture(scope="module")
def several(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Truth]]:
    folder = tmp_path_factory.mktemp("several")
    found = ranks.run(plugin_jobs.save_several, PLAIN, str(folder), ["one", "two", "three"], world_size=2)[0]
    for k, tag in enumerate(("one", "two", "three")):
        for file in (folder / tag).iterdir():
            os.utime(file, (1e9 + k, 1e9 + k))
    return folder, [known(t) for t in found]


class TestFolders:
    def load(self, ranks: RankPool, folder: Path, tag: str | None = None) -> plugin_jobs.Told:
        found: plugin_jobs.Told = ranks.run(
            plugin_jobs.load_and_listen, Case(stage=3, dp=2, seed=5), str(folder), tag, world_size=2
        )[0]
        return found

    def test_latest_decides_and_a_tag_overrules_it(self, ranks: RankPool, several: tuple[Path, list[Truth]]) -> None:
        folder, truths = several
        places = [(str(folder), None), (str(folder), "one"), (str(folder), "two"), (str(folder / "one"), None)]
        found = ranks.run(plugin_jobs.load_each, Case(stage=2, dp=2, seed=5), places, world_size=2)[0]
        for truth, k in zip(found, (2, 0, 1, 0), strict=True):
            assert differences(truths[k], known(truth)) == []

    def test_without_latest_the_newest_is_taken_with_a_warning_and_whole_or_not_at_all(
        self, ranks: RankPool, several: tuple[Path, list[Truth]], tmp_path: Path
    ) -> None:
        folder, truths = several
        shutil.copytree(folder, tmp_path / "a")
        (tmp_path / "a" / "latest").unlink()
        found = self.load(ranks, tmp_path / "a")
        assert differences(truths[2], known(found.truth)) == []
        assert any("taking 'three', the newest checkpoint" in w for w in found.warnings)
        part = tmp_path / "a" / "three" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        stat = part.stat()
        part.write_bytes(part.read_bytes()[:1000])
        os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        outcome = ranks.attempt(plugin_jobs.load_and_listen, PLAIN, str(tmp_path / "a"), world_size=2)
        assert {f.type_name for f in outcome.failures} == {"ucp.errors.DamagedCheckpoint"}
        assert "tag='newest'" in outcome.failures[0].message
        found = self.load(ranks, tmp_path / "a", "newest")
        assert differences(truths[1], known(found.truth)) == []
        assert any("taking 'two', the newest whole checkpoint" in w for w in found.warnings)

    def test_latest_is_read_as_what_it_means(
        self, ranks: RankPool, several: tuple[Path, list[Truth]], tmp_path: Path
    ) -> None:
        folder, truths = several
        shutil.copytree(folder, tmp_path / "a")
        (tmp_path / "a" / "latest").write_bytes(b"\xef\xbb\xbf./one/\r\n")
        found = self.load(ranks, tmp_path / "a")
        assert differences(truths[0], known(found.truth)) == []
        (tmp_path / "a" / "latest").write_bytes(b"four")
        outcome = ranks.attempt(plugin_jobs.load_and_listen, PLAIN, str(tmp_path / "a"), world_size=2)
        assert {f.type_name for f in outcome.failures} == {"ucp.errors.NotACheckpoint"}
        assert "names 'four', which is not there" in outcome.failures[0].message

    def test_where_there_is_nothing_nothing_is_loaded_and_that_is_said(self, ranks: RankPool, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "no such folder"):
            found = self.load(ranks, folder)
            assert (found.path, found.client_state) == (None, None)
            assert any("no checkpoint there; nothing was loaded" in w for w in found.warnings)
            assert found.samples_seen == 0

    def test_a_latest_that_names_nothing_is_refused(self, ranks: RankPool, tmp_path: Path) -> None:
        (tmp_path / "latest").write_text("global_step9")
        outcome = ranks.attempt(plugin_jobs.load_and_listen, PLAIN, str(tmp_path), world_size=2)
        assert outcome.all_raised
        assert {f.type_name for f in outcome.failures} == {"ucp.errors.NotACheckpoint"}
        assert "'latest' names a checkpoint, but none is there" in outcome.failures[0].message.replace(
            str(tmp_path) + "/", ""
        )


class TestTelling:
    def test_one_summary_line_on_the_first_rank(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN)
        told = ranks.run(plugin_jobs.load_and_listen, Case(stage=3, dp=3), run.folder, world_size=3)
        (line,) = told[0].summaries
        # 13 parameters with three tensors each, and 2 buffers
        assert line.startswith("restored 41 tensors (")
        assert "from deepspeed dp=2,zero=1 to dp=3,zero=3 in " in line
        assert line.endswith(f"({Path(run.folder) / run.tag})")
        assert [t.summaries for t in told[1:]] == [(), ()]

    def test_the_summary_is_seen_without_any_logging_set_up(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN)
        outcome = ranks.attempt(load_jobs.resume, PLAIN, run.folder, None, 3, 0, world_size=2)
        assert not outcome.failures
        assert outcome.logs[0].count("restored 41 tensors (") == 1
        assert "restored" not in outcome.logs[1]

    def test_a_changed_global_batch_size(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(PLAIN)
        halved = Case(stage=1, dp=1, config=(("train_micro_batch_size_per_gpu", 6),))
        (told,) = ranks.run(plugin_jobs.load_and_listen, halved, run.folder, world_size=1)
        (warning,) = told.warnings
        assert "global batch size changes from 12 to 6 samples" in warning
        assert "engine.ucp.samples_seen (36)" in warning
        assert told.samples_seen == 36
        (told,) = ranks.run(plugin_jobs.load_and_listen, Case(stage=1, dp=1), run.folder, world_size=1)
        assert told.warnings == ()
        assert told.samples_seen == 36

    def test_clipping_stays_the_configs(self, ranks: RankPool, sources: Sources) -> None:
        run = sources.get(Case(stage=1, dp=2, clip=0.5))
        told = ranks.run(plugin_jobs.load_and_listen, Case(stage=2, dp=2, clip=0.25), run.folder, world_size=2)
        assert told[0].clip == 0.25
        (warning,) = told[0].warnings
        assert "gradient clipping is 0.25 by this engine's configuration; the checkpoint's run had 0.5" in warning
        assert told[1].warnings == ()
        told = ranks.run(plugin_jobs.load_and_listen, Case(stage=2, dp=2, clip=0.5), run.folder, world_size=2)
        assert told[0].warnings == ()

    def test_loss_scalers_of_other_kinds_keep_their_own_scale(self, ranks: RankPool, sources: Sources) -> None:
        dynamic = Case(stage=2, dp=2, dtype="fp16", groups=2, scale_power=30)
        static = dynamic.but(static_scale=64.0)
        for source, target, stays in ((dynamic, static, 64.0), (static, dynamic, 2.0**30)):
            for stage in (1, 3, 0):
                run = sources.get(source)
                told = ranks.run(
                    plugin_jobs.load_and_listen, target.but(stage=stage, seed=5), run.folder, world_size=2
                )[0]
                scaler = known(told.truth).loss_scaler
                assert scaler is not None
                assert scaler["cur_scale"] == stays
                assert any("loss scaling here is" in w and "is not restored" in w for w in told.warnings)
        for case in (dynamic.but(stage=3, dp=1), static.but(stage=0)):
            told = ranks.run(
                plugin_jobs.load_and_listen, case, sources.get(case.but(stage=2, dp=2)).folder, world_size=case.dp
            )[0]
            assert not any("loss scaling" in w for w in told.warnings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_from_before_the_first_step(ranks: RankPool, sources: Sources, stage: int, dtype: str) -> None:
    """It has no optimizer states, and an engine that has trained has none either after loading it."""
    case = Case(stage=stage, dp=2, dtype=dtype, groups=2)
    run = sources.get(case, steps=0)
    for target in (case, Case(stage=3 - stage, dp=3, dtype=dtype, groups=2)):
        found = ranks.run(
            load_jobs.resume, target.but(seed=5), run.folder, run.tag, 0, trained=2, world_size=target.dp
        )[0]
        truth = known(found.truth)
        assert differences(known(run.truth), truth, optimizer=False) == []
        assert truth.counters["global_steps"] == 0
        if target == case:
            assert found.further == run.further
            assert differences(known(run.truth_after), known(found.truth_after)) == []
        else:
            assert found.further == pytest.approx(run.further, rel=0, abs=5e-5 if dtype == "fp32" else 4e-3)


class TestUniversal:
    """The same loads from the universal format, whatever its form."""

    CASES = (
        (Case(stage=3, dp=3, groups=3, frozen=True, dtype="bf16", scheduler=True), Case(stage=1, dp=2)),
        (Case(stage=1, dp=4, groups=3, frozen=True, dtype="bf16", scheduler=True), Case(stage=3, dp=2)),
        (Case(stage=0, dp=2, groups=3, frozen=True, dtype="bf16", scheduler=True), Case(stage=2, dp=3)),
        (Case(stage=2, dp=2, groups=3, frozen=True, dtype="bf16", scheduler=True), Case(stage=0, dp=1)),
        (Case(stage=2, dp=3, groups=2, dtype="fp16", scale_power=30), Case(stage=3, dp=2)),
        (Case(stage=3, dp=2, tied=True, optimizer="sgd"), Case(stage=2, dp=3)),
    )

    @pytest.mark.parametrize("virtual", [False, True], ids=["consolidated", "virtual"])
    @pytest.mark.parametrize(("source", "layout"), CASES, ids=lambda case: case.label)
    def test_loads_exactly(
        self, ranks: RankPool, sources: Sources, tmp_path: Path, source: Case, layout: Case, virtual: bool
    ) -> None:
        run = sources.get(source)
        options: dict[str, Any] = {"virtual": True, "digests": True} if virtual else {}
        if source.stage == 0 and not virtual:
            options = {}
        ucp.convert(run.folder, tmp_path / "universal", tag=run.tag, **options)
        target = source.but(stage=layout.stage, dp=layout.dp, seed=5)
        found = ranks.run(
            load_jobs.resume, target, str(tmp_path / "universal"), None, run.steps, trained=1, world_size=target.dp
        )[0]
        assert differences(known(run.truth), known(found.truth)) == []
        assert found.path == str(tmp_path / "universal")
        assert found.client_state == CLIENT_STATE
        assert found.further == pytest.approx(run.further, rel=0, abs=5e-5 if source.dtype == "fp32" else 4e-3)


@pytest.mark.parametrize(("stage", "target"), [(1, 3), (3, 1), (2, 2), (0, 1)])
def test_groups_in_another_order(ranks: RankPool, tmp_path: Path, stage: int, target: int) -> None:
    """Hyperparameters, and a scheduler's value for each group, follow the parameters' names."""
    source = ranks.run(
        plugin_jobs.train_with_torch_scheduler, Case(stage=stage, dp=2, groups=3), str(tmp_path), world_size=2
    )[0]
    found = ranks.run(
        plugin_jobs.reversed_groups,
        Case(stage=target, dp=2, groups=3, seed=5),
        str(tmp_path),
        "tag",
        3,
        True,
        world_size=2,
    )[0]
    ours, theirs = known(found.truth), known(source.truth)
    assert [d for d in differences(theirs, ours) if not d.startswith("lr_scheduler")] == []
    a, b = theirs.lr_scheduler, ours.lr_scheduler
    assert a is not None
    assert b is not None
    assert a["_last_lr"] == b["_last_lr"][::-1]
    assert a["base_lrs"] == b["base_lrs"][::-1]
    assert {k: v for k, v in a.items() if k not in ("_last_lr", "base_lrs")} == {
        k: v for k, v in b.items() if k not in ("_last_lr", "base_lrs")
    }
    assert found.further == pytest.approx(source.further, rel=0, abs=5e-5)


def test_loading_again_and_again(ranks: RankPool, sources: Sources) -> None:
    """The same engine takes checkpoints of any layout, one after the other."""
    cases = [Case(stage=z, dp=dp) for z, dp in ((3, 4), (1, 2), (0, 2), (2, 3), (3, 4))]
    runs = [sources.get(case) for case in cases]
    places = [(r.folder, r.tag) for r in runs]
    for stage in (3, 2, 0):
        found = ranks.run(plugin_jobs.load_each, Case(stage=stage, dp=2, seed=5), places, world_size=2)[0]
        for run, truth in zip(runs, found, strict=True):
            assert differences(known(run.truth), known(truth)) == []
        assert compare(known(found[0]), known(found[-1])) == []


@pytest.mark.parametrize("stage", [1, 3])
def test_data_sampler_and_layer_token_dropping(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    folder, clusters = str(tmp_path / "saved"), str(tmp_path / "clusters")
    saved = ranks.run(
        plugin_jobs.through_a_data_pipeline, Case(stage=stage, dp=2), folder, clusters, True, world_size=2
    )[0]
    loaded = ranks.run(
        plugin_jobs.through_a_data_pipeline, Case(stage=4 - stage, dp=3), folder, clusters, False, world_size=3
    )
    sampler, dropping, steps = saved
    assert sampler["consumed_samples"] > 0
    assert dropping["consumed_layer_tokens"] > 0
    for rank_sampler, rank_dropping, rank_steps in loaded:
        assert rank_dropping == dropping
        assert rank_steps == steps == 3
        for key, value in sampler.items():
            if key == "np_rng_state":
                assert [np.asarray(x).tolist() for x in rank_sampler[key]] == [np.asarray(x).tolist() for x in value]
            else:
                assert rank_sampler[key] == value, key


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoints_without_frozen_parameters(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """As adapters are trained: the base model's weights come from elsewhere, and are not saved every time."""
    case = Case(stage=stage, dp=2, frozen=True)
    saved = known(ranks.run(plugin_jobs.save_without_frozen, case, str(tmp_path), world_size=2)[0])
    target = Case(stage=4 - stage, dp=3, frozen=True, seed=5)
    (refusal,) = ranks.run(jobs.attempts, target, [Attempt(str(tmp_path))], world_size=3)[0]
    assert refusal.kind == "Mismatch"
    assert "3 would stay unrestored: parameter 'adapter" in refusal.text
    found = ranks.run(jobs.partial, target, Attempt(str(tmp_path), None, {"load_module_strict": False}), world_size=3)[
        0
    ]
    before, after = known(found.before), known(found.after)
    assert sorted(found.left) == sorted(saved.frozen)
    assert differences(replace(saved, frozen=before.frozen), after) == []


@pytest.mark.parametrize(("stage", "persistent"), [(0, 0), (3, 0), (3, 60)])
def test_engines_that_only_compute(ranks: RankPool, sources: Sources, stage: int, persistent: int) -> None:
    """Without an optimizer there is no place for its states; the weights are all that is asked for."""
    for source in (Case(stage=1, dp=2, frozen=True), Case(stage=3, dp=3, frozen=True)):
        run = sources.get(source)
        case = Case(stage=stage, dp=2, frozen=True, seed=5)
        weights, loss, client_state, summary = ranks.run(
            plugin_jobs.load_to_compute, case, run.folder, run.tag, persistent, world_size=2
        )[0]
        truth = known(run.truth)
        expected = {**truth.module, **truth.buffers}
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), name
        assert client_state == CLIENT_STATE
        assert f"to dp=2,zero={stage}" in summary
        (reference,) = ranks.run(plugin_jobs.reference_loss, case, expected, world_size=1)
        assert loss == pytest.approx(reference, abs=1e-5)


def test_a_stage_0_file_that_does_not_say_which_parameter_is_which(ranks: RankPool, tmp_path: Path) -> None:
    """In fp32 it holds numbered states and no masters: with one shape in several groups only an engine with the same
    groups can tell, and its names are asked."""
    source = ranks.run(plugin_jobs.train_with_split_norms, Case(stage=0, dp=2, groups=2), str(tmp_path), world_size=2)[
        0
    ]
    with pytest.raises(Unsupported, match="does not name the optimizer's parameters") as caught:
        ucp.open(tmp_path)
    assert "norm" in str(caught.value)
    for case in (Case(stage=0, dp=2, groups=2), Case(stage=1, dp=3, groups=2), Case(stage=3, dp=2, groups=2)):
        found = ranks.run(plugin_jobs.load_with_split_norms, case.but(seed=5), str(tmp_path), True, world_size=case.dp)[
            0
        ]
        assert differences(known(source.truth), known(found.truth)) == []
        assert found.further == pytest.approx(source.further, rel=0, abs=5e-5)
    refused = ranks.run(
        plugin_jobs.load_with_split_norms, Case(stage=1, dp=2, groups=2), str(tmp_path), False, world_size=2
    )
    assert all("load it into the engine that has the same param groups" in text for text in refused)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_that_are_not_row_major(ranks: RankPool, tmp_path: Path, dtype: str) -> None:
    """Stage 0 saves weights, and their states, in the order that they have in memory."""
    for source in (0, 2, 3):
        folder = str(tmp_path / str(source))
        run = ranks.run(
            plugin_jobs.train_altered, Case(stage=source, dp=2, dtype=dtype), folder, "strided", world_size=2
        )[0]
        for stage in (0, 1, 3):
            case = Case(stage=stage, dp=2, dtype=dtype, seed=5)
            found = ranks.run(plugin_jobs.load_altered, case, folder, "strided", world_size=2)[0]
            assert differences(known(run.truth), known(found.truth)) == [], (source, stage)
            assert found.further == pytest.approx(run.further, rel=0, abs=5e-5 if dtype == "fp32" else 4e-3)
