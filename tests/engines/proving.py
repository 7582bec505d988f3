"""Every load in a rank of these tests proves itself: what is live afterwards has the checkpoint's logical digests.

Where a checkpoint has none, they are computed from its files. This is besides what the tests themselves compare.
"""

from __future__ import annotations

from typing import Any

# Why something that was loaded may stay without a proof.
HONEST = ("overlap", "do not take part")


def install() -> None:
    """From now on in this process."""
    from ucp.loading import load, proof

    prove = proof.prove

    def strict(catalog: Any, target: Any, what: Any, reader: Any, choice: Any, **more: Any) -> Any:
        found = prove(catalog, target, what, reader, proof.ALWAYS if choice is True else choice, **more)
        if choice is not False:
            assert found is not None
            assert str(found).startswith("proved: ")
            odd = {name: why for name, why in found.unproved.items() if not why.endswith(HONEST)}
            assert not odd, odd
            asked = {(want.tensor.name, want.tensor.state) for wants in what.wants.values() for want in wants}
            assert len(asked) <= found.tensors + len(found.unproved)
        return found

    if not hasattr(load.proof.prove, "is_strict"):
        strict.is_strict = True  # type: ignore[attr-defined]
        proof.prove = strict
