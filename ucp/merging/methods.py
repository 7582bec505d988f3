"""The methods of a merge by their names, each with the options that it takes. They become operations here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ucp.errors import BadArgument
from ucp.merging.operations import (
    Combination,
    Differences,
    Drawn,
    Largest,
    Lerp,
    Linear,
    Slerp,
    check_density,
)
from ucp.merging.weights import ema, lawa, proportions


@dataclass(frozen=True)
class MethodOptions:
    """What a method is given besides its sources.

    - weights: one for each source, without the base. normalize: divide by their sum; None is the method's own rule.
    - t: how far to go from the first source to the second: one number, or several, interpolated over the layers.
    - scale: the factor of task vectors.
    - density, seed: for TIES and DARE. elect: DARE with TIES' election of signs.
    - beta: the decay of a moving average.
    - window, stride: for the average of the latest checkpoints.
    - metrics, penalty, form: for metrics-weighted averaging.
    """

    weights: tuple[float, ...] | None = None
    normalize: bool | None = None
    t: tuple[float, ...] | None = None
    scale: float | None = None
    density: float | None = None
    seed: int | None = None
    elect: bool | None = None
    beta: float | None = None
    window: int | None = None
    stride: int | None = None
    metrics: tuple[float, ...] | None = None
    penalty: float | None = None
    form: str | None = None


@dataclass(frozen=True)
class Method:
    """A method: which options it takes, whether it needs a base, and how it becomes a parameter's operation.

    make: (sources, options, the number of the parameter's layer as a share of all) -> operation.
    """

    takes: tuple[str, ...]
    needs_base: bool
    make: Callable[[Sources, MethodOptions, float | None], Combination]


@dataclass(frozen=True)
class Sources:
    """Numbers of the checkpoints in a merge: those that are combined, and the base and the masks if there are any."""

    merged: tuple[int, ...]
    base: int | None = None
    masks: tuple[int, ...] = ()


def operations(method: str, sources: Sources, options: MethodOptions) -> Callable[[float | None], Combination]:
    """A function that gives a parameter's operation. It is called with the number of the parameter's layer as a share
    of all (None outside layers).

    Raises
    ------
    BadArgument
        For an unknown method, options that it does not take, too few or too many sources, or weights that sum to 0.
    """
    if method not in METHODS:
        raise BadArgument(f"there is no method '{method}'; known are {', '.join(METHODS)}")
    known = METHODS[method]
    for name, value in vars(options).items():
        if value is not None and name not in known.takes:
            raise BadArgument(
                f"the method '{method}' takes no '{name}'; it takes {', '.join(known.takes) or 'no options'}"
            )
    if known.needs_base and sources.base is None:
        raise BadArgument(f"the method '{method}' needs a base, the checkpoint that all sources began from")
    if not known.needs_base and sources.base is not None:
        raise BadArgument(f"the method '{method}' takes no base")
    if sources.masks and "masks" not in known.takes:
        raise BadArgument(f"the method '{method}' takes no masks")
    return lambda layer: known.make(sources, options, layer)


def resolved_weights(method: str, count: int, options: MethodOptions) -> tuple[float, ...]:
    """The weights that a linear method gives to this many sources. They are divided by their sum if the method does
    so."""
    weights = WEIGHTED[method](count, options)
    total = math.fsum(weights) if _normalises(method, options) else 1.0
    return tuple(weight / total for weight in weights)


def _normalises(method: str, options: MethodOptions) -> bool:
    return method != "ema" and options.normalize is not False


def _given(count: int, options: MethodOptions) -> tuple[float, ...]:
    weights = options.weights if options.weights is not None else (1.0,) * count
    if len(weights) != count:
        raise BadArgument(f"{len(weights)} weights were given for {count} checkpoints; give one for each")
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise BadArgument(f"weights have to be finite and not all 0, found {', '.join(f'{w:g}' for w in weights)}")
    return weights


def _ema(count: int, options: MethodOptions) -> tuple[float, ...]:
    return ema(count, _needed(options.beta, "beta", "ema"))


def _lawa(count: int, options: MethodOptions) -> tuple[float, ...]:
    return lawa(count, int(_needed(options.window, "window", "lawa")), options.stride or 1)


def _mwa(count: int, options: MethodOptions) -> tuple[float, ...]:
    if options.metrics is None or len(options.metrics) != count:
        raise BadArgument(
            f"metrics-weighted averaging needs one metric for each of {count} checkpoints, found "
            f"{0 if options.metrics is None else len(options.metrics)}"
        )
    return proportions(options.metrics, _needed(options.penalty, "penalty", "mwa"), options.form or "loss")


def _needed(value: float | None, name: str, method: str) -> float:
    if value is None:
        raise BadArgument(f"the method '{method}' needs '{name}' (--{name})")
    return value


WEIGHTED: Mapping[str, Callable[[int, MethodOptions], tuple[float, ...]]] = {
    "linear": _given,
    "ema": _ema,
    "lawa": _lawa,
    "mwa": _mwa,
}
"""The linear methods, and their weights before any division."""


def _linear(method: str) -> Callable[[Sources, MethodOptions, float | None], Combination]:
    def make(sources: Sources, options: MethodOptions, layer: float | None) -> Combination:
        weights = WEIGHTED[method](len(sources.merged), options)
        normalised = _normalises(method, options)
        if normalised and not math.fsum(weights):
            raise BadArgument("the weights sum to 0, so nothing can be divided by their sum; turn normalising off")
        return Linear(tuple(zip(sources.merged, weights, strict=True)), normalised)

    return make


def _between(sources: Sources, options: MethodOptions, layer: float | None, method: str) -> float:
    if len(sources.merged) != 2:
        raise BadArgument(f"the method '{method}' is between 2 checkpoints, found {len(sources.merged)}")
    if options.t is None:
        raise BadArgument(f"the method '{method}' needs 't' (--t), how far it goes from the first to the second")
    return interpolated(options.t, layer)


def interpolated(values: Sequence[float], layer: float | None) -> float:
    """Interpolate piecewise linearly over the layers: the first layer has the first value, and the last layer the last.
    Parameters outside layers get the mean of all values."""
    if len(values) == 1:
        return values[0]
    if layer is None:
        return math.fsum(values) / len(values)
    at = layer * (len(values) - 1)
    k = min(int(at), len(values) - 2)
    return values[k] + (at - k) * (values[k + 1] - values[k])


def _lerp(sources: Sources, options: MethodOptions, layer: float | None) -> Combination:
    t = _between(sources, options, layer, "lerp")
    return Lerp(sources.merged[0], sources.merged[1], t)


def _slerp(sources: Sources, options: MethodOptions, layer: float | None) -> Combination:
    t = _between(sources, options, layer, "slerp")
    return Slerp(sources.merged[0], sources.merged[1], t)


def _task(sources: Sources, options: MethodOptions, layer: float | None) -> Combination:
    if sources.masks and len(sources.masks) != len(sources.merged):
        raise BadArgument(f"{len(sources.masks)} masks were given for {len(sources.merged)} checkpoints; give one each")
    normalised = bool(options.normalize)
    return Differences(*_differences(sources, options), normalised=normalised, masks=sources.masks)


def _ties(sources: Sources, options: MethodOptions, layer: float | None) -> Combination:
    density = check_density(_needed(options.density, "density", "ties"))
    return Differences(*_differences(sources, options), selector=Largest(density), elected=True)


def _dare(sources: Sources, options: MethodOptions, layer: float | None) -> Combination:
    density = check_density(_needed(options.density, "density", "dare"))
    chosen = Drawn(density, options.seed or 0)
    return Differences(*_differences(sources, options), selector=chosen, elected=bool(options.elect))


def _differences(sources: Sources, options: MethodOptions) -> tuple[int, tuple[tuple[int, float], ...], float]:
    weights = _given(len(sources.merged), options)
    scale = 1.0 if options.scale is None else options.scale
    return sources.base or 0, tuple(zip(sources.merged, weights, strict=True)), scale


METHODS: Mapping[str, Method] = {
    "linear": Method(("weights", "normalize"), False, _linear("linear")),
    "lerp": Method(("t",), False, _lerp),
    "slerp": Method(("t",), False, _slerp),
    "task": Method(("weights", "normalize", "scale", "masks"), True, _task),
    "ties": Method(("weights", "scale", "density"), True, _ties),
    "dare": Method(("weights", "scale", "density", "seed", "elect"), True, _dare),
    "ema": Method(("beta",), False, _linear("ema")),
    "lawa": Method(("window", "stride"), False, _linear("lawa")),
    "mwa": Method(("metrics", "penalty", "form"), False, _linear("mwa")),
}
"""Every method by its name."""
