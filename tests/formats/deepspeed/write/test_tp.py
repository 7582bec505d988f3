"""Stock DeepSpeed loads what is written for tensor-parallel ranks, and holds the source's state to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ucp
from tests.deepspeed.agree import differences
from tests.deepspeed.pairs import CLOSE
from tests.engines import parallel_runs, releases, tp_models
from tests.engines.configs import Case
from tests.engines.parallel_runs import ParallelSources
from tests.engines.pool import RankPool
from tests.engines.tp_runs import PRELOAD, TpCase, config_of
from tests.engines.tp_truth import without_padding
from tests.engines.truth import known
from tests.formats.deepspeed.read.test_matrix import check_tensors
from tests.spec.models import config_of as model_config
from ucp.errors import BadArgument, Unsupported

pytestmark = pytest.mark.slow

# AutoTP's cuts are 0.19's in what is written: before, it leaves 'lm_head' whole, and before 0.17 it cuts what a program
# gives to tp_model_init alone.
CUTS = pytest.mark.skipif(not releases.is_pinned(), reason=releases.without("its AutoTP cuts otherwise than 0.19"))

LLAMA = TpCase(case=Case(stage=1, dp=2, groups=3, scheduler=True))
UNEVEN = TpCase(kv_heads=3, case=Case(stage=1, dp=2, dtype="bf16"))
IDLE = TpCase(kv_heads=3, tp=4, case=Case(stage=1, dp=1))
GPT = TpCase("megatron")

PAIRS = [
    (LLAMA.but(tp=1, stage=3, dp=2), LLAMA),
    (LLAMA, LLAMA.but(tp=1, stage=2, dp=3)),
    (LLAMA, LLAMA.but(stage=3)),
    (LLAMA, LLAMA.but(tp=4, stage=2, dp=1)),
    (UNEVEN.but(tp=1, stage=2), UNEVEN),
    (UNEVEN, UNEVEN.but(stage=3, dp=1)),
    (IDLE, IDLE.but(tp=2, stage=2, dp=2)),
    (IDLE.but(tp=2, stage=3, dp=2), IDLE),
    (GPT, GPT.but(stage=3)),
    (GPT.but(tp=1, stage=2), GPT),
]


def label(pair: tuple[TpCase, TpCase]) -> str:
    return f"{pair[0].label}--{pair[1].label}"


def spec_for(tp: TpCase) -> dict[str, Any]:
    if tp.kind == "megatron":
        return {"spec": "megatron_gpt_plain", "model_config": tp_models.ARGS}
    return {"spec": "llama", "model_config": model_config(tp_models.llama(0, tp.kv_heads))}


@pytest.mark.parametrize(
    "pair", [pytest.param(p, id=label(p), marks=() if p[0].kind == "megatron" else CUTS) for p in PAIRS]
)
def test_stock_deepspeed_loads_it(
    pair: tuple[TpCase, TpCase], ranks: RankPool, sliced: ParallelSources, tmp_path: Path
) -> None:
    source, target = pair
    run = sliced.get(source)
    layout = f"dp={target.case.dp},tp={target.tp},zero={target.case.stage}"
    ucp.convert(run.folder, tmp_path / "out", "deepspeed", layout, ds_config=config_of(target), **spec_for(source))
    fresh = target.but(seed=5)
    loaded = ranks.run(
        parallel_runs.resume, fresh, str(tmp_path / "out"), None, 0, world_size=target.world_size, preload=PRELOAD
    )[0]
    truths = [known(run.truth), known(loaded.truth)]
    if "word_embeddings.weight[padding]" not in " ".join(truths[1].params):
        truths = [without_padding(truth) for truth in truths]
    assert differences(*truths) == []
    assert loaded.further == pytest.approx(run.further, rel=0, abs=CLOSE[target.case.dtype])


@CUTS
@pytest.mark.parametrize("layout", ["dp=2,zero=3", "dp=1,tp=4,zero=1"])
def test_the_config_of_the_source_follows_the_layout(sliced: ParallelSources, tmp_path: Path, layout: str) -> None:
    """Without a config for the target: the recorded one, whose tensor parallelism becomes the layout's."""
    source = TpCase()
    run = sliced.get(source)
    ucp.convert(run.folder, tmp_path / "out", "deepspeed", layout, **spec_for(source))
    with ucp.open(tmp_path / "out", **spec_for(source)) as checkpoint:
        check_tensors(checkpoint, known(run.truth))
        config = checkpoint.training_state.config
        assert config["tensor_parallel"]["autotp_size"] == checkpoint.layout.tp
    given = config_of(source.but(stage=int(layout[-1])))
    with pytest.raises(BadArgument, match="the config given asks for autotp_size=2"):
        ucp.convert(run.folder, tmp_path / "no", "deepspeed", layout, ds_config=given, **spec_for(source))


@CUTS
def test_other_numbers_of_ranks_need_a_spec(sliced: ParallelSources, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="nothing says how 4 tensor-parallel ranks cut the model"):
        ucp.convert(sliced.get(TpCase()).folder, tmp_path / "out", "deepspeed", "dp=1,tp=4,zero=1")
