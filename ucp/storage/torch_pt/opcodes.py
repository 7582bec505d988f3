"""What the operations of a pickle do to the stack and the memo of the machine that runs them.

The opcodes are those that protocols 2 to 5 write (Python's `pickletools` describes each). What an operation may name,
call or change is decided by `ucp.storage.torch_pt.pickles`.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, BinaryIO

from ucp import limits
from ucp.errors import DamagedCheckpoint
from ucp.storage.torch_pt import allowlist

ITEM_BYTES = 64
"""Bytes, about, that Python keeps for an entry of a dict or set."""
STOP = object()
"""What the last operation of a pickle returns."""
MARK = object()


class Machine(ABC):
    """The stack and the memo of one pickle, and the stream that it comes from.

    `limit` is the number of bytes the stream has in all: no item may claim to be longer.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream_read = stream.read
        self.readline = stream.readline
        self.limit = limit
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.spent = 0  # about how many bytes of memory was built so far

    @abstractmethod
    def find(self, module: str, name: str) -> Any:
        """What a global stands for."""

    @abstractmethod
    def call(self, target: Any, args: Any) -> Any:
        """What a call of the target returns."""

    @abstractmethod
    def new(self, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        """A new object of a class."""

    @abstractmethod
    def build(self, obj: Any, state: Any) -> None:
        """Give an object its state."""

    @abstractmethod
    def extend(self, target: Any, items: list[Any]) -> None:
        """Append to a list."""

    @abstractmethod
    def set_items(self, target: Any, items: list[Any]) -> None:
        """Put keys and values, in turn, into a dict."""

    @abstractmethod
    def persist(self, saved: Any) -> Any:
        """The object that lies outside the pickle."""

    def read(self, count: int) -> bytes:
        if count > self.limit:
            raise DamagedCheckpoint(f"its pickle has an item of {count} bytes, more than the whole file")
        data = self.stream_read(count)
        if len(data) != count:
            raise DamagedCheckpoint("not a readable pickle: it ends too early")
        self.spent += count
        return data

    def long(self, count: int) -> int:
        if count > limits.INTEGER_BYTES:
            raise DamagedCheckpoint(
                f"its pickle has an integer of {count} bytes, and {limits.INTEGER_BYTES} is the most that is read"
            )
        return int.from_bytes(self.read(count), "little", signed=True)

    def uint(self, count: int) -> int:
        return int.from_bytes(self.read(count), "little")

    def line(self) -> str:
        line = self.readline()
        if not line.endswith(b"\n"):
            raise DamagedCheckpoint("not a readable pickle: it ends too early")
        return line[:-1].decode("utf-8")

    def pop(self) -> Any:
        item = self.stack.pop()
        if item is MARK:
            raise ValueError("a mark where a value belongs")
        return item

    def top(self) -> Any:
        item = self.stack[-1]
        if item is MARK:
            raise ValueError("a mark where a value belongs")
        return item

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = stack[at + 1 :]
        del stack[at:]
        return items


Operation = Callable[[Machine], Any]
OPCODES: list[Operation | None] = [None] * 256


def _opcode(code: bytes) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPCODES[code[0]] = function
        return function

    return register


def _pusher(code: bytes, make: Callable[[Machine], Any]) -> None:
    OPCODES[code[0]] = lambda self: self.stack.append(make(self))


# Values. The comment of each line is the opcode's name in pickletools.
_pusher(b"N", lambda self: None)  # NONE
_pusher(b"\x88", lambda self: True)  # NEWTRUE
_pusher(b"\x89", lambda self: False)  # NEWFALSE
_pusher(b"J", lambda self: int.from_bytes(self.read(4), "little", signed=True))  # BININT
_pusher(b"\x8a", lambda self: self.long(self.uint(1)))  # LONG1
_pusher(b"\x8b", lambda self: self.long(self.uint(4)))  # LONG4
_pusher(b"G", lambda self: struct.unpack(">d", self.read(8))[0])  # BINFLOAT
_pusher(b"\x8d", lambda self: self.read(self.uint(8)).decode("utf-8", "surrogatepass"))  # BINUNICODE8
_pusher(b"T", lambda self: self.read(self.uint(4)).decode("utf-8"))  # BINSTRING, written by Python 2
_pusher(b"U", lambda self: self.read(self.uint(1)).decode("utf-8"))  # SHORT_BINSTRING, written by Python 2
_pusher(b"B", lambda self: self.read(self.uint(4)))  # BINBYTES
_pusher(b"C", lambda self: self.read(self.uint(1)))  # SHORT_BINBYTES
_pusher(b"\x8e", lambda self: self.read(self.uint(8)))  # BINBYTES8
_pusher(b"\x96", lambda self: bytearray(self.read(self.uint(8))))  # BYTEARRAY8

# Containers.
_pusher(b")", lambda self: ())  # EMPTY_TUPLE
_pusher(b"\x91", lambda self: frozenset(allowlist.checked_keys(self.pop_to_mark())))  # FROZENSET


@_opcode(b"]")  # EMPTY_LIST
def _empty_list(self: Machine) -> None:
    self.spent += 56
    self.stack.append([])


@_opcode(b"}")  # EMPTY_DICT
def _empty_dict(self: Machine) -> None:
    self.spent += 64
    self.stack.append({})


@_opcode(b"\x8f")  # EMPTY_SET
def _empty_set(self: Machine) -> None:
    self.spent += 216
    self.stack.append(set())


@_opcode(b"t")  # TUPLE
def _tuple(self: Machine) -> None:
    self.spent += 40
    self.stack.append(tuple(self.pop_to_mark()))


@_opcode(b"l")  # LIST
def _list(self: Machine) -> None:
    self.spent += 56
    self.stack.append(self.pop_to_mark())


# The memo.
_pusher(b"2", lambda self: self.top())  # DUP

# Objects.
_pusher(b"Q", lambda self: self.persist(self.pop()))  # BINPERSID


# Nine in ten operations of a long pickle are among these, so they make no further Python calls. BINGET and LONG_BINGET
# are done in `ucp.storage.torch_pt.pickles`, without any.
@_opcode(b"q")  # BINPUT
def _put1(self: Machine) -> None:
    item = self.stack[-1]
    if item is MARK:
        raise ValueError("a mark where a value belongs")
    self.memo[self.stream_read(1)[0]] = item


@_opcode(b"r")  # LONG_BINPUT
def _put4(self: Machine) -> None:
    item = self.stack[-1]
    if item is MARK:
        raise ValueError("a mark where a value belongs")
    self.memo[int.from_bytes(self.stream_read(4), "little")] = item


@_opcode(b"\x94")  # MEMOIZE
def _memoize(self: Machine) -> None:
    item = self.stack[-1]
    if item is MARK:
        raise ValueError("a mark where a value belongs")
    self.memo[len(self.memo)] = item


@_opcode(b"(")  # MARK
def _mark(self: Machine) -> None:
    self.stack.append(MARK)


@_opcode(b"\x85")  # TUPLE1
def _tuple1(self: Machine) -> None:
    item = self.stack[-1]
    if item is MARK:
        raise ValueError("a mark where a value belongs")
    self.spent += 48
    self.stack[-1] = (item,)


@_opcode(b"K")  # BININT1
def _int1(self: Machine) -> None:
    self.stack.append(self.stream_read(1)[0])


@_opcode(b"M")  # BININT2
def _int2(self: Machine) -> None:
    low, high = self.stream_read(2)
    self.stack.append(low | high << 8)


@_opcode(b"\x8c")  # SHORT_BINUNICODE
def _short_text(self: Machine) -> None:
    count = self.stream_read(1)[0]
    raw = self.stream_read(count)
    if len(raw) != count:
        raise DamagedCheckpoint("not a readable pickle: it ends too early")
    self.spent += 56
    self.stack.append(raw.decode("utf-8", "surrogatepass"))


@_opcode(b"X")  # BINUNICODE
def _text(self: Machine) -> None:
    count = int.from_bytes(self.stream_read(4), "little")
    self.stack.append(self.read(count).decode("utf-8", "surrogatepass"))


@_opcode(b"\x80")  # PROTO
def _protocol(self: Machine) -> None:
    version = self.uint(1)
    if not 2 <= version <= 5:
        raise ValueError(f"pickle protocol {version}")


@_opcode(b"\x95")  # FRAME
def _frame(self: Machine) -> None:
    self.read(8)


@_opcode(b".")  # STOP
def _stop(self: Machine) -> Any:
    return STOP


@_opcode(b"0")  # POP
def _discard(self: Machine) -> None:
    self.stack.pop()


@_opcode(b"1")  # POPMARK
def _discard_to_mark(self: Machine) -> None:
    self.pop_to_mark()


@_opcode(b"\x86")  # TUPLE2
def _tuple2(self: Machine) -> None:
    stack = self.stack
    second = stack.pop()
    first = stack[-1]
    if first is MARK or second is MARK:
        raise ValueError("a mark where a value belongs")
    self.spent += 56
    stack[-1] = (first, second)


@_opcode(b"\x87")  # TUPLE3
def _tuple3(self: Machine) -> None:
    self.spent += 64
    third = self.pop()
    second = self.pop()
    self.stack.append((self.pop(), second, third))


@_opcode(b"d")  # DICT
def _dict(self: Machine) -> None:
    items = self.pop_to_mark()
    target: dict[Any, Any] = {}
    self.set_items(target, items)
    self.stack.append(target)


@_opcode(b"a")  # APPEND
def _append(self: Machine) -> None:
    item = self.pop()
    self.extend(self.top(), [item])


@_opcode(b"e")  # APPENDS
def _appends(self: Machine) -> None:
    items = self.pop_to_mark()
    self.extend(self.top(), items)


@_opcode(b"s")  # SETITEM
def _set_item(self: Machine) -> None:
    value = self.pop()
    key = self.pop()
    self.set_items(self.top(), [key, value])


@_opcode(b"u")  # SETITEMS
def _set_items(self: Machine) -> None:
    items = self.pop_to_mark()
    self.set_items(self.top(), items)


@_opcode(b"\x90")  # ADDITEMS
def _add_items(self: Machine) -> None:
    items = self.pop_to_mark()
    target = self.top()
    if type(target) is not set:
        raise TypeError(f"items are added to a {type(target).__name__}")
    self.spent += ITEM_BYTES * len(items)
    target.update(allowlist.checked_keys(items))


@_opcode(b"c")  # GLOBAL
def _global(self: Machine) -> None:
    module = self.line()
    self.stack.append(self.find(module, self.line()))


@_opcode(b"\x93")  # STACK_GLOBAL
def _stack_global(self: Machine) -> None:
    name = self.pop()
    module = self.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a global is named by text")
    self.stack.append(self.find(module, name))


@_opcode(b"R")  # REDUCE
def _reduce(self: Machine) -> None:
    args = self.pop()
    self.stack.append(self.call(self.pop(), args))


@_opcode(b"\x81")  # NEWOBJ
def _newobj(self: Machine) -> None:
    args = self.pop()
    self.stack.append(self.new(self.pop(), args))


@_opcode(b"\x92")  # NEWOBJ_EX
def _newobj_ex(self: Machine) -> None:
    kwargs = self.pop()
    args = self.pop()
    self.stack.append(self.new(self.pop(), args, kwargs))


@_opcode(b"b")  # BUILD
def _build(self: Machine) -> None:
    state = self.pop()
    self.build(self.top(), state)
