"""Jobs that run on the ranks: several loads into one engine, and models that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.engines import build
from tests.engines.configs import Case
from tests.engines.load_jobs import build_target
from tests.engines.resume import continue_training
from tests.engines.truth import Truth, compare, gather


@dataclass(frozen=True)
class Attempt:
    """One call of load_checkpoint. options: its further arguments."""

    folder: str
    tag: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """What came of an attempt on one rank: the error's class and text ("" if there was none), and what it changed."""

    kind: str
    text: str
    changed: tuple[str, ...]  # known to rank 0


def wider_gain(model: Any) -> None:
    """Another shape than the checkpoint's."""
    model.gain = nn.Parameter(torch.ones(3))


def another_buffer(model: Any) -> None:
    model.register_buffer("extra_buffer", torch.zeros(2))


def another_parameter(model: Any) -> None:
    model.extra = nn.Parameter(torch.ones(2, 3))


def no_shift(model: Any) -> None:
    """One parameter less."""
    del model.shift


def strided(model: Any) -> None:
    """A weight and a buffer in another order in memory than their dimensions say. (DeepSpeed wants weights whose last
    dimension is contiguous.)"""
    model.cube = nn.Parameter(model.cube.data.permute(1, 0, 2).contiguous().permute(1, 0, 2))
    model.register_buffer("running", torch.zeros(14)[::2])


ALTER: Mapping[str, Callable[[Any], None]] = {
    f.__name__: f for f in (wider_gain, another_buffer, another_parameter, no_shift, strided)
}


def altered(change: str) -> None:
    """Have every model of this process changed so. A rank's process lives for one job."""
    original = build.build_model

    def build_and_change(case: Case) -> nn.Module:
        model = original(case)
        ALTER[change](model)
        return model

    build.build_model = build_and_change


def attempts(
    case: Case,
    tries: Sequence[Attempt],
    *,
    change: str = "",
    trained: int = 1,
    section: Mapping[str, Any] | None = None,
) -> list[Refusal]:
    """Make every attempt in turn on one engine."""
    from ucp.errors import UcpError

    if change:
        altered(change)
        trained = 0  # its forward pass would not fit
    engine = build_target(case, section, trained)
    out = []
    for attempt in tries:
        before, outside = gather(engine), rng_and_counters(engine)
        kind = text = ""
        try:
            engine.load_checkpoint(attempt.folder, attempt.tag, **attempt.options)
        except UcpError as error:
            kind, text = type(error).__name__, error.whole
        after = gather(engine)
        changed = [] if before is None or after is None else compare(before, after)
        if outside != rng_and_counters(engine):
            changed.append("random numbers or the engine's own counters")
        out.append(Refusal(kind, text, tuple(changed)))
    return out


def rng_and_counters(engine: Any) -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        engine.micro_steps,
        engine.global_steps,
        engine.loaded_checkpoint_dp_world_size,
    )


@dataclass(frozen=True)
class Partial:
    """A load that left something by the caller's leave: truths before and after it (rank 0), and its report."""

    before: Truth | None
    after: Truth | None
    left: tuple[str, ...]
    unused: tuple[str, ...]
    nbytes: int
    client_state: Mapping[str, Any] | None


def partial(
    case: Case,
    attempt: Attempt,
    *,
    change: str = "",
    trained: int = 2,
    section: Mapping[str, Any] | None = None,
) -> Partial:
    """Load, with permissions; where the model is as it was, train a step on to show that it still can."""
    if change:
        altered(change)
        trained = 0
    engine = build_target(case, section, trained)
    before = gather(engine)
    _, client_state = engine.load_checkpoint(attempt.folder, attempt.tag, **attempt.options)
    after = gather(engine)
    report = engine.ucp.last_load
    if not change:
        continue_training(engine, case, 3, 1)
    return Partial(before, after, report.plan.left, report.plan.unused, report.nbytes, client_state)


def version(found: str, allow: bool) -> str:
    """The refusal of a DeepSpeed that calls itself ``found``; '' if the engine was made."""
    import deepspeed

    from ucp.errors import Unsupported

    deepspeed.__version__ = found
    try:
        engine = build_target(Case(dp=1), {"allow_untested_version": allow})
    except Unsupported as error:
        return error.whole
    return "" if hasattr(engine, "ucp") else "not bound"


def lacking(owner: str, name: str, allow: bool) -> str:
    """The refusal of an engine where DeepSpeed's ``owner`` ("module:class") has no ``name``; '' if it was made."""
    import ucp.deepspeed  # noqa: F401 (keeps DeepSpeed's own initialize)
    from tests.engines.zygote import resolve
    from ucp.errors import Unsupported

    delattr(resolve(owner), name)
    try:
        engine = build_target(Case(dp=2), {"allow_untested_version": allow})
    except Unsupported as error:
        return error.whole
    return "" if hasattr(engine, "ucp") else "not bound"


def gathers_left_behind() -> bool:
    """Whether the end of a load waits for gathers that are under way when DeepSpeed's own gather returns."""
    import torch.distributed as dist

    from ucp.deepspeed.live.stage3 import Stage3

    engine = build_target(Case(stage=3, dp=2))
    left = []
    whole = engine.optimizer.checkpoint_event_epilogue

    def leave() -> None:
        whole()
        group = engine.optimizer.persistent_parameters[0].ds_process_group
        for _ in range(50):
            piece = torch.ones(1 << 19)
            out = torch.empty(2 * piece.numel())
            left.append(dist.all_gather_into_tensor(out, piece, group, async_op=True))

    engine.optimizer.checkpoint_event_epilogue = leave
    stage = Stage3(engine)
    stage.begin()
    stage.finish()
    return len(left) == 50 and all(work.is_completed() for work in left)


def bad_section(section: Any) -> str:
    """What ``initialize`` says of this "ucp" section."""
    import ucp.deepspeed
    from tests.engines.configs import make_config
    from ucp.errors import BadArgument

    try:
        ucp.deepspeed.initialize(model=nn.Linear(2, 2), config=make_config(Case(dp=1)) | {"ucp": section})
    except BadArgument as error:
        return error.whole
    return ""


def mid_accumulation(case: Case, folder: str, tag: str) -> tuple[str, str, str]:
    """Load after the first of two micro-steps: refused; after the second: loaded."""
    from tests.engines import models
    from ucp.errors import UcpError

    engine = build_target(case)
    kind = text = ""
    for micro in range(2):
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        engine.backward(models.loss(case.model, engine, *models.batch(case.model, micro, rank, world_size)))
        engine.step()
        if micro == 0:
            try:
                engine.load_checkpoint(folder, tag)
            except UcpError as error:
                kind, text = type(error).__name__, error.whole
    engine.load_checkpoint(folder, tag)
    return kind, text, "loaded"


def unsupported(case: Case, zero: dict[str, Any], folder: str, tag: str) -> tuple[str, str, tuple[str, ...]]:
    """Load into an engine whose ZeRO configuration has become this one."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from ucp.errors import UcpError

    engine = build_target(case)
    engine._config.zero_config = DeepSpeedZeroConfig(stage=case.stage, **zero)
    before = gather(engine)
    try:
        engine.load_checkpoint(folder, tag)
    except UcpError as error:
        after = gather(engine)
        assert before is not None
        assert after is not None
        return type(error).__name__, error.whole, tuple(compare(before, after))
    return "", "", ()


def _refusal(work: Callable[[], Any], kind: type[Exception]) -> tuple[str, str]:
    try:
        work()
    except kind as error:
        return type(error).__name__, error.whole
    return "", ""


def one_rank_cannot_read(case: Case, folder: str, tag: str) -> tuple[str, str, tuple[str, ...], bool]:
    """The last rank may open no more files while the others read; afterwards it may again."""
    import os
    import resource

    from ucp.errors import UcpError

    engine = build_target(case, trained=1)
    before = gather(engine)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        free = min(set(range(4096)) - {int(fd) for fd in os.listdir("/proc/self/fd")})
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    kind, text = _refusal(lambda: engine.load_checkpoint(folder, tag), UcpError)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    after = gather(engine)
    changed = () if before is None or after is None else tuple(compare(before, after))
    path, _ = engine.load_checkpoint(folder, tag)
    return kind, text, changed, path is not None
