"""Weights of checkpoints in a linear merge, by formulas: averages of a run's last checkpoints, moving averages,
metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ucp.errors import BadArgument

FORMS = ("loss", "step")


def uniform(count: int) -> tuple[float, ...]:
    """A weight of 1 for each of ``count`` checkpoints. A merge divides by their sum.

    Raises
    ------
    BadArgument
        If count is below 1.
    """
    if count < 1:
        raise BadArgument("there is no checkpoint to weigh; name at least one")
    return (1.0,) * count


def ema(count: int, beta: float) -> tuple[float, ...]:
    """Weights of an exponential moving average over checkpoints in their order, oldest first.

    ``z_0 = x_0`` and ``z_k = beta z_{k-1} + (1 - beta) x_k``, so ``w_0 = beta^(count-1)`` and
    ``w_k = (1 - beta) beta^(count-1-k)``.

    Parameters
    ----------
    count
        How many checkpoints there are.
    beta
        The decay, from 0 (the last checkpoint alone) to 1 (the first alone).

    Returns
    -------
    tuple of float
        One weight for each checkpoint. Their sum is 1.

    Raises
    ------
    BadArgument
        If beta is not between 0 and 1, or count is below 1.
    """
    if not 0 <= beta <= 1:
        raise BadArgument(f"the decay of a moving average lies between 0 and 1, found {beta:g}")
    if count < 1:
        raise BadArgument("there is no checkpoint to weigh; name at least one")
    return (beta ** (count - 1), *((1 - beta) * beta ** (count - 1 - k) for k in range(1, count)))


def lawa(count: int, window: int, stride: int = 1) -> tuple[float, ...]:
    """Weights of latest weight averaging, the mean of a run's last checkpoints.

    Parameters
    ----------
    count
        How many checkpoints there are, oldest first.
    window
        How many of them are averaged.
    stride
        Take only every ``stride``-th, counted from the last.

    Returns
    -------
    tuple of float
        1 for each checkpoint that is averaged, and 0 for the others. A merge divides by the sum.

    Raises
    ------
    BadArgument
        If window or stride is below 1, or there are too few checkpoints.
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
    """Weights of metrics-weighted averaging.

    Parameters
    ----------
    metrics
        One finite number above 0 for each checkpoint.
    penalty
        ``p >= 0``. 0 gives the mean, and a large one the best checkpoint.
    form
        'loss': ``w_i`` is proportional to ``loss_i^-p``. 'step': to ``step_i^p``.

    Returns
    -------
    tuple of float
        One weight for each checkpoint. Their sum is 1.

    Raises
    ------
    BadArgument
        For metrics that are not finite and above 0, a negative penalty, or an unknown form.
    """
    parts = proportions(metrics, penalty, form)
    return tuple(part / math.fsum(parts) for part in parts)


def proportions(metrics: Sequence[float], penalty: float, form: str = "loss") -> tuple[float, ...]:
    """As `metric_weights`, but scaled so that the largest weight is 1.

    The formulas are this project's. The published method has one penalty for a loss or a step, but its formula could
    not be found.

    Raises
    ------
    BadArgument
        As `metric_weights`.
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
