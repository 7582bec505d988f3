"""The classes in checkpoints that are not imported: a `Standin` takes the place of each of their objects."""

from __future__ import annotations

from typing import Any

from ucp.storage.torch_pt.values import DtypeName, Standin

# Classes of DeepSpeed and torch seen in their checkpoints. Their objects become `Standin`s. DeepSpeed's releases of
# 2022 had `fragment_address` in bf16_optimizer, and the first ones of 2020 had the loss scalers in deepspeed.pt.
STANDINS = frozenset(
    {
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.runtime.zero.offload_config", "OffloadDeviceEnum"),
        ("deepspeed.runtime.config", "DtypeEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.runtime.bf16_optimizer", "fragment_address"),
        ("deepspeed.pt.loss_scaler", "LossScaler"),
        ("deepspeed.pt.loss_scaler", "DynamicLossScaler"),
        # The metadata of torch.distributed.checkpoint.
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # A DTensor's spec, if each rank has pickled its own.
        *(
            (f"torch.distributed.tensor.{module}", name)
            for module, names in (
                ("_dtensor_spec", ("DTensorSpec", "TensorMeta", "ShardOrderEntry")),
                ("placement_types", ("Shard", "Replicate", "Partial", "_StridedShard", "DTensorSpec")),
            )
            for name in names
        ),
        ("torch.distributed.device_mesh", "DeviceMesh"),
        # What a ShardedTensor says of its shards, and FSDP1 of those of its flat parameters.
        *(
            (f"torch.distributed._shard.{module}", name)
            for module, name in (
                ("metadata", "ShardMetadata"),
                ("sharded_tensor.api", "ShardedTensor.ProcessGroupState"),
                ("sharded_tensor.metadata", "ShardedTensorMetadata"),
                ("sharded_tensor.metadata", "TensorProperties"),
                ("sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
                ("sharded_tensor.shard", "Shard"),
                ("sharding_spec.chunk_sharding_spec", "ChunkShardingSpec"),
                ("sharding_spec.api", "EnumerableShardingSpec"),
            )
        ),
        ("torch.distributed.remote_device", "_remote_device"),
        ("torch.distributed.fsdp._flat_param", "FlatParamShardMetadata"),
        ("torch.distributed._mesh_layout", "_MeshLayout"),
        ("torch.distributed._mesh_layout", "_FlatLayout"),
        # Plans, which `Metadata.all_local_plans` keeps; Megatron-Core has it in its checkpoints.
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),  # of releases up to 0.14
        # Classes named in Megatron's arguments and common state (megatron/core/safe_globals.py, and older places).
        ("types", "SimpleNamespace"),
        ("signal", "Signals"),
        ("megatron.core.enums", "ModelType"),
        ("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
        ("megatron.core.transformer.enums", "ModelType"),
        ("megatron.core.transformer.enums", "LayerType"),
        ("megatron.core.transformer.enums", "AttnType"),
        ("megatron.core.transformer.enums", "AttnMaskType"),
        ("megatron.core.transformer.enums", "AttnBackend"),
        ("megatron.core.transformer.enums", "CudaGraphScope"),
        ("megatron.core.rerun_state_machine", "RerunDiagnostic"),
        ("megatron.core.rerun_state_machine", "RerunMode"),
        ("megatron.core.rerun_state_machine", "RerunState"),
        # Recipes of FP8 in Transformer Engine's `_extra_state`. One of functions (CustomRecipe) is not among them.
        *(
            ("transformer_engine.common.recipe", name)
            for name in (
                "DelayedScaling",
                "Float8CurrentScaling",
                "Float8BlockScaling",
                "MXFP8BlockScaling",
                "NVFP4BlockScaling",
                "Format",
                "_FormatHelper",
                "_OverrideLinearPrecision",
                "MMParams",
                "QParams",
            )
        ),
    }
)

# Members of the enumerations among them, by name. A member pickles as its class called with its value. Python 3.11.0 to
# 3.11.3 (as in Debian 12) pickles it as ``getattr(class, name)`` instead.
MEMBERS: dict[tuple[str, str], dict[str, Any]] = {
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): {
        "disabled": 0,
        "optimizer_states": 1,
        "gradients": 2,
        "weights": 3,
    },
    ("deepspeed.runtime.zero.offload_config", "OffloadDeviceEnum"): {"none": "none", "cpu": "cpu", "nvme": "nvme"},
    ("deepspeed.runtime.config", "DtypeEnum"): {
        "fp16": DtypeName("float16"),
        "fp32": DtypeName("float32"),
        "int8": DtypeName("int8"),
        "bf16": DtypeName("bfloat16"),
    },
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): {
        "TORCH_CONTIGUOUS_FORMAT": 0,
        "TORCH_CHANNELS_LAST": 1,
        "TORCH_PRESERVE_FORMAT": 2,
    },
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): {
        "TORCH_CONTIGUOUS_FORMAT": 0,
        "TORCH_CHANNELS_LAST": 1,
        "TORCH_PRESERVE_FORMAT": 2,
    },
    ("torch.distributed.checkpoint.planner", "WriteItemType"): {"TENSOR": 1, "SHARD": 2, "BYTE_IO": 3},
    ("megatron.core.enums", "ModelType"): {"encoder_or_decoder": 1},
    ("megatron.core.transformer.enums", "AttnBackend"): {"flash": 1, "fused": 2, "unfused": 3, "local": 4, "auto": 5},
}


def member(module: str, name: str, attribute: Any) -> Standin | None:
    """A member of an enumeration by its name; None if there is no such member."""
    members = MEMBERS.get((module, name), {})
    if not isinstance(attribute, str) or attribute not in members:
        return None
    return Standin(module, name, (members[attribute],))
