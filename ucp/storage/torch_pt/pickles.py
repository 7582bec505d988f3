"""An interpreter of pickles that can build only what the allow-list knows.

Python's own unpickler imports what a pickle names before anyone can look at the arguments, and lets a pickle set
attributes on the classes it names. This one imports and calls nothing (except with `trust`): a global is looked up in
`allowlist`, calling it runs the function listed there, and state is set only on the few kinds of objects that have any.
The operations themselves are in `opcodes`.
"""

from __future__ import annotations

import _compat_pickle
import argparse
import collections
import importlib
import io
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, UcpError, UnsafePickle, Unsupported
from ucp.storage.torch_pt import allowlist
from ucp.storage.torch_pt.allowlist import GETATTR
from ucp.storage.torch_pt.named import Global, StorageClass
from ucp.storage.torch_pt.opcodes import ITEM_BYTES, MARK, OPCODES, STOP, Machine
from ucp.storage.torch_pt.shared_out import is_part
from ucp.storage.torch_pt.skipped import Skipped
from ucp.storage.torch_pt.standins import STANDINS
from ucp.storage.torch_pt.values import Size, Standin, TensorRef

_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
# About how many bytes Python keeps for an entry of the memo, and for an object that a call makes.
_MEMO_BYTES, _CALL_BYTES = 80, 200
# What a Python caller can do to open such a checkpoint; no command can.
_WAY_ON = (
    ". If you trust whoever wrote the file, ucp.open(..., trust_client_state=True) allows it (in a DeepSpeed config "
    '"ucp": {"trust_client_state": true}), which runs code from the file'
)
_MEMOIZE, _BINGET, _LONG_BINGET = b"\x94", b"h", b"j"
_BETWEEN_CHECKS = range(4096)  # operations: few of them cannot take much by themselves


class Unpickler(Machine):
    """Reads one pickle from a stream. The stream is left just after the pickle.

    limit: the number of bytes the stream has in all. No item may claim to be longer.
    persistent: turns a persistent id (a tuple) into an object.
    trust: import and call globals outside the allow-list, as Python's unpickler does. That runs whatever code the
    pickle's author wished. None if no caller can ask for that: the refusal then does not suggest it.
    skipped: if given, such globals are neither imported nor refused. They are added to it, and their objects become
    `Standin`s.
    dtensors: take one rank's DTensors and ShardedTensors, as `Standin`s.
    """

    def __init__(
        self,
        stream: BinaryIO,
        path: str,
        limit: int,
        persistent: Callable[[Any], Any] | None = None,
        trust: bool | None = False,
        skipped: Skipped | None = None,
        dtensors: bool = False,
    ) -> None:
        super().__init__(stream, limit)
        self._path = path
        self._persistent = persistent
        self._trust = trust
        self._skipped = skipped
        self._dtensors = dtensors
        self._globals: dict[tuple[str, str], Any] = {}
        # The identities of those of them whose calls make stand-ins, whatever the arguments.
        self._plain: set[int] = set()

    def load(self) -> Any:
        """The object. Raises `DamagedCheckpoint`, `UnsafePickle` or `Unsupported`, each naming the file."""
        try:
            while not self._stopped():
                self._check_budget()
            return self.pop()
        except UcpError as error:
            if error.file is not None:
                raise
            raise type(error)(error.message, file=self._path) from error
        except MemoryError as error:
            raise DamagedCheckpoint("its pickle asks for more memory than there is", file=self._path) from error
        except Exception as error:
            # Damage can raise anything (any operation on any wrong operand), so everything is caught.
            raise DamagedCheckpoint(
                f"not a readable pickle: {type(error).__name__}: {error}", file=self._path
            ) from error

    def _stopped(self) -> bool:
        """Do some operations. Returns whether the last one of the pickle was among them."""
        read, table, stack, memo = self.stream_read, OPCODES, self.stack, self.memo
        for _ in _BETWEEN_CHECKS:
            code = read(1)
            # Half of the operations of a long pickle are these three, so they are done here and without any call.
            if code == _MEMOIZE and stack[-1] is not MARK:
                memo[len(memo)] = stack[-1]
            elif code == _BINGET:
                stack.append(memo[read(1)[0]])
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(read(4), "little")])
            else:
                operation = table[code[0]] if code else None
                if operation is None:
                    what = f"unknown operation {code!r}" if code else "it ends too early"
                    raise DamagedCheckpoint(f"not a readable pickle: {what}")
                if operation(self) is STOP:
                    return True
        return False

    def _check_budget(self) -> None:
        spent = self.spent + len(self.memo) * _MEMO_BYTES
        if spent > limits.metadata_bytes(self.limit):
            raise DamagedCheckpoint(
                f"its pickle asks for more than {limits.metadata_bytes(self.limit)} bytes of memory, "
                f"which is the most for a file of {self.limit}"
            )

    def _spend(self, weight: int) -> None:
        """Count what a single operation has made, which the file may have made again and again."""
        self.spent += weight
        if weight > _CALL_BYTES:
            self._check_budget()

    # --- what operations may do --------------------------------------------------------------------------------------

    def find(self, module: str, name: str) -> Any:
        key = (module, name)
        if key not in self._globals:
            found = allowlist.find(module, name)
            if found is None:
                found = self._import(module, name)
            self._globals[key] = found
            if key in STANDINS:
                self._plain.add(id(found))
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
        # torch pickles as Python 2 could read it, by that Python's names of the standard library's modules.
        there, called = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        try:
            target: Any = importlib.import_module(_compat_pickle.IMPORT_MAPPING.get(there, there))
            for part in called.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError) as error:
            raise UnsafePickle(
                f"its pickle names {module}.{name}, which cannot be imported here ({error}); install the package that "
                "has it"
            ) from error
        return target

    def call(self, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if type(args) is not tuple:
            raise TypeError("arguments must be a tuple")
        if id(target) in self._plain and not kwargs:
            self.spent += _CALL_BYTES
            return Standin(target.module, target.name, args)
        if type(target) is Global and self._trust and target == GETATTR and args and not _is_inert(args[0]):
            target = getattr
        if type(target) is Global:
            if self._skipped is not None and (target.module, target.name) in self._skipped:
                return Standin(target.module, target.name, args)
            if kwargs:
                raise TypeError(f"{target} takes no keyword arguments")
            made = allowlist.call(target, args)
            if is_part(made) and not self._dtensors:
                raise Unsupported(
                    f"it holds a part of a tensor (a {made.class_name} of one rank); give the path of the folder that "
                    "all ranks' files are in"
                )
            self.spent += _CALL_BYTES
            self._spend(_weight(made))
            return made
        self._require_trust(target)
        return target(*self._real(args), **self._real(kwargs or {}))

    def new(self, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        if type(target) is Global:
            return self.call(target, args, kwargs)
        self._require_trust(target)
        return target.__new__(target, *self._real(args), **self._real(kwargs or {}))

    def _real(self, value: Any) -> Any:
        """For trusted code: the value with the classes that it asked for in place of our names for them."""
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

    def build(self, obj: Any, state: Any) -> None:
        if type(obj) is Standin and type(state) is dict and _TEXTS.issuperset(map(type, state)):
            obj.state.update(state)
            self._spend(ITEM_BYTES * len(state))  # a copy of what others may have, too
            return
        if not self._trust or _is_inert(obj):
            allowlist.build(obj, state)
            self._spend(_weight(obj))  # what is copied from the state, which others may have, too
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

    def extend(self, target: Any, items: list[Any]) -> None:
        if type(target) in (list, collections.deque) or (self._trust and hasattr(target, "extend")):
            target.extend(items)
        elif self._skipped is not None and type(target) is Standin:
            target.state.setdefault("items", []).extend(items)
        else:
            raise TypeError(f"items are appended to a {type(target).__name__}")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without its value")
        if self._skipped is not None and type(target) is Standin:
            target = target.state
        if type(target) not in _DICTS and (not self._trust or _is_inert(target)):
            raise TypeError(f"items are set in a {type(target).__name__}")
        self.spent += ITEM_BYTES * len(items)
        pairs = zip(allowlist.checked_keys(items[::2]), items[1::2], strict=True)
        if type(target) is dict:
            target.update(pairs)
        else:
            for key, value in pairs:
                target[key] = value

    def persist(self, saved: Any) -> Any:
        if self._persistent is None:
            raise UnsafePickle("its pickle refers to a stored object where none can be")
        return self._persistent(saved)


def _weight(made: Any) -> int:
    """About how many bytes a call has made: it may copy its arguments, which are in the file only once."""
    kind = type(made)
    if kind is Standin or kind is argparse.Namespace:
        return ITEM_BYTES * len(made.state if kind is Standin else vars(made))
    if kind in (str, bytes, bytearray):
        return len(made)
    if kind is np.ndarray:
        return int(made.nbytes)
    if kind is io.BytesIO:
        return int(made.getbuffer().nbytes)
    return ITEM_BYTES * len(made) if kind in _COPIED else 0


_TEXTS = {str}
_COPIED = {*_DICTS, set, frozenset, collections.deque, Size}
_INERT = {Global, StorageClass, Standin, TensorRef, argparse.Namespace, io.BytesIO, np.ndarray, *_DICTS}


def _is_inert(obj: Any) -> bool:
    """Whether the allow-list's rules hold for an object even where other classes are trusted."""
    return type(obj) in _INERT or isinstance(obj, np.dtype)
