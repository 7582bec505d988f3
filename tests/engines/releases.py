"""Other releases than the pinned ones: which faults they have of their own, so that a test can say so and skip.

A fault is known by the message with which the release itself failed; on the pinned releases nothing is excused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[2] / "scripts/constraints.txt"

# What the table of releases tells apart; the rest of an environment is as pinned.
PACKAGES = ("deepspeed", "torch", "transformers", "accelerate", "pytorch-lightning", "peft")

# A release's own failure -> what it means.
FAULTS = {
    r"unsupported grad type: torch\.float16": "fp16 gradients at stage 0 are not reduced on the CPU",
    r"Muon\.__init__\(\) got an unexpected keyword": "has no Muon",
    r"validation error for DeepSpeedZeroConfig\nparameter_alignment": "has no parameter_alignment",
    r"slice\(\) cannot be applied to a 0-dim tensor": "its elastic checkpoints don't take torch's step",
    r"tensor_list\[0\], 'use_muon', False": "ranks that hold nothing of a param group fail",
    r"Output 0 of Split is a view and is being modified inplace": "stages 1 and 2 don't step with this torch",
    r"^start out of range": "its hpZ takes no parameters with fewer elements than ranks",
    r"momentum_buffer: two ranks hold it whole, and differ$": "ranks of its Muon keep other momenta of one matrix",
    r"ranks keep different momenta of a matrix": "ranks of its Muon keep other momenta of one matrix",
    r"DeepSpeed's Muon of 0\.17\.6 to 0\.19\.2 trains so": "ranks of its Muon keep other momenta of one matrix",
    r"(\d+) of \1 optimizer files are missing": "saves no state of the optimizer that it takes for BF16_Optimizer",
    r"bf16_master_weights_and_grads\n\s+Extra inputs are not permitted": "has no masters of few bits",
    r"does not say whether its ranks were stages or slices": "saves stages with experts as if slices",
    r"nothing says how they cut its \d+ parameters \('model\.": "does not say how its AutoTP has cut a model",
    r"no multiple of \d+, so no cut of 'kv_heads' makes it": "its AutoTP cuts through heads that do not divide",
    r"super_offload\n\s+Extra inputs are not permitted": "has no SuperOffload",
    r"zenflow\n\s+Extra inputs are not permitted": "has no ZenFlow",
    r"^unknown parameter type": "its quantized weights don't step with torch's AdamW",
    r"has no 'param_shapes', which say what ZeRO's": "saves experts without the names of what ZeRO's files hold",
    r"FloatTensor\(float\(v\)\)\.detach": "its BF16_Optimizer does not step with experts on the CPU",
    r"has no AutoTP for training": "has no AutoTP for training",
    r"compatibility between 'autotp' and 'zero_stage = 3' has not been validated": "has no AutoTP at stage 3",
    r"allgather: invalid tensor size[\s\S]*_apply_distributed_muon_update": "its Muon does not step at stage 3",
    r"^shape '\[\d+, \d+, -1, 6\]' is invalid for input of size": "its AutoTP cuts through heads that do not divide",
    r"Number of heads \(\d+\) must be larger than sequence parallel size": "exchanges no heads of fewer than its ranks",
    r"1 validation error for TPTrainingConfig": "its AutoTP knows fewer keys",
    r"'FP16_UnfusedOptimizer' object has no attribute 'dp_process_group'": "does not load its own bf16 wrapper",
    r"FP16_UnfusedOptimizer\.load_state_dict\(\) got an unexpected keyword": "does not load its own bf16 wrapper",
    r"Muon optimizer is not yet compatible with ZeRO Stage 3": "has no Muon at stage 3",
    r"dp=\d+,ep=\d+,zero=0\) and [^;]* do not match; the checkpoint has no optimizer's states": (
        "saves no state of the optimizer that it takes for BF16_Optimizer"
    ),
    r"^the source has no optimizer param groups": "saves no state of the optimizer that it takes for BF16_Optimizer",
    r"'dict' object has no attribute 'view'": "its stage 3 loads universal folders of stage 3 alone",
    r"^PyTorch >= 2\.6 requires DeepSpeed >= 0\.16\.0": "is refused by Lightning 2.6 itself beside this torch",
    r"No module named 'deepspeed\.module_inject\.auto_ep_layer'": "has no AutoEP",
    r"has no AutoEP, and ignores 'expert_parallel' of its config": "has no AutoEP",
}


def pinned(package: str) -> str:
    """The version that `./scripts/test` runs with."""
    found = re.search(rf"^{re.escape(package)}==([^\s;]+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else ""


def installed(package: str) -> str:
    """The version that runs now, without a local label; '' where there is none."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def is_pinned(package: str = "deepspeed") -> bool:
    return installed(package) == pinned(package)


def environment() -> dict[str, str]:
    """What ranks need besides. DeepSpeed before 0.16.2 and transformers' Trainer of two years ago load their own files
    with torch.load's default, which since torch 2.6 refuses them; this is for stock loads, that ours are compared with.
    DeepSpeed 0.15 asks the command numactl on a CPU unless it is told how many ranks there are."""
    if is_pinned() and (is_pinned("transformers") or not installed("transformers")):
        return {}
    return {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "LOCAL_SIZE": "1"}


def mend() -> None:
    """Get round what other releases do wrong on CPUs or with a newer torch, for all engines of this process.

    DeepSpeed 0.18 flattens the weights of stages 1 and 2 on the device without ``.detach()`` (0.17 did it on the host,
    0.19 detaches), so the flat buffer belongs to autograd, and torch since 2.13 refuses the all-gather into views of
    it: steps go under torch.no_grad, as a program with these two would do it. AutoTP of 0.16 and 0.17 takes the current
    device's number for its name, which is none on the CPU. Stage 3 before 0.19 waits for the last of several gathers
    alone, and over gloo others are still under way then, so that ranks now and then train on weights that have not
    come: each parameter is gathered by itself. Pipelines of 0.16.0 to 0.19.2 step with other gradients than plain
    modules (`ucp.formats.shared.gradients`), stage 2 of 0.17.6 to 0.18.2 with the last micro step's alone, and
    BF16_Optimizer of 0.18.5 to 0.18.9 with each rank's own, and bf16 at stage 0 of 0.17.6 to 0.18.5 with those of all
    steps so far, and modules of 0.18.3 to 0.19.5 with what each returned tensor has divided: here they do as 0.19.8's.
    `as_released` leaves them.
    """
    if is_pinned():
        return
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedZeroOptimizer.step = torch.no_grad()(DeepSpeedZeroOptimizer.step)
    type(get_accelerator()).current_device = lambda self: "cpu"
    gather = Init._all_gather

    def gather_each(self: Any, params: list[Any], async_op: bool = False, hierarchy: Any = None) -> Any:
        if async_op or any(hasattr(param.ds_tensor, "ds_quant_scale") for param in params):
            return gather(self, params, async_op, hierarchy)
        for param in params:
            gather(self, [param], async_op, hierarchy)
        return None

    Init._all_gather = gather_each
    _divide_gradients_once(DeepSpeedEngine, PipelineEngine)
    _divide_the_loss(DeepSpeedEngine, PipelineEngine)
    _add_up_micro_steps(DeepSpeedZeroOptimizer)
    _reduce_all(DeepSpeedEngine)
    _zero_bf16(DeepSpeedEngine)


# What `mend` has replaced of how gradients are made: where, and what was there; None: nothing.
_REPLACED: list[tuple[Any, str, Any]] = []


def _replace(owner: Any, name: str, value: Any) -> None:
    _REPLACED.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, value)


def _divide_gradients_once(engine: Any, pipeline: Any) -> None:
    from ucp.deepspeed.live.releases import pipeline_gradients
    from ucp.formats.shared.gradients import AGAIN, SUM

    how = pipeline_gradients()
    if how == SUM:
        backward = engine.backward

        def backward_of_mean(self: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
            mean = loss / self.gradient_accumulation_steps() if isinstance(self, pipeline) else loss
            return backward(self, mean, *args, **kwargs)

        _replace(engine, "backward", backward_of_mean)
    elif how == AGAIN:
        divide = engine._backward_prologue_per_tensor

        def divide_in_last_stage(self: Any, grad: Any) -> Any:
            return divide(self, grad) if self.is_last_stage() else grad

        _replace(pipeline, "_backward_prologue_per_tensor", divide_in_last_stage)


def _divide_the_loss(engine: Any, pipeline: Any) -> None:
    from ucp.deepspeed.live.releases import divides_gradients_once

    if divides_gradients_once():
        return
    backward = engine.backward

    def backward_of_mean(
        self: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True, **kwargs: Any
    ) -> Any:
        if scale_wrt_gas and not isinstance(self, pipeline):
            loss, scale_wrt_gas = loss / self.gradient_accumulation_steps(), False
        return backward(self, loss, retain_graph, scale_wrt_gas, **kwargs)

    _replace(engine, "backward", backward_of_mean)


def _add_up_micro_steps(zero: Any) -> None:
    from ucp.deepspeed.live.releases import stage2_keeps_micro_steps

    if stage2_keeps_micro_steps():
        return
    tensors = zero.get_all_grad_tensors

    def added_up(self: Any, params: list[Any], dtype: Any) -> list[Any]:
        new = tensors(self, params, dtype)
        own = next(i for i, group in enumerate(self.params_in_partition) if group is params)
        for grad, before in zip(new, self.all_grad_tensors.get(own) or (), strict=False):
            grad.add_(before)
        return list(new)

    _replace(zero, "get_all_grad_tensors", added_up)


def _reduce_all(engine: Any) -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    from ucp.deepspeed.live.releases import bf16_optimizer_reduces_all

    if bf16_optimizer_reduces_all():
        return
    reduce, epilogue = engine.allreduce_gradients, BF16_Optimizer.backward_epilogue

    def reduce_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.optimizer, BF16_Optimizer) and not self.pipeline_parallelism:
            epilogue(self.optimizer)
            self.optimizer.clear_lp_grads()  # what comes after adds nothing a second time
        return reduce(self, *args, **kwargs)

    _replace(engine, "allreduce_gradients", reduce_all)


def _zero_bf16(engine: Any) -> None:
    from ucp.deepspeed.live.releases import zeroes_bf16_at_stage0

    if zeroes_bf16_at_stage0():
        return
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    take = engine._take_model_step

    def take_and_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = take(self, *args, **kwargs)
        if isinstance(self.optimizer, FP16_UnfusedOptimizer) and self.bfloat16_enabled():
            self.optimizer.zero_grad()
        return result

    _replace(engine, "_take_model_step", take_and_zero)


@contextmanager
def as_released() -> Iterator[None]:
    """Within this, engines take the gradients that the release takes, and not those that `mend` gives them."""
    ours = [(owner, name, vars(owner).get(name)) for owner, name, _ in _REPLACED]
    _set_back(_REPLACED)
    try:
        yield
    finally:
        _set_back(ours)


def _set_back(there: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in there:
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def cut(model: Any, size: int, dtype: str) -> Any:
    """The module, cut over so many ranks where a program of this release does that itself before it makes an engine:
    AutoTP of 0.16 and 0.17 has `deepspeed.tp_model_init` for it, and an engine cuts nothing. Since 0.18 engines do."""
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not hasattr(DeepSpeedEngine, "autotp_size") or hasattr(DeepSpeedEngine, "_apply_autotp_partitioning"):
        return model
    import deepspeed

    deepspeed.init_distributed("gloo")
    weights = {"fp32": torch.float32, "fp16": torch.float16}.get(dtype, torch.bfloat16)
    return deepspeed.tp_model_init(model, size, weights)


def knows(option: str) -> bool:
    """Whether the installed DeepSpeed's code has this key of its config; what it does not know it may ignore."""
    import deepspeed

    code = Path(deepspeed.__file__).parent / "runtime"
    return any(option in path.read_text(encoding="utf-8") for path in code.glob("*.py"))


def without(what: str) -> str:
    """The reason to skip a test, as the table of releases counts it, where this release has not got something."""
    return f"DeepSpeed {installed('deepspeed')}: {what}"


def skip_lacking(text: str) -> None:
    """Skip what a release cannot do, by what it or a rightful refusal says."""
    if reason := fault([text]):
        import pytest

        pytest.skip(reason)


def skip_unreadable(folder: str) -> None:
    """Skip what needs a checkpoint that another release than the pinned one wrote in a way that is rightly refused."""
    if is_pinned():
        return
    import ucp

    try:
        ucp.open(folder).close()
    except ucp.UcpError as error:
        skip_lacking(str(error))


def saved_beside(module: Any) -> dict[str, Any]:
    """What a program gives to a save, too, where DeepSpeed does not take it from the module by itself (before 0.19):
    how tensor parallelism cuts the model, which Megatron-DeepSpeed added to its checkpoints."""
    info = getattr(module, "universal_checkpoint_info", None)
    return {} if is_pinned() or info is None else {"universal_checkpoint_info": info}


def fault(messages: Iterable[str]) -> str:
    """What a failed job's messages say that this release of DeepSpeed can't; '' for a failure that nothing excuses."""
    if is_pinned():
        return ""
    for message in messages:
        for pattern, meaning in FAULTS.items():
            if re.search(pattern, message):
                return f"DeepSpeed {installed('deepspeed')}: {meaning}"
    return ""
