"""How the ranks of a training job agree: if one of them finds something wrong, all of them refuse."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist

from ucp import limits
from ucp.errors import UcpError, noted, rebuilt

T = TypeVar("T")


# A value of at most this many bytes is sent at once, since another collective operation would take longer.
_SMALL_BYTES = 2048

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """In this block this process is the only rank, and does not communicate. The others may be doing something else."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _many() -> bool:
    return not _alone.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    return dist.get_rank() if _many() else 0


def world_size() -> int:
    return dist.get_world_size() if _many() else 1


def all_or_none(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank. If it raises on any rank, every rank raises.

    A rank with an error of its own raises that. The others raise the first failing rank's, with its number. A long text
    is the first failing rank's alone: of the same kind of error the others raise the beginning (`pointer`).
    Collective: every rank has to call it at the same place, and ``work`` itself must not communicate.
    """
    result, error = _attempt(work)
    _together(None, error)
    return result  # type: ignore[return-value]


def every(work: Callable[[], T]) -> list[T]:
    """As `all_or_none`, and what each rank found, in the order of the ranks: plain data."""
    return _together(*_attempt(work))


def _together(value: T | None, error: Exception | None) -> list[T]:
    """The values of all ranks, if none has an error. Collective."""
    if not _many():
        if error is not None:
            raise error
        return [value]  # type: ignore[list-item]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (value, None if error is None else noted(error)))
    first, note = next(((rank, note) for rank, (_, note) in enumerate(found) if note is not None), (0, None))
    if note is not None and first != dist.get_rank():
        _raise_after(first, note, error)
    if error is not None:
        raise error
    return [value for value, _ in found]


def _raise_after(first: int, note: Mapping[str, Any], error: Exception | None) -> NoReturn:
    """Raise on another rank than the first that failed. error: this rank's own, if it has one."""
    if error is None:
        error = rebuilt(note, f"rank {first}: ", otherwise=RuntimeError)
        raise pointer(error, first) if isinstance(error, UcpError) else error
    is_same = isinstance(error, UcpError) and type(error).__name__ == note["kind"]
    if is_same and len(str(error)) > limits.REFUSAL_ON_ALL_RANKS_CHARACTERS:
        raise pointer(cast(UcpError, error), first) from None
    raise error


def pointer(error: UcpError, rank: int) -> UcpError:
    """The same error as another rank than ``rank``, which says all of it, raises it: cut short if it is long, so that
    a job's many ranks do not each print a screen of text."""
    whole, start = str(error), f"rank {rank}: "
    whole = whole.removeprefix(start)
    text = whole
    if len(whole) > limits.REFUSAL_ON_ALL_RANKS_CHARACTERS:
        kept = whole[: limits.REFUSAL_POINTER_CHARACTERS].rpartition(" ")[0].rstrip(",;: ")
        text = f"{kept} … (rank {rank}'s message has all of it)"
    found = type(error)(start + text)
    found.restore(error.details())
    found.whole = start + whole
    return found


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks. They have to be plain data. Collective."""
    if not _many():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(work: Callable[[], T]) -> T:
    """Run ``work`` only on rank 0, and give its result to every rank. An error there is raised everywhere."""
    if not _many():
        return work()
    result, error = _attempt(work) if dist.get_rank() == 0 else (None, None)
    box: list[Any] = [(None, result) if error is None else (noted(error), None)]
    dist.broadcast_object_list(box, src=0)
    note, shared = box[0]
    if error is not None:
        raise error
    if note is not None:
        _raise_after(0, note, None)
    return shared


def distinct(value: T) -> tuple[list[T], list[int]]:
    """The different values of the ranks, each once, and for every rank the index of its own. Collective.

    Values have to be plain data. Small ones are sent at once. For large ones the ranks first exchange digests, and then
    only the first rank with each value sends it.
    """
    if not _many():
        return [value], [0]
    raw = pickle.dumps(value)
    small = len(raw) <= _SMALL_BYTES
    marks: list[Any] = gather((small, raw if small else hashlib.sha256(raw).digest()))
    if all(mark == marks[0] for mark in marks):  # the usual case, in which nobody need send anything
        return [value], [0] * len(marks)
    firsts = {mark: marks.index(mark) for mark in marks}
    sent: list[Any] = [raw if small else None for small, raw in marks]
    if not all(small for small, _ in marks):
        first = firsts[marks[dist.get_rank()]] == dist.get_rank()
        large = gather(raw if first and not small else None)
        sent = [here if here is not None else there for here, there in zip(sent, large, strict=True)]
    order = list(firsts)
    return [pickle.loads(sent[firsts[mark]]) for mark in order], [order.index(mark) for mark in marks]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # noqa: BLE001 (raised again once all ranks know)
        return None, error
