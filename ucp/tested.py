"""What the tests have run with; ``tests/README.md`` has the table, made by the runs themselves."""

from __future__ import annotations

TESTED = {
    "deepspeed": ("0.15.4", "0.16.9", "0.17.6", "0.18.9", "0.19.8"),
    "torch": ("2.6.0", "2.13.0"),
}
