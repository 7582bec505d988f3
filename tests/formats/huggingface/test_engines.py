"""The way from DeepSpeed to transformers and back with real engines: the same bits, so the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import ucp
from tests.engines.configs import Case
from tests.engines.pool import RankPool
from tests.formats.huggingface import engine_jobs
from tests.spec.models import MODELS

pytestmark = pytest.mark.slow

PRELOAD = ("ucp.deepspeed", "tests.spec.models")
# For both element types a stage to train at, and one to load at.
STAGES = {
    "llama": ((3, 1), (1, 3)),
    "gpt2": ((2, 3), (3, 0)),
    "mixtral": ((3, 3), (1, 2)),
    "t5": ((1, 3), (3, 2)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("model", STAGES)
def test_there_and_back(ranks: RankPool, tmp_path: Path, model: str) -> None:
    cases = [
        (Case(stage=stage, dtype=dtype), str(tmp_path / dtype))
        for (stage, _), dtype in zip(STAGES[model], DTYPES, strict=True)
    ]
    live = ranks.run(engine_jobs.train, model, cases, world_size=2, preload=PRELOAD)[0]
    for (_, loaded_at), (case, folder), expected in zip(STAGES[model], cases, live, strict=True):
        dest = tmp_path / f"{case.dtype}-out"
        ucp.convert(folder, dest, to="huggingface", dtype=case.dtype, like=Path(folder) / "like")
        module = engine_jobs.plain(MODELS[model].module.from_pretrained(dest))
        assert {p.dtype for p in module.parameters()} == {DTYPES[case.dtype]}
        assert torch.equal(engine_jobs.logits(model, module), expected)
        module.save_pretrained(tmp_path / "theirs")
        ours, theirs = (load_file(f / "model.safetensors") for f in (dest, tmp_path / "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
        truth, again = ranks.run(
            engine_jobs.load, model, Case(stage=loaded_at, dtype=case.dtype), str(dest), world_size=2, preload=PRELOAD
        )[0]
        assert torch.equal(again, expected)
        own = dict(module.named_parameters())
        assert truth.params.keys() == own.keys()
        for name, states in truth.params.items():
            assert torch.equal(states["param"], own[name].float()), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_trained_under_deepspeed(ranks: RankPool, tmp_path: Path) -> None:
    import peft

    base = tmp_path / "base"
    engine_jobs.build("llama", 0).save_pretrained(base)
    case = Case(stage=3, dtype="fp32")
    preload = (*PRELOAD, "peft")
    folder = str(tmp_path / "run")
    live = ranks.run(engine_jobs.train_adapter, case, folder, str(base), world_size=2, preload=preload)[0]
    ucp.convert(folder, tmp_path / "adapter", to="huggingface", like=Path(folder) / "like")
    module = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert torch.equal(engine_jobs.logits("llama", module), live)
    module.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    with pytest.raises(ucp.errors.Unsupported, match="is part of an adapter"):
        ucp.convert(folder, tmp_path / "model", to="huggingface", like=base)
