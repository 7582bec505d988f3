"""An interpreter of pickles that can build only what the allow-list knows.

Python's own unpickler imports what a pickle names before anyone can look at the arguments, and lets a pickle set
attributes on the classes it names. This one has no import and no call in it (but for `trust`): a global is looked up in
`allowlist`, calling it runs the function listed there, and state is set on the few kinds of objects that have any. The
opcodes are those that protocols 2 to 5 write (Python's `pickletools` describes each).
"""

from __future__ import annotations

import argparse
import collections
import importlib
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, UcpError, UnsafePickle
from ucp.storage.torch_pt import allowlist
from ucp.storage.torch_pt.allowlist import GETATTR
from ucp.storage.torch_pt.named import Global, StorageClass
from ucp.storage.torch_pt.skipped import Skipped
from ucp.storage.torch_pt.values import Size, Standin, TensorRef

_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_MARK = object()
# Bytes, about, that Python keeps for an entry of a dict or set, of the memo, and for an object that a call makes.
_ITEM_BYTES, _MEMO_BYTES, _CALL_BYTES = 64, 80, 200
# What whoever opens a checkpoint can say; no command can.
_WAY_ON = (
    ". If you trust whoever wrote the file, ucp.open(..., trust_client_state=True) allows it (in a DeepSpeed config "
    '"ucp": {"trust_client_state": true}), which runs code from the file'
)
_BETWEEN_CHECKS = range(4096)  # operations: few of them cannot take much by themselves
_STOP = object()


class Unpickler:
    """Reads one pickle from a stream, which is left just behind it.

    `limit` is the number of bytes the stream has in all: no item may claim to be longer. `persistent` turns a
    persistent id (a tuple) into an object. With `trust`, globals outside the allow-list are imported and called, as
    Python's unpickler does: that runs whatever code the pickle's author wished. None where no caller can have it so:
    the refusal then offers nothing that would not help. `skipped`: where given, such globals are neither imported nor
    refused but entered in it, and their objects become `Standin`s.
    """

    def __init__(
        self,
        stream: BinaryIO,
        path: str,
        limit: int,
        persistent: Callable[[Any], Any] | None = None,
        trust: bool | None = False,
        skipped: Skipped | None = None,
    ) -> None:
        self._stream_read = stream.read
        self._readline = stream.readline
        self._path = path
        self._limit = limit
        self._persistent = persistent
        self._trust = trust
        self._skipped = skipped
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Any] = {}
        self.spent = 0  # bytes of memory, about, of what was built so far

    def load(self) -> Any:
        """The object. Raises `DamagedCheckpoint`, `UnsafePickle` or `Unsupported`, each naming the file."""
        read, table = self._stream_read, _OPCODES
        try:
            while True:
                for _ in _BETWEEN_CHECKS:
                    code = read(1)
                    operation = table[code[0]] if code else None
                    if operation is None:
                        what = f"unknown operation {code!r}" if code else "it ends too early"
                        raise DamagedCheckpoint(f"not a readable pickle: {what}")
                    if operation(self) is _STOP:
                        return self._pop()
                self._check_budget()
        except UcpError as error:
            if error.file is not None:
                raise
            raise type(error)(error.message, file=self._path) from error
        except MemoryError as error:
            raise DamagedCheckpoint("its pickle asks for more memory than there is", file=self._path) from error
        except Exception as error:
            # What damage can raise is open-ended (any operation on any wrong operand), so that all of it is caught.
            raise DamagedCheckpoint(
                f"not a readable pickle: {type(error).__name__}: {error}", file=self._path
            ) from error

    def _check_budget(self) -> None:
        spent = self.spent + len(self._memo) * _MEMO_BYTES
        if spent > limits.metadata_bytes(self._limit):
            raise DamagedCheckpoint(
                f"its pickle asks for more than {limits.metadata_bytes(self._limit)} bytes of memory, "
                f"which is the most for a file of {self._limit}"
            )

    # --- bytes and stack ---------------------------------------------------------------------------------------------

    def _read(self, count: int) -> bytes:
        if count > self._limit:
            raise DamagedCheckpoint(f"its pickle has an item of {count} bytes, more than the whole file")
        data = self._stream_read(count)
        if len(data) != count:
            raise DamagedCheckpoint("not a readable pickle: it ends too early")
        self.spent += count
        return data

    def _long(self, count: int) -> int:
        if count > limits.INTEGER_BYTES:
            raise DamagedCheckpoint(
                f"its pickle has an integer of {count} bytes, and {limits.INTEGER_BYTES} is the most that is read"
            )
        return int.from_bytes(self._read(count), "little", signed=True)

    def _uint(self, count: int) -> int:
        return int.from_bytes(self._read(count), "little")

    def _line(self) -> str:
        line = self._readline()
        if not line.endswith(b"\n"):
            raise DamagedCheckpoint("not a readable pickle: it ends too early")
        return line[:-1].decode("utf-8")

    def _pop(self) -> Any:
        item = self._stack.pop()
        if item is _MARK:
            raise ValueError("a mark where a value belongs")
        return item

    def _top(self) -> Any:
        item = self._stack[-1]
        if item is _MARK:
            raise ValueError("a mark where a value belongs")
        return item

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    # --- operations that need a decision -----------------------------------------------------------------------------

    def _find(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._globals:
            found = allowlist.find(module, name)
            if found is None:
                found = self._import(module, name)
            self._globals[key] = found
        return self._globals[key]

    def _import(self, module: str, name: str) -> Any:
        if self._skipped is not None:
            self._skipped.add((module, name))
            return Global(module, name)
        if not self._trust:
            way_on = "" if self._trust is None else _WAY_ON
            raise UnsafePickle(
                f"its pickle names {module}.{name}, which is not on the list of classes that are safe to read; nothing "
                f"was run{way_on}"
            )
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        return target

    def _call(self, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if type(args) is not tuple:
            raise TypeError("arguments must be a tuple")
        if type(target) is Global and self._trust and target == GETATTR and args and not _is_inert(args[0]):
            target = getattr
        if type(target) is Global:
            if self._skipped is not None and (target.module, target.name) in self._skipped:
                return Standin(target.module, target.name, args)
            if kwargs:
                raise TypeError(f"{target} takes no keyword arguments")
            made = allowlist.call(target, args)
            weight = _weight(made)
            self.spent += _CALL_BYTES + weight
            if weight > _CALL_BYTES:
                self._check_budget()  # the file may have it copied again and again
            return made
        self._require_trust(target)
        return target(*self._real(args), **self._real(kwargs or {}))

    def _new(self, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if type(target) is Global:
            return self._call(target, args, kwargs)
        self._require_trust(target)
        return target.__new__(target, *self._real(args), **self._real(kwargs or {}))

    def _real(self, value: Any) -> Any:
        """For trusted code: the classes that it asked for in place of our names for them."""
        if type(value) is Global:
            return self._import(value.module, value.name)
        if type(value) is tuple:
            return tuple(self._real(item) for item in value)
        if type(value) is dict:
            return {key: self._real(item) if type(item) is Global else item for key, item in value.items()}
        return value

    def _require_trust(self, target: Any) -> None:
        if not self._trust or _is_inert(target):
            raise TypeError(f"a {type(target).__name__} is not something that can be called")

    def _build(self, obj: Any, state: Any) -> None:
        if not self._trust or _is_inert(obj):
            allowlist.build(obj, state)
            self.spent += _weight(obj)
            self._check_budget()
            return
        state = self._real(state)
        setter = getattr(obj, "__setstate__", None)
        if setter is not None:
            setter(state)
            return
        slots = None
        if isinstance(state, tuple) and len(state) == 2:
            state, slots = state
        if state:
            vars(obj).update(state)
        for name, value in (slots or {}).items():
            setattr(obj, name, value)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if type(target) in (list, collections.deque) or (self._trust and hasattr(target, "extend")):
            target.extend(items)
        elif self._skipped is not None and type(target) is Standin:
            target.state.setdefault("items", []).extend(items)
        else:
            raise TypeError(f"items are appended to a {type(target).__name__}")

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without its value")
        if self._skipped is not None and type(target) is Standin:
            target = target.state
        if type(target) not in _DICTS and (not self._trust or _is_inert(target)):
            raise TypeError(f"items are set in a {type(target).__name__}")
        allowlist.checked_keys(items[::2])
        self.spent += _ITEM_BYTES * len(items)
        for at in range(0, len(items), 2):
            target[items[at]] = items[at + 1]

    def _persist(self, saved: Any) -> Any:
        if self._persistent is None:
            raise UnsafePickle("its pickle refers to a stored object where none can be")
        return self._persistent(saved)


def _weight(made: Any) -> int:
    """About how many bytes a call has made: it may copy its arguments, which are in the file only once."""
    kind = type(made)
    if kind in (str, bytes, bytearray):
        return len(made)
    if kind is np.ndarray:
        return int(made.nbytes)
    return _ITEM_BYTES * len(made) if kind in _COPIED else 0


_COPIED = {*_DICTS, set, frozenset, collections.deque, Size}
_INERT = {Global, StorageClass, Standin, TensorRef, argparse.Namespace, np.ndarray, *_DICTS}


def _is_inert(obj: Any) -> bool:
    """Whether the allow-list's rules hold for an object even where other classes are trusted."""
    return type(obj) in _INERT or isinstance(obj, np.dtype)


_Operation = Callable[[Unpickler], Any]
_OPCODES: list[_Operation | None] = [None] * 256


def _opcode(code: bytes) -> Callable[[_Operation], _Operation]:
    def register(function: _Operation) -> _Operation:
        _OPCODES[code[0]] = function
        return function

    return register


def _pusher(code: bytes, make: Callable[[Unpickler], Any]) -> None:
    _OPCODES[code[0]] = lambda self: self._stack.append(make(self))


# Values. The comment of each line is the opcode's name in pickletools.
_pusher(b"N", lambda self: None)  # NONE
_pusher(b"\x88", lambda self: True)  # NEWTRUE
_pusher(b"\x89", lambda self: False)  # NEWFALSE
_pusher(b"J", lambda self: int.from_bytes(self._read(4), "little", signed=True))  # BININT
_pusher(b"\x8a", lambda self: self._long(self._uint(1)))  # LONG1
_pusher(b"\x8b", lambda self: self._long(self._uint(4)))  # LONG4
_pusher(b"G", lambda self: struct.unpack(">d", self._read(8))[0])  # BINFLOAT
_pusher(b"X", lambda self: self._read(self._uint(4)).decode("utf-8", "surrogatepass"))  # BINUNICODE
_pusher(b"\x8d", lambda self: self._read(self._uint(8)).decode("utf-8", "surrogatepass"))  # BINUNICODE8
_pusher(b"T", lambda self: self._read(self._uint(4)).decode("utf-8"))  # BINSTRING, written by Python 2
_pusher(b"U", lambda self: self._read(self._uint(1)).decode("utf-8"))  # SHORT_BINSTRING, written by Python 2
_pusher(b"B", lambda self: self._read(self._uint(4)))  # BINBYTES
_pusher(b"C", lambda self: self._read(self._uint(1)))  # SHORT_BINBYTES
_pusher(b"\x8e", lambda self: self._read(self._uint(8)))  # BINBYTES8
_pusher(b"\x96", lambda self: bytearray(self._read(self._uint(8))))  # BYTEARRAY8

# Containers.
_pusher(b")", lambda self: ())  # EMPTY_TUPLE
_pusher(b"\x91", lambda self: frozenset(allowlist.checked_keys(self._pop_to_mark())))  # FROZENSET


@_opcode(b"]")  # EMPTY_LIST
def _empty_list(self: Unpickler) -> None:
    self.spent += 56
    self._stack.append([])


@_opcode(b"}")  # EMPTY_DICT
def _empty_dict(self: Unpickler) -> None:
    self.spent += 64
    self._stack.append({})


@_opcode(b"\x8f")  # EMPTY_SET
def _empty_set(self: Unpickler) -> None:
    self.spent += 216
    self._stack.append(set())


@_opcode(b"t")  # TUPLE
def _tuple(self: Unpickler) -> None:
    self.spent += 40
    self._stack.append(tuple(self._pop_to_mark()))


@_opcode(b"l")  # LIST
def _list(self: Unpickler) -> None:
    self.spent += 56
    self._stack.append(self._pop_to_mark())


# The memo.
_pusher(b"2", lambda self: self._top())  # DUP

# Objects.
_pusher(b"Q", lambda self: self._persist(self._pop()))  # BINPERSID


# Nine in ten operations of a long pickle are among these, so that they make no further calls of Python.
@_opcode(b"h")  # BINGET
def _get1(self: Unpickler) -> None:
    self._stack.append(self._memo[self._stream_read(1)[0]])


@_opcode(b"j")  # LONG_BINGET
def _get4(self: Unpickler) -> None:
    self._stack.append(self._memo[int.from_bytes(self._stream_read(4), "little")])


@_opcode(b"\x94")  # MEMOIZE
def _memoize(self: Unpickler) -> None:
    item = self._stack[-1]
    if item is _MARK:
        raise ValueError("a mark where a value belongs")
    self._memo[len(self._memo)] = item


@_opcode(b"(")  # MARK
def _mark(self: Unpickler) -> None:
    self._stack.append(_MARK)


@_opcode(b"\x85")  # TUPLE1
def _tuple1(self: Unpickler) -> None:
    item = self._stack[-1]
    if item is _MARK:
        raise ValueError("a mark where a value belongs")
    self.spent += 48
    self._stack[-1] = (item,)


@_opcode(b"K")  # BININT1
def _int1(self: Unpickler) -> None:
    self._stack.append(self._stream_read(1)[0])


@_opcode(b"M")  # BININT2
def _int2(self: Unpickler) -> None:
    low, high = self._stream_read(2)
    self._stack.append(low | high << 8)


@_opcode(b"\x8c")  # SHORT_BINUNICODE
def _short_text(self: Unpickler) -> None:
    count = self._stream_read(1)[0]
    raw = self._stream_read(count)
    if len(raw) != count:
        raise DamagedCheckpoint("not a readable pickle: it ends too early")
    self.spent += 56
    self._stack.append(raw.decode("utf-8", "surrogatepass"))


@_opcode(b"\x80")  # PROTO
def _protocol(self: Unpickler) -> None:
    version = self._uint(1)
    if not 2 <= version <= 5:
        raise ValueError(f"pickle protocol {version}")


@_opcode(b"\x95")  # FRAME
def _frame(self: Unpickler) -> None:
    self._read(8)


@_opcode(b".")  # STOP
def _stop(self: Unpickler) -> Any:
    return _STOP


@_opcode(b"0")  # POP
def _discard(self: Unpickler) -> None:
    self._stack.pop()


@_opcode(b"1")  # POP_MARK
def _discard_to_mark(self: Unpickler) -> None:
    self._pop_to_mark()


@_opcode(b"\x86")  # TUPLE2
def _tuple2(self: Unpickler) -> None:
    second = self._pop()
    self.spent += 56
    self._stack.append((self._pop(), second))


@_opcode(b"\x87")  # TUPLE3
def _tuple3(self: Unpickler) -> None:
    self.spent += 64
    third = self._pop()
    second = self._pop()
    self._stack.append((self._pop(), second, third))


@_opcode(b"d")  # DICT
def _dict(self: Unpickler) -> None:
    items = self._pop_to_mark()
    target: dict[Any, Any] = {}
    self._set_items(target, items)
    self._stack.append(target)


@_opcode(b"a")  # APPEND
def _append(self: Unpickler) -> None:
    item = self._pop()
    self._extend(self._top(), [item])


@_opcode(b"e")  # APPENDS
def _appends(self: Unpickler) -> None:
    items = self._pop_to_mark()
    self._extend(self._top(), items)


@_opcode(b"s")  # SETITEM
def _set_item(self: Unpickler) -> None:
    value = self._pop()
    key = self._pop()
    self._set_items(self._top(), [key, value])


@_opcode(b"u")  # SETITEMS
def _set_items(self: Unpickler) -> None:
    items = self._pop_to_mark()
    self._set_items(self._top(), items)


@_opcode(b"\x90")  # ADDITEMS
def _add_items(self: Unpickler) -> None:
    items = self._pop_to_mark()
    target = self._top()
    if type(target) is not set:
        raise TypeError(f"items are added to a {type(target).__name__}")
    self.spent += _ITEM_BYTES * len(items)
    target.update(allowlist.checked_keys(items))


@_opcode(b"q")  # BINPUT
def _put1(self: Unpickler) -> None:
    self._memo[self._uint(1)] = self._top()


@_opcode(b"r")  # LONG_BINPUT
def _put4(self: Unpickler) -> None:
    self._memo[self._uint(4)] = self._top()


@_opcode(b"c")  # GLOBAL
def _global(self: Unpickler) -> None:
    module = self._line()
    self._stack.append(self._find(module, self._line()))


@_opcode(b"\x93")  # STACK_GLOBAL
def _stack_global(self: Unpickler) -> None:
    name = self._pop()
    module = self._pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("a global is named by text")
    self._stack.append(self._find(module, name))


@_opcode(b"R")  # REDUCE
def _reduce(self: Unpickler) -> None:
    args = self._pop()
    self._stack.append(self._call(self._pop(), args))


@_opcode(b"\x81")  # NEWOBJ
def _newobj(self: Unpickler) -> None:
    args = self._pop()
    self._stack.append(self._new(self._pop(), args))


@_opcode(b"\x92")  # NEWOBJ_EX
def _newobj_ex(self: Unpickler) -> None:
    kwargs = self._pop()
    args = self._pop()
    self._stack.append(self._new(self._pop(), args, kwargs))


@_opcode(b"b")  # BUILD
def _build(self: Unpickler) -> None:
    state = self._pop()
    self._build(self._top(), state)
