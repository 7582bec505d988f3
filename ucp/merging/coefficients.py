"""Searching the coefficients of a linear merge, and the loss along the line between two checkpoints.

The search is evolutionary, over coefficients that sum to 1 and may be negative. (This is LCSC's problem. Its search was
never published, so the strategy is this project's.) The population begins with the last checkpoint alone, the mean and
moving averages. Children come from its better half, with Gaussian noise that shrinks, and replace the worst. The search
is seeded, and logs every evaluation as a line of JSON, so that an interrupted search continues as if nothing had
happened.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ucp.checkpoint import Checkpoint
from ucp.checkpoint import open as open_checkpoint
from ucp.errors import BadArgument, Mismatch
from ucp.merging import weights
from ucp.storage import locations

Objective = Callable[[Any], float]
"""Lower is better. Called with the model, or, where none is given, with the merged tensors by name."""

_POPULATION = 20
_SIGMA = 0.05
_SHRINKING = 0.99
_BETAS = (0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes
    ----------
    weights
        The best coefficients: one for each source. Their sum is 1.
    objective
        The objective at these.
    evaluations
        How many coefficients were evaluated.
    """

    weights: tuple[float, ...]
    objective: float
    evaluations: int


@dataclass(frozen=True)
class Barrier:
    """The objective along the line from a to b.

    Attributes
    ----------
    t
        The points, from 0 (a) to 1 (b).
    objectives
        The objective at each point.
    height
        How far the objective rises at most above the straight line between its values at both ends. 0 if it does not.
    """

    t: tuple[float, ...]
    objectives: tuple[float, ...]
    height: float


def search(
    sources: Sequence[str | os.PathLike[str] | Checkpoint],
    objective: Objective,
    budget: int = 200,
    *,
    model: torch.nn.Module | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search for coefficients whose linear merge of the sources has the lowest objective.

    Parameters
    ----------
    sources
        Checkpoints of any formats and layouts, oldest first.
    objective
        Called once for each evaluation. Lower is better. It gets the model, or without one the merged tensors by name.
    budget
        How many evaluations to make in all, with those of an earlier attempt.
    model
        Its parameters and buffers are set to the merged ones before each evaluation, and to the best ones at the end.
    device
        Where the floating-point weights are held, as float32: the first source's, and the others' differences from it.
    seed
        The seed of the search.
    log
        A file of JSON lines, one for each evaluation. If it exists, the search continues from it.

    Returns
    -------
    SearchResult

    Raises
    ------
    BadArgument
        For fewer than two sources, a budget below 1, or the log of another search.
    Mismatch
        For sources with different names or shapes, or a model that lacks their parameters.
    """
    if len(sources) < 2 or budget < 1:
        raise BadArgument(f"a search needs at least 2 checkpoints and 1 evaluation, found {len(sources)} and {budget}")
    line = _MixedWeights.of(sources, device, model)
    evaluate = _Evaluations(lambda alpha: float(objective(line.at(alpha))), budget, None if log is None else Path(log))
    _evolve(evaluate, len(sources), random.Random(seed))
    best = min(evaluate.done, key=lambda one: one[1])
    line.at(best[0])
    return SearchResult(best[0], best[1], len(evaluate.done))


def barrier(
    a: str | os.PathLike[str] | Checkpoint,
    b: str | os.PathLike[str] | Checkpoint,
    objective: Objective,
    points: int = 11,
    *,
    model: torch.nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Barrier:
    """Evaluate the objective along the line ``a + t (b - a)``, to see whether two checkpoints lie in one basin.

    Parameters
    ----------
    a, b
        Checkpoints of any formats and layouts.
    points
        How many points of the line are evaluated, with both ends. They have equal distances.
    objective, model, device
        As for `search`.

    Returns
    -------
    Barrier

    Raises
    ------
    BadArgument
        For fewer than two points.
    Mismatch
        As for `search`.
    """
    if points < 2:
        raise BadArgument(f"a line has at least 2 points, found {points}")
    line = _MixedWeights.of((a, b), device, model)
    t = tuple(k / (points - 1) for k in range(points))
    found = tuple(float(objective(line.at((1 - x, x)))) for x in t)
    excess = max(y - ((1 - x) * found[0] + x * found[-1]) for x, y in zip(t, found, strict=True))
    return Barrier(t, found, max(excess, 0.0))


class _Evaluations:
    """What was evaluated, in order. Lines of an earlier attempt are used instead of evaluating again."""

    def __init__(self, evaluate: Callable[[tuple[float, ...]], float], budget: int, path: Path | None) -> None:
        self.done: list[tuple[tuple[float, ...], float]] = []
        self._evaluate = evaluate
        self._budget = budget
        self._path = path
        self._known = [] if path is None or not path.exists() else _lines(path)

    @property
    def exhausted(self) -> bool:
        return len(self.done) >= self._budget

    def __call__(self, alpha: tuple[float, ...]) -> float:
        number = len(self.done)
        if number < len(self._known):
            coefficients, value = self._known[number]
            if coefficients != alpha:
                raise BadArgument(
                    f"{self._path}: evaluation {number + 1} is of other coefficients than this search's; it belongs to "
                    "another search (sources, seed or objective), so name another file"
                )
        else:
            value = self._evaluate(alpha)
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as stream:
                    said = {"evaluation": number + 1, "coefficients": alpha, "objective": value}
                    stream.write(json.dumps(said) + "\n")
        self.done.append((alpha, value))
        return value if math.isfinite(value) else math.inf


def _lines(path: Path) -> list[tuple[tuple[float, ...], float]]:
    """A log's evaluations. If its last line was cut short, the line is removed from the file."""
    out, whole = [], []
    for text in locations.read(path).decode("utf-8").splitlines(keepends=True):
        try:
            said = json.loads(text)
            out.append((tuple(map(float, said["coefficients"])), float(said["objective"])))
        except (ValueError, KeyError, TypeError):
            break
        whole.append(text)
    path.write_text("".join(whole), encoding="utf-8")
    return out


def _evolve(evaluate: _Evaluations, count: int, chance: random.Random) -> None:
    """Evaluate until the budget is spent."""
    last = tuple(float(k == count - 1) for k in range(count))
    mean = tuple(1.0 / count for _ in range(count))
    starts = [last, mean, *(weights.ema(count, beta) for beta in _BETAS)]
    population: list[tuple[tuple[float, ...], float]] = []
    sigma = _SIGMA
    for k in range(_POPULATION):
        if evaluate.exhausted:
            return
        alpha = starts[k] if k < len(starts) else _noisy(starts[k % len(starts)], sigma, chance)
        population.append((alpha, evaluate(alpha)))
    while not evaluate.exhausted:
        half = sorted(population, key=lambda one: one[1])[: _POPULATION // 2]
        one, other = (min(chance.sample(half, 2), key=lambda each: each[1])[0] for _ in range(2))
        child = tuple((x + y) / 2 for x, y in zip(one, other, strict=True)) if chance.random() < 0.5 else one
        child = _noisy(child, sigma, chance)
        value = evaluate(child)
        sigma *= _SHRINKING
        worst = max(range(_POPULATION), key=lambda k: population[k][1])
        if value < population[worst][1]:
            population[worst] = child, value


def _noisy(alpha: tuple[float, ...], sigma: float, chance: random.Random) -> tuple[float, ...]:
    """The coefficients with noise on about half of them. The first one is set so that the sum is 1."""
    moved = [x + chance.gauss(0, sigma) if chance.random() < 0.5 else x for x in alpha[1:]]
    return (1.0 - math.fsum(moved), *moved)


@dataclass
class _MixedWeights:
    """The first source's weights, the others' differences from them, and the tensors that a merge is written into."""

    first: Mapping[str, torch.Tensor]
    differences: Sequence[Mapping[str, torch.Tensor]]
    out: Mapping[str, torch.Tensor]
    model: torch.nn.Module | None

    @classmethod
    def of(
        cls,
        sources: Sequence[str | os.PathLike[str] | Checkpoint],
        device: str | torch.device,
        model: torch.nn.Module | None,
    ) -> _MixedWeights:
        first = _weights(sources[0], device)
        differences = []
        for source in sources[1:]:
            found = _weights(source, device)
            for name in sorted(set(first) ^ set(found)):
                raise Mismatch(f"'{name}' is not in all sources; search over checkpoints of one model")
            for name, tensor in found.items():
                if tensor.shape != first[name].shape:
                    raise Mismatch(f"'{name}' is {list(first[name].shape)} and {list(tensor.shape)} in two sources")
                tensor -= first[name]
            differences.append(found)
        if model is None:
            return cls(first, differences, {name: torch.empty_like(t) for name, t in first.items()}, None)
        live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        lacking = sorted(set(first) - set(live))
        if lacking:
            raise Mismatch(f"the model has no '{lacking[0]}', which the checkpoints have; pass the model they are of")
        return cls(first, differences, {name: live[name] for name in first}, model)

    @torch.no_grad()
    def at(self, alpha: Sequence[float]) -> Any:
        """The model, or the tensors by name, with these coefficients."""
        for name, tensor in self.first.items():
            merged = tensor
            for weight, difference in zip(alpha[1:], self.differences, strict=True):
                if weight:
                    merged = torch.add(merged, difference[name], alpha=weight)
            self.out[name].copy_(merged)
        return self.model if self.model is not None else self.out


def _weights(source: str | os.PathLike[str] | Checkpoint, device: str | torch.device) -> dict[str, torch.Tensor]:
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    try:
        out = {}
        for name in opened.parameters:
            tensor = opened.read(name)
            if tensor.is_floating_point():
                out[name] = tensor.to(device, torch.float32)
        return out
    finally:
        if opened is not source:
            opened.close()
