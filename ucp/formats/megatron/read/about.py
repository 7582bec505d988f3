"""What Megatron's users want to see of a checkpoint: its layout in their words, the optimizer's sharding, the model."""

from __future__ import annotations

from collections.abc import Mapping

from ucp.catalog import Catalog
from ucp.formats.megatron.read.common import EXTRA, RUN, arguments
from ucp.printable import line, short

# Of several hundred arguments, those that say which model it is.
_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_router_topk",
    "max_position_embeddings",
    "position_embedding_type",
    "normalization",
    "swiglu",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "params_dtype",
)


def facts(catalog: Catalog) -> Mapping[str, str]:
    """Titles -> texts."""
    kept = catalog.training_state.extra.get(EXTRA, {})
    run, args, layout = kept.get(RUN, {}), arguments(kept), catalog.layout
    counts = {"tp": layout.tp, "pp": layout.pp, "vp": run.get("vp"), "ep": layout.ep, "cp": run.get("cp")}
    out = {"megatron layout": " ".join(f"{key}={1 if count is None else count}" for key, count in counts.items())}
    if run.get("optimizer_sharding") is not None:
        out["optimizer sharding"] = line(str(run["optimizer_sharding"]))
    elif any(set(info.states) - {"param"} for info in catalog.parameters.values()):
        out["optimizer sharding"] = "none"
    if run.get("fp8") is not None:
        out["fp8"] = line(str(run["fp8"]))
    model = [f"{key}={short(args[key])}" for key in _MODEL if args.get(key) is not None]
    if model:
        out["model"] = " ".join(model)
    return out
