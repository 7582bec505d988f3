"""What the optimizer files of all ZeRO stages have in common: flat buffers, states told apart, agreement of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.shared.builder import Builder, Scalar
from ucp.storage.torch_pt.values import TensorRef


@dataclass(frozen=True)
class FlatState:
    """A flat buffer's optimizer states on one rank, told apart. tensors: as long as the buffer. scalars: the rest."""

    tensors: Mapping[str, TensorRef]
    scalars: Mapping[str, Scalar]


def split_state(
    builder: Builder, path: Path, where: str, state: Mapping[str, Any], lengths: Sequence[int]
) -> FlatState:
    """Tell tensors of one of these lengths from scalars. Refuse by name what is neither.

    Adafactor's factors and block-quantised states, for example, have shapes that do not follow a flat buffer's cut.
    """
    tensors: dict[str, TensorRef] = {}
    scalars: dict[str, Scalar] = {}
    for key, value in state.items():
        if value is None:
            continue
        if isinstance(value, TensorRef) and value.shape == ():
            scalars[key] = builder.scalar(value)
        elif isinstance(value, TensorRef) and len(value.shape) == 1 and value.shape[0] in lengths:
            tensors[key] = value
        elif isinstance(value, (bool, int, float)):
            scalars[key] = value
        elif isinstance(value, TensorRef) and value.shape == (0,):
            raise offloaded_to_nvme(path, f"state '{key}' of {where}")
        else:
            found = f"shape {list(value.shape)}" if isinstance(value, TensorRef) else type(value).__name__
            raise Unsupported(
                f"{path}: optimizer state '{key}' of {where} has {found}, neither the parameters' shape nor a single "
                "value; checkpoints of this optimizer cannot be resharded"
            )
    return FlatState(tensors, scalars)


def same_on_all_ranks(what: str, values: Mapping[Path, Any]) -> Any:
    """The common value. Raises DamagedCheckpoint naming two files that disagree."""
    first_path, first = next(iter(values.items()))
    for path, value in values.items():
        if value != first:
            raise DamagedCheckpoint(
                f"{path}: {what} is {_short(value)}, but '{first_path.name}' says {_short(first)}; files of two runs "
                "are mixed"
            )
    return first


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def join_states(
    what: str, ranks: Mapping[int, tuple[Path, FlatState]]
) -> tuple[dict[str, dict[int, TensorRef]], dict[str, Scalar]]:
    """One flat group's states over all ranks: state -> rank -> buffer, and the scalars that all ranks agree on."""
    names = same_on_all_ranks(
        f"the list of optimizer states of {what}", {p: sorted(s.tensors) for p, s in ranks.values()}
    )
    scalars = same_on_all_ranks(f"the optimizer values of {what}", {p: dict(s.scalars) for p, s in ranks.values()})
    return {n: {r: s.tensors[n] for r, (_, s) in ranks.items()} for n in names}, scalars


def offloaded_to_nvme(path: Path, what: str) -> Unsupported:
    """The error for an empty tensor where a flat buffer belongs: DeepSpeed's swapper leaves it so."""
    return Unsupported(
        f"{path}: {what} is empty, as DeepSpeed leaves what is offloaded to NVMe ('offload_optimizer': {{'device': "
        f"'nvme'}}}}), but not all of the subgroup is in swap files ('{path.parent.name}/offloaded_tensors'), so the "
        "checkpoint is not understood; load it with DeepSpeed, and save it without that offload"
    )


def flat_refs(path: Path, key: str, value: Any) -> list[TensorRef]:
    """A list of flat 1-d buffers, checked to be that."""
    if not isinstance(value, (list, tuple)):
        raise DamagedCheckpoint(f"{path}: '{key}' is missing or no list of flat buffers")
    for i, ref in enumerate(value):
        if not isinstance(ref, TensorRef):
            raise Unsupported(
                f"{path}: '{key}[{i}]' is {type(ref).__name__}, not a tensor; states offloaded to NVMe are not in the "
                "checkpoint's own files and cannot be read"
            )
        if len(ref.shape) != 1 or not ref.is_contiguous:
            raise DamagedCheckpoint(f"{path}: '{key}[{i}]' has shape {list(ref.shape)}; a flat buffer is expected")
    return list(value)


def divide_step(options: Mapping[str, Any], states_count: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A param group's hyperparameters without a step count that belongs to its parameters, and that count.

    DeepSpeed's Adams count in the parameters' states. They once had the count in the group, or have a copy of it there.
    Optimizers that count only in the group (AdEMAMix and others of pytorch_optimizer) keep it there, since their states
    have no place for it. states_count: whether the group's states have a count.
    """
    own = {"step": options["step"]} if "step" in options and (states_count or "bias_correction" in options) else {}
    return {key: value for key, value in options.items() if key not in own}, own


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's hyperparameters: everything but its parameters."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}
