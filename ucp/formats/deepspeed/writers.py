"""What a checkpoint does not say, and the release that wrote it did: by the ``ds_version`` in its files.

Read in DeepSpeed's own history; the pipelines' gradients are measured, too (``tests/deepspeed/test_gradients.py``).
"""

from __future__ import annotations

import re

from ucp.formats.shared.gradients import AGAIN, MEAN, SUM

# The first releases whose pipelines step with these, from the newest on.
_GRADIENTS_SINCE = (((0, 19, 3), MEAN), ((0, 18, 3), AGAIN), ((0, 16, 0), SUM))
# The first release that clips gradients where its configuration does not name a norm (``runtime/constants.py``).
_CLIPS_SINCE = (0, 19, 3)


def pipeline_gradients(version: object) -> str:
    """What this release's pipelines step with (`ucp.formats.shared.gradients`); the mean if it is no release."""
    numbers = _numbers(version)
    return next((how for since, how in _GRADIENTS_SINCE if numbers >= since), MEAN)


def default_clipping(version: object) -> float | None:
    """The norm to which this release clips gradients if its configuration names none: 0, which is none at all, or 1;
    None if it is no release."""
    numbers = _numbers(version)
    return None if not numbers else 1.0 if numbers >= _CLIPS_SINCE else 0.0


def _numbers(version: object) -> tuple[int, ...]:
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return tuple(map(int, found.groups())) if found else ()
