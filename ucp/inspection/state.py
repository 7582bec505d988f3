"""Whether a training state is complete: what a resume would miss, or what contradicts the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ucp.catalog import Catalog
from ucp.formats.shared.roles import VALUES


def state_findings(catalog: Catalog) -> Iterator[tuple[str, bool]]:
    """(finding, whether it is a fault). Weights alone are no fault, since then there is no state to be complete."""
    state = catalog.training_state
    trained = {name: info for name, info in catalog.parameters.items() if info.kind == "parameter"}
    grouped = Counter(name for group in state.param_groups for name in group.names)
    if not grouped:
        if any(s != "param" for _, s in catalog.tensors):
            yield "there are optimizer states, but no param groups that say whose hyperparameters they follow", True
        else:
            yield "holds weights only: no optimizer states, no param groups", False
        return
    for name in sorted(set(trained) - set(grouped)):
        yield f"'{name}' is trained, but in no param group", True
    for name, times in sorted(grouped.items()):
        if name not in catalog.parameters:
            yield f"'{name}' is in a param group, but there is no such parameter", True
        elif times > 1:
            yield f"'{name}' is in {times} param groups", True
    yield from _states(catalog)
    for index, group in enumerate(state.param_groups):
        if group.options is None:
            yield f"the hyperparameters of param group {index} were not recorded; a resume takes the engine's", False
    if state.global_steps is None:
        # A state dict of torch.distributed keeps step counts with the parameters alone.
        yield "the step count is missing", VALUES not in state.extra
    if state.lr_scheduler is None:
        yield "there is no state of a learning-rate scheduler", False
    half = state.config.get("fp16")
    if state.loss_scaler is None and isinstance(half, dict) and half.get("enabled"):
        yield "training ran in fp16, but the loss scaler's state is missing", True


def _states(catalog: Catalog) -> Iterator[tuple[str, bool]]:
    """Check that all parameters of a param group have the same states, or none if there was no step yet."""
    for index, group in enumerate(catalog.training_state.param_groups):
        infos = [catalog.parameters[name] for name in group.names if name in catalog.parameters]
        known = {state for info in infos for state in (*info.states, *info.scalars)} - {"param"}
        for info in infos:
            if info.kind == "padding":
                continue
            missing = sorted(known - set(info.states) - set(info.scalars))
            if "param" not in info.states:
                yield f"'{info.name}' has optimizer states and no weight", True
            if missing:
                yield f"'{info.name}' lacks {', '.join(missing)}, which others of param group {index} have", True
