"""A job for the ranks: an engine whose model was changed since the checkpoint was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.engines import build
from tests.engines.configs import Case
from tests.engines.load_jobs import build_target
from tests.engines.models import VOCABULARY
from tests.engines.resume import continue_training
from tests.engines.truth import Truth, gather

ROWS = VOCABULARY + 8


def change(model: Any) -> None:
    """More rows, a module that is trained now and one that no longer is, another that is new, and a new name."""
    model.embed = nn.Embedding(ROWS, 7)
    model.head = nn.Linear(7, ROWS, bias=False)
    model.adapter.requires_grad_(True)
    model.up.requires_grad_(False)
    model.fresh = nn.Linear(7, 3)
    model.embed.register_forward_hook(lambda _, __, out: out + model.fresh(out).sum(-1, keepdim=True) * 0.1)


CHANGES: Mapping[str, Any] = {
    "resized": ["embed.weight", "head.weight"],
    "unfrozen": ["adapter.*"],
    "frozen": ["up.*"],
    "added": ["fresh.*"],
}


@dataclass(frozen=True)
class Gone:
    """What came of it. before, after: truths on rank 0. text: the report's, or the refusal's."""

    before: Truth | None
    after: Truth | None
    text: str
    changes: tuple[str, ...]
    complete: bool
    losses: tuple[float, ...]
    saved: str = ""


def gone_on(
    case: Case, folder: str, tag: str | None, steps: int, changes: Any, trained: int = 0, save: str = ""
) -> Gone:
    """Load into the changed model and train on. trained: steps that the engine has done already. save: where to."""
    from ucp.errors import UcpError

    original = build.build_model

    def build_and_change(case: Case) -> nn.Module:
        model = original(case)
        torch.manual_seed(77)
        change(model)
        return model

    build.build_model = build_and_change
    load = {"prove": "always"} if changes is None else {"prove": "always", "changes": changes}
    engine = build_target(case, {"load": load}, trained)
    before = gather(engine)
    try:
        engine.load_checkpoint(folder, tag)
    except UcpError as error:
        return Gone(before, gather(engine), error.whole, (), False, ())
    after, report = gather(engine), engine.ucp.last_load
    losses = tuple(continue_training(engine, case, steps, 3))
    if save:
        engine.save_checkpoint(save)
        engine.ucp.wait()
    complete = report.proof is not None and report.proof.complete
    return Gone(before, after, str(report), report.changes, complete, losses)


def fsdp_goes_on(case: Case, folder: str, tag: str | None, changes: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """FSDP2 with the changed model: (state before, state after, the report's changes), whole tensors by name:state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import ucp

    model = build.build_model(case)
    torch.manual_seed(77)
    change(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)

    def whole() -> dict[str, Any]:
        out = {}
        for name, p in model.named_parameters():
            for state, value in {"param": p, **optimizer.state.get(p, {})}.items():
                tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
                out[f"{name}:{state}"] = tensor.detach().clone()
        return out

    before = whole()
    report = ucp.load_training(
        folder, tag=tag, model=model, optimizer=optimizer, rng=False, changes=changes, prove="always"
    )
    return before, whole(), (report.tensors.changes, str(report.tensors.proof))


class FusedMLP(nn.Module):
    """Llama's, with its first two projections as one."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(mlp.hidden_size, 2 * mlp.intermediate_size, bias=False)
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        down: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return down


def llama_goes_on(case: Case, folder: str, steps: int, changes: Any, rows: int, fused: bool) -> Any:
    """Load into a Llama of so many rows, with frozen norms and fused projections or not, and train on: with this
    project and declared changes, or by stock DeepSpeed where there are none."""
    from tests.engines import load_jobs, resume

    original = build.build_model

    def build_and_change(case: Case) -> nn.Module:
        model: Any = original(case)
        torch.manual_seed(77)
        model.resize_token_embeddings(rows, mean_resizing=False)
        for layer in model.model.layers if fused else ():
            layer.mlp = FusedMLP(layer.mlp)
        model.model.norm.requires_grad_(False)
        return model

    build.build_model = build_and_change
    if changes is None:
        return resume.resume(case, folder, None, steps)
    section = {"load": {"prove": "always", "changes": changes}}
    return load_jobs.resume(case, folder, None, steps, section=section)
