"""Weights of checkpoints in a linear merge, in closed form: averages of a run's tail, moving averages, metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ucp.errors import BadArgument

FORMS = ("loss", "step")


def uniform(count: int) -> tuple[float, ...]:
    """A weight of 1 for each of ``count`` checkpoints; a merge divides by their sum."""
    if count < 1:
        raise BadArgument("there is no checkpoint to weigh; name at least one")
    return (1.0,) * count


def ema(count: int, beta: float) -> tuple[float, ...]:
    """Weights of an exponential moving average over checkpoints in their order, oldest first.

    ``z_0 = x_0`` and ``z_k = beta z_{k-1} + (1 - beta) x_k``, so ``w_0 = beta^(count-1)`` and
    ``w_k = (1 - beta) beta^(count-1-k)``.

    Raises
    ------
    BadArgument
        If beta is not between 0 (the last one alone) and 1 (the first one alone).
    """
    if not 0 <= beta <= 1:
        raise BadArgument(f"the decay of a moving average lies between 0 and 1, found {beta:g}")
    if count < 1:
        raise BadArgument("there is no checkpoint to weigh; name at least one")
    return (beta ** (count - 1), *((1 - beta) * beta ** (count - 1 - k) for k in range(1, count)))


def lawa(count: int, window: int, stride: int = 1) -> tuple[float, ...]:
    """Latest weight averaging: 1 for the last ``window`` checkpoints, every ``stride``-th of them, 0 for others.

    Their mean is what is meant: a merge divides by the sum.

    Raises
    ------
    BadArgument
        If there are not so many checkpoints.
    """
    if window < 1 or stride < 1:
        raise BadArgument(f"a window and a stride are at least 1, found {window} and {stride}")
    chosen = [count - 1 - k * stride for k in range(window)]
    if chosen[-1] < 0:
        raise BadArgument(
            f"the mean of the last {window} checkpoints, every {stride}., needs {(window - 1) * stride + 1} of them, "
            f"found {count}"
        )
    return tuple(1.0 if k in chosen else 0.0 for k in range(count))


def metric_weights(metrics: Sequence[float], penalty: float, form: str = "loss") -> tuple[float, ...]:
    """The weights of metrics-weighted averaging, which sum to 1: `proportions` over their sum."""
    parts = proportions(metrics, penalty, form)
    return tuple(part / math.fsum(parts) for part in parts)


def proportions(metrics: Sequence[float], penalty: float, form: str = "loss") -> tuple[float, ...]:
    """Metrics-weighted averaging: one metric a checkpoint, one penalty ``p >= 0``; the largest is 1.

    form: 'loss': ``w_i`` proportional to ``loss_i^-p``; 'step': to ``step_i^p``. So a penalty of 0 is the mean, and a
    large one takes the best. These forms are this project's: the published method names one penalty for a loss or a
    step, and its formula was not to be had.

    Raises
    ------
    BadArgument
        For metrics that are not finite and positive, a negative penalty, an unknown form.
    """
    if form not in FORMS:
        raise BadArgument(f"metrics are weighed by {' or '.join(FORMS)}, found '{form}'")
    if not math.isfinite(penalty) or penalty < 0:
        raise BadArgument(f"the penalty is at least 0, found {penalty:g}")
    for k, metric in enumerate(metrics):
        if not math.isfinite(metric) or metric <= 0:
            raise BadArgument(f"metric {k + 1} is {metric:g}; weights need finite metrics above 0")
    if form == "loss":
        return tuple((min(metrics) / metric) ** penalty for metric in metrics)
    return tuple((metric / max(metrics)) ** penalty for metric in metrics)
