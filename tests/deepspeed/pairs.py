"""Pairs of a source's and a target's layout, with real engines on both sides, and what each must show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.engines.configs import Case

# The largest difference that a step's loss may show after an exact resume in another layout: sums are taken in
# another order there.
CLOSE = {"fp32": 5e-5, "bf16": 4e-3, "fp16": 4e-3, "bf16_optimizer": 4e-3}


@dataclass(frozen=True)
class Pair:
    """source, target: as in ``tests.engines.configs``. trained: steps that the target has done when it loads.
    losses: how the losses of further steps must agree: 'equal' to the uninterrupted run's (to the bit, state too),
    'close' to them, 'native': equal to those after DeepSpeed's own load, state too; or '' with the reason in ``why``.
    """

    source: Case
    target: Case
    losses: str = "close"
    why: str = ""
    trained: int = 0

    @property
    def label(self) -> str:
        name = f"{self.source.label}->{self.target.label}"
        return name + (f"-trained{self.trained}" if self.trained else "")


def same(case: Case, trained: int = 0) -> Pair:
    """Into the same layout: nothing may differ, now or after further steps."""
    return Pair(case, case, losses="equal", trained=trained)


def both(a: Case, b: Case, **more: Any) -> list[Pair]:
    return [Pair(a, b, **more), Pair(b, a, **more)]


FP32 = [Case(stage=z, dp=dp) for z, dp in ((0, 2), (1, 2), (2, 3), (3, 4))]
BF16 = [Case(stage=z, dp=dp, dtype="bf16", groups=3, frozen=True) for z, dp in ((0, 1), (1, 4), (2, 2), (3, 3))]
FP16 = Case(dtype="fp16", groups=2)
OVERFLOWS = FP16.but(scale_power=30)
QUIRK = "fp16 stage 0 divides gradients by a scale that its loss never had, so its exp_avg is scaled differently"
LOW = "steps of bf16 masters are not steps of fp32 masters"

STAGES = [
    # every stage into every other, and into itself; fresh engines and ones that have trained
    *(Pair(a, b, trained=2 * ((i + j) % 2)) for i, a in enumerate(FP32) for j, b in enumerate(FP32) if i != j),
    *(same(case, trained=2 * (i % 2)) for i, case in enumerate(FP32)),
    *(Pair(a, b, trained=2 * ((i + j + 1) % 2)) for i, a in enumerate(BF16) for j, b in enumerate(BF16) if i != j),
    *(same(case, trained=2 * ((i + 1) % 2)) for i, case in enumerate(BF16)),
]

MORE_STAGE3 = Case(stage=3, dp=2, groups=3, sub_group_size=300, persistence=60)
DTYPES = [
    *both(Case(stage=1, dp=3, dtype="bf16_optimizer", groups=2), Case(stage=1, dp=2, dtype="bf16", groups=2)),
    Pair(Case(stage=1, dp=3, dtype="bf16_optimizer", groups=2), Case(stage=3, dp=4, dtype="bf16", groups=2)),
    same(Case(stage=1, dp=3, dtype="bf16_optimizer", groups=2), trained=2),
    Pair(Case(stage=3, dp=3, dtype="bf16", groups=2), Case(stage=1, dp=4, dtype="bf16_optimizer", groups=2)),
    Pair(OVERFLOWS.but(stage=2, dp=2), OVERFLOWS.but(stage=3, dp=3)),
    Pair(OVERFLOWS.but(stage=3, dp=4), OVERFLOWS.but(stage=1, dp=1), trained=2),
    same(OVERFLOWS.but(stage=1, dp=2), trained=2),
    same(OVERFLOWS.but(stage=3, dp=3)),
    Pair(FP16.but(stage=3, dp=2), FP16.but(stage=0, dp=2), losses="", why=QUIRK),
    Pair(FP16.but(stage=0, dp=3), FP16.but(stage=2, dp=2), losses="", why=QUIRK, trained=2),
    same(FP16.but(stage=0, dp=3)),
    Pair(FP16.but(stage=1, dp=2), FP16.but(stage=2, dp=2, static_scale=64.0), losses="", why="scales of its own"),
    # masters and states in bf16, which any wider layout holds exactly
    same(Case(stage=2, dp=2, dtype="bf16", low_masters=True, low_states=True)),
    Pair(
        Case(stage=2, dp=2, dtype="bf16", low_masters=True, low_states=True),
        Case(stage=3, dp=3, dtype="bf16", low_masters=True, low_states=True),
    ),
    Pair(
        Case(stage=2, dp=2, dtype="bf16", low_masters=True, low_states=True),
        Case(stage=1, dp=3, dtype="bf16"),
        losses="",
        why=LOW,
    ),
    Pair(Case(stage=1, dp=2), Case(stage=2, dp=2, dtype="bf16"), losses="", why="another precision"),
    Pair(Case(stage=2, dp=2, dtype="bf16"), Case(stage=3, dp=2), losses="", why="another precision"),
]

OPTIONS = [
    # a group of one element, of which most ranks hold padding only
    *both(Case(stage=1, dp=4, groups=4), Case(stage=3, dp=4, groups=4), trained=2),
    *both(Case(stage=0, dp=1, groups=4, dtype="bf16"), Case(stage=2, dp=3, groups=4, dtype="bf16")),
    Pair(
        Case(stage=3, dp=3, groups=4, sub_group_size=20),
        Case(stage=1, dp=3, groups=4, dtype="bf16_optimizer"),
        losses="",
        why="another precision",
    ),
    # stage 3's subgroups, persistent parameters, its own offload
    Pair(MORE_STAGE3, MORE_STAGE3.but(dp=4, sub_group_size=100, persistence=0)),
    same(MORE_STAGE3, trained=2),
    *both(MORE_STAGE3.but(scheduler=True), Case(stage=1, dp=3, groups=3, scheduler=True)),
    *both(Case(stage=2, dp=2, offload=True), Case(stage=3, dp=3, offload=True, offload_parameters=True)),
    Pair(Case(stage=0, dp=2), Case(stage=3, dp=2, offload=True), trained=2),
    *both(
        Case(stage=3, dp=2, dtype="bf16", zero_init=True, frozen=True), Case(stage=1, dp=2, dtype="bf16", frozen=True)
    ),
    # flat orders and paddings of stages 1 and 2
    *both(Case(stage=2, dp=3, round_robin=True, groups=2), Case(stage=3, dp=2, groups=2)),
    Pair(Case(stage=1, dp=4, groups=2), Case(stage=2, dp=4, round_robin=True, groups=2), trained=2),
    same(Case(stage=2, dp=3, round_robin=True, groups=2)),
    *both(
        Case(stage=1, dp=3, parameter_alignment=True), Case(stage=2, dp=2, parameter_alignment=True, round_robin=True)
    ),
    *both(Case(stage=2, dp=2, parameter_alignment=True, dtype="bf16"), Case(stage=3, dp=4, dtype="bf16")),
    # files
    Pair(Case(stage=1, dp=2, elastic=True), Case(stage=3, dp=3)),
    Pair(Case(stage=2, dp=3, elastic=True), Case(stage=1, dp=2, elastic=True)),
    same(Case(stage=1, dp=3, elastic=True)),
    *both(Case(stage=1, dp=3, legacy_files=True), Case(stage=3, dp=2, legacy_files=True, frozen=False)),
    Pair(Case(stage=0, dp=2, dtype="bf16", legacy_files=True), Case(stage=2, dp=2, dtype="bf16")),
    # names
    *both(Case(stage=1, dp=2, wrapped=True, frozen=True), Case(stage=3, dp=3, frozen=True)),
    *both(Case(stage=0, dp=2, groups=3), Case(stage=2, dp=4, wrapped=True, groups=3)),
    *both(Case(stage=1, dp=2, tied=True, groups=3), Case(stage=3, dp=3, tied=True, groups=3)),
    *both(Case(stage=0, dp=2, tied=True, dtype="bf16"), Case(stage=2, dp=3, tied=True, dtype="bf16")),
    # how a step is made
    *both(
        Case(stage=1, dp=2, dtype="bf16", accumulation=2, clip=0.5, scheduler=True),
        Case(stage=3, dp=4, dtype="bf16", accumulation=2, clip=0.5, scheduler=True),
    ),
    Pair(
        Case(stage=1, dp=2, dtype="bf16_optimizer", accumulation=2, clip=0.5),
        Case(stage=2, dp=3, dtype="bf16", accumulation=2, clip=0.5, accumulate_fp32=True),
    ),
    # a transformers model
    *both(
        Case(stage=1, dp=2, dtype="bf16", model="llama", groups=2, frozen=True),
        Case(stage=3, dp=3, dtype="bf16", model="llama", groups=2, frozen=True),
    ),
    Pair(Case(stage=2, dp=4, model="llama", tied=True), Case(stage=0, dp=2, model="llama", tied=True), trained=2),
]


def _through(optimizer: str, *stages: tuple[int, int], **more: Any) -> list[Pair]:
    """This optimizer's state from each (stage, dp) into the next, round to the first again."""
    cases = [Case(stage=z, dp=dp, optimizer=optimizer, **more) for z, dp in stages]
    return [Pair(a, b, trained=2 * (i % 2)) for i, (a, b) in enumerate(zip(cases, [*cases[1:], cases[0]], strict=True))]


OPTIMIZERS = [
    *_through("adam", (1, 2), (3, 3), groups=2),
    *_through("amsgrad", (3, 2), (2, 3)),
    *_through("sgd", (1, 3), (3, 2), (0, 2), (2, 2), groups=2),
    *_through("plain_sgd", (0, 2), (1, 3), (3, 2)),
    *_through("adagrad", (2, 2), (3, 4), (0, 2)),
    *_through("rmsprop", (1, 2), (0, 1), (3, 3)),
    *_through("nadam", (3, 2), (2, 4)),
    *_through("lion_reference", (1, 2), (3, 3), (2, 3)),
    *_through("muon", (1, 2), (3, 3), (2, 2), (1, 4), dtype="bf16"),
    same(Case(stage=2, dp=3, optimizer="muon", dtype="bf16")),
    same(Case(stage=3, dp=2, optimizer="sgd", groups=3)),
    same(Case(stage=1, dp=2, optimizer="nadam"), trained=2),
]

# DeepSpeed compiles these on first use.
COMPILED = [
    *_through("cpu_adam", (2, 2), (3, 3), (1, 2), offload=True, groups=2),
    Pair(Case(stage=2, dp=2, optimizer="cpu_adam", offload=True), Case(stage=3, dp=2)),
    Pair(Case(stage=1, dp=3), Case(stage=2, dp=2, optimizer="cpu_adam", offload=True), trained=2),
    *both(
        Case(stage=0, dp=2, optimizer="fused_adam", dtype="bf16", groups=2), Case(stage=2, dp=3, dtype="bf16", groups=2)
    ),
    # DeepSpeed's kernels multiply up the powers of the betas while they run, and raise them anew after any load.
    *(
        Pair(case, case, losses="native")
        for case in (
            Case(stage=0, dp=2, optimizer="fused_adam", dtype="bf16", groups=2),
            Case(stage=3, dp=2, optimizer="cpu_adam", offload=True),
        )
    ),
]

PAIRS = [*STAGES, *DTYPES, *OPTIONS, *OPTIMIZERS]
