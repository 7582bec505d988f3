"""torch's threads while what was loaded is put in place and rounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ucp
from ucp import limits
from ucp.job.torch_threads import all_processors
from ucp.torchdist.target import StateDictTarget


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("processors", "ranks", "own", "wanted"), [(8, 2, 1, 4), (8, 1, 3, 8), (2, 4, 1, 1), (4, 2, 3, 3)]
)
def test_a_ranks_part_of_the_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, ranks: int, own: int, wanted: int
) -> None:
    monkeypatch.setattr(limits, "processors", lambda: processors)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    torch.set_num_threads(own)
    with all_processors():
        assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == own
    with pytest.raises(KeyError), all_processors():
        raise KeyError
    assert torch.get_num_threads() == own


def test_a_load_uses_them_where_it_changes_what_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ucp.save({"w": torch.arange(9.0)}, tmp_path / "saved")
    seen = []
    monkeypatch.setattr(limits, "processors", lambda: 3)
    for name in ("put", "apply"):
        own = getattr(StateDictTarget, name)

        def watched(self: object, loaded: object, own: object = own) -> None:
            seen.append(torch.get_num_threads())
            own(self, loaded)  # type: ignore[operator]

        monkeypatch.setattr(StateDictTarget, name, watched)
    torch.set_num_threads(1)
    state = {"w": torch.zeros(9)}
    ucp.load(state, tmp_path / "saved")
    assert torch.equal(state["w"], torch.arange(9.0))
    assert seen == [3, 3]
    assert torch.get_num_threads() == 1
