"""Pickles that would run code: each is shown to work on torch's own reader, and to do nothing here."""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import enum
import functools
import importlib
import io
import operator
import os
import pickle
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.storage.torch_pt.graphs import FORMATS, read_tensor, save
from ucp import limits
from ucp.errors import DamagedCheckpoint, UnsafePickle
from ucp.storage.torch_pt.pickles import Unpickler
from ucp.storage.torch_pt.reader import TensorRef, load

each_format = pytest.mark.parametrize("file_format", FORMATS)


class Call:
    """Pickles as a call of `function`, with a state to set on what it returns."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self._parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self._parts

    def __call__(self) -> None:
        """Only for the pickler, which insists that what it writes as a function can be called."""


def shell(path: Path) -> Call:
    return Call(os.system, f"touch {path}")


def script(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


def tensor_with(attribute: Any) -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.hook = attribute  # type: ignore[attr-defined]
    return tensor


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "os.system": shell,
    "eval": lambda path: Call(builtins.eval, script(path)),
    "exec": lambda path: Call(builtins.exec, script(path)),
    "open": lambda path: Call(builtins.open, str(path), "w"),
    "in a list": lambda path: [1, {"a": (2, shell(path))}],
    "as an argument": lambda path: Call(collections.OrderedDict, [("a", shell(path))]),
    "as state": lambda path: Call(argparse.Namespace, state={"a": shell(path)}),
    "as a tensor's attribute": lambda path: tensor_with(shell(path)),
    "beside a parameter": lambda path: {"w": torch.nn.Parameter(torch.ones(2)), "x": shell(path)},
    "as a tensor's builder": lambda path: Call(
        torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (f"touch {path}",), None
    ),
    "through an import": lambda path: Call(
        Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {path}"
    ),
    "through operator": lambda path: Call(
        Call(operator.methodcaller, "system", f"touch {path}"), Call(importlib.import_module, "os")
    ),
    "through functools": lambda path: Call(Call(functools.partial, os.system, f"touch {path}")),
    "through map": lambda path: Call(list, Call(map, os.system, [f"touch {path}"])),
    "through defaultdict": lambda path: Call(
        operator.getitem, Call(collections.defaultdict, Call(functools.partial, os.system, f"touch {path}")), 1
    ),
    "through numpy": lambda path: Call(
        importlib.import_module("numpy.testing._private.utils").runstring, script(path), {}
    ),
    "through torch": lambda path: Call(
        # a class that torch 2.6 does not have under this name
        getattr(importlib.import_module("torch.utils._config_module"), "_Config", list),
        Call(builtins.eval, script(path)),
    ),
}


@each_format
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_runs(tmp_path: Path, attack: str, protocol: int, file_format: str) -> None:
    planted = tmp_path / "planted"
    path = save({"module": ATTACKS[attack](planted)}, tmp_path / "a.pt", file_format, protocol)
    with pytest.raises(UnsafePickle, match=r"its pickle names \S+, .*nothing was run.*trust_client_state") as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert not planted.exists()
    # The attack is a real one: whoever lets torch load the file runs it, whatever becomes of the load.
    with contextlib.suppress(TypeError, AttributeError, ValueError, RuntimeError, pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert planted.exists()


@each_format
def test_the_refusal_names_the_class(tmp_path: Path, file_format: str) -> None:
    path = save({"client": io.StringIO()}, tmp_path / "a.pt", file_format)
    with pytest.raises(UnsafePickle, match=r"names _io\.StringIO"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "posix system",
        "os system",
        "builtins eval",
        "__builtin__ eval",
        "builtins setattr",
        "builtins object",
        "builtins type",
        "builtins map",
        "builtins __import__",
        "copyreg _reconstructor",
        "copy_reg __newobj__",
        "torch load",
        "torch hub",
        "torch os",
        "torch.storage _load_from_bytes",
        "torch._utils _import_dotted_name",
        "torch.serialization os.system",
        "numpy load",
        "numpy.core.multiarray fromfile",
        "numpy vectorize",
        "collections namedtuple",
        "argparse FileType",
        "pathlib os.system",
        "pathlib Path.unlink",
        "_codecs lookup",
        "deepspeed.runtime.engine DeepSpeedEngine",
        "deepspeed.utils.tensor_fragment fragment_address.__init__",
        "ucp.storage.torch_pt.allowlist call",
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_globals_outside_the_list_are_refused_before_they_are_imported(name: str, stacked: bool) -> None:
    module, attribute = name.split()
    if stacked:
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute))
        pickled = b"\x80\x04" + texts + b"\x93."
    else:
        pickled = f"\x80\x02c{module}\n{attribute}\n.".encode("latin-1")
    with pytest.raises(UnsafePickle):
        run(pickled)


def run(pickled: bytes, persistent: Any = None) -> Any:
    return Unpickler(io.BytesIO(pickled), "file.pt", len(pickled), persistent).load()


BOMBS = {
    "bytes": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
    "text": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b".",
    "bytearray of a length": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "set of a range": b"\x80\x02cbuiltins\nset\ncbuiltins\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "list of a range": b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "deque of a range": b"\x80\x02ccollections\ndeque\ncbuiltins\nrange\nJ\x00\x00\x00\x40\x85R\x85R.",
    "memo": b"\x80\x02]r\xff\xff\xff\xff.garbage",
    "numpy array": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01J\x00\x00\x00\x40\x85cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R\x89C\x00tb."
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_short_pickle_cannot_take_much_memory(bomb: str) -> None:
    tracemalloc.start()
    try:
        if bomb == "memo":
            assert run(BOMBS[bomb]) == []
        else:
            with pytest.raises(DamagedCheckpoint, match=r"^file\.pt: "):
                run(BOMBS[bomb])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


DEEP = b")" + b"\x85" * 200_000
SHARED = b"K\x01" + b"2\x86" * 5_000  # a tuple of itself twice, over and over: small to write, endless to hash


@pytest.mark.parametrize("name", ["DTensorSpec", "Namespace"])
def test_one_state_under_many_objects_is_counted_for_each(name: str) -> None:
    """Each of them gets a copy of it."""
    module = {"DTensorSpec": "torch.distributed.tensor._dtensor_spec", "Namespace": "argparse"}[name]
    state = pickle.dumps({f"key{k}": k for k in range(20000)}, protocol=2)[2:-1]
    one = b"c" + f"{module}\n{name}\n".encode() + b")\x81r\xff\xff\xff\x00" + state + b"r\xfe\xff\xff\x00b0"
    more = b"c" + f"{module}\n{name}\n".encode() + b")\x81j\xfe\xff\xff\x00b"
    tracemalloc.start()
    try:
        with pytest.raises(DamagedCheckpoint, match="asks for more than"):
            run(b"\x80\x02" + one + b"](" + more * 1000 + b"e.")
        assert tracemalloc.get_traced_memory()[1] < limits.metadata_bytes(1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", [pytest.param(DEEP, marks=pytest.mark.slow), SHARED])
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (b"}", b"K\x01s."),
        (b"}(", b"K\x01u."),
        (b"(", b"K\x01d."),
        (b"\x8f(", b"\x90."),
        (b"(", b"\x91."),
        (b"cbuiltins\nset\n](", b"e\x85R."),
        (b"cbuiltins\nfrozenset\n](", b"e\x85R."),
        (b"ccollections\nOrderedDict\n](", b"K\x01\x86e\x85R."),
        (b"ccollections\nCounter\n](", b"K\x01\x86e\x85R."),
    ],
)
def test_keys_cannot_overflow_the_stack(key: bytes, start: bytes, end: bytes) -> None:
    with pytest.raises(DamagedCheckpoint, match="more than a thousand parts"):
        run(b"\x80\x04" + start + key + end)


def test_deep_values_are_no_danger() -> None:
    value = run(b"\x80\x04" + DEEP + b".")
    depth = 0
    while value:
        (value,) = value
        depth += 1
    assert depth == 200_000


def test_classes_cannot_be_changed() -> None:
    before = dict(vars(argparse.Namespace))
    state = b"N}X\x08\x00\x00\x00__init__NsX\x04\x00\x00\x00evilK\x01s\x86"
    for name in ("argparse\nNamespace", "collections\nOrderedDict", "numpy\nndarray", "torch\nTensor"):
        with pytest.raises(DamagedCheckpoint, match="takes no state"):
            run(b"\x80\x02c" + name.encode() + b"\n" + state + b"b.")
    assert dict(vars(argparse.Namespace)) == before


def test_methods_cannot_be_shadowed() -> None:
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    assert list(run(pickled).items()) == []


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02]}R.",
        b"\x80\x02X\x01\x00\x00\x00a)R.",
        b"\x80\x02cdeepspeed.runtime.zero.config\nZeroStageEnum\n)R)R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch\nfloat32\n)R.",
        b"\x80\x02cbuiltins\nint\nX\x01\x00\x00\x001\x85R.",
    ],
)
def test_only_listed_functions_are_called(pickled: bytes) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"file\.pt: not a readable pickle: TypeError"):
        run(pickled)


@pytest.mark.parametrize(
    "saved",
    [
        "'storage'",
        "('module', None, None, None)",
        "('storage', 'FloatStorage', '0', 'cpu', 1)",
        "('storage', torch.FloatStorage, '0', 'cpu', -1)",
        "('storage', torch.FloatStorage, '0', 'cpu', 2**62)",
        "('storage', torch.FloatStorage, '0', 'cpu', '1')",
        "('storage', torch.FloatStorage, '../../../etc/passwd', 'cpu', 1)",
        "('storage', torch.FloatStorage, '0', 'cpu')",
        "('storage', torch.FloatStorage, ['0'], 'cpu', 1)",
    ],
)
def test_persistent_ids_refer_to_storages_only(tmp_path: Path, saved: str) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return eval(saved) if obj == "here" else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump(["here"])
    path = save(torch.ones(1), tmp_path / "a.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, stream.getvalue() if name.endswith("data.pkl") else old.read(name))
    with pytest.raises((DamagedCheckpoint, UnsafePickle), match=r"b\.pt: "):
        load(tmp_path / "b.pt")


# --- trust ------------------------------------------------------------------------------------------------------------


class Progress:
    """A client's own class."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


class Compact:
    __slots__ = ("a", "b")


class Progresses(list[Any]):
    pass


class Limited(dict[str, Any]):
    def __setstate__(self, state: Any) -> None:
        self.limit = state["limit"]


@each_format
@pytest.mark.parametrize("protocol", [2, 4])
def test_trust_builds_other_classes_around_references(tmp_path: Path, file_format: str, protocol: int) -> None:
    compact = Compact()
    compact.a, compact.b = 1, torch.ones(3)  # type: ignore[attr-defined]
    limited = Limited(x=1)
    limited.limit = 3
    progress = Progress(4)
    progress.weights = torch.arange(5)  # type: ignore[attr-defined]
    progress.by_name = collections.OrderedDict(a=argparse.Namespace(x=1))  # type: ignore[attr-defined]
    graph = [progress, compact, Progresses([1, 2]), limited, functools.partial(collections.OrderedDict, a=1)]
    path = save(graph, tmp_path / "a.pt", file_format, protocol)
    with pytest.raises(UnsafePickle, match="Progress"):
        load(path)
    read = load(path, trust=True)
    assert type(read[0]) is Progress
    assert read[0].epoch == 4
    assert type(read[0].weights) is TensorRef
    assert read_tensor(read[0].weights).tolist() == [0, 1, 2, 3, 4]
    assert read[0].by_name["a"].x == 1
    assert (type(read[1]), read[1].a) == (Compact, 1)
    assert read_tensor(read[1].b).tolist() == [1, 1, 1]
    assert (type(read[2]), list(read[2])) == (Progresses, [1, 2])
    assert (type(read[3]), dict(read[3]), read[3].limit) == (Limited, {"x": 1}, 3)
    assert read[4]() == collections.OrderedDict(a=1)


def test_trust_reports_what_the_trusted_code_raises(tmp_path: Path) -> None:
    path = save({"x": Call(int, "no number")}, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt: "):
        load(path, trust=True)


def test_trust_knows_the_names_of_the_older_python(tmp_path: Path) -> None:
    """torch pickles at protocol 2, whose names of the standard library are Python 2's."""
    path = save({"x": Call(sorted, [2, 1]), "y": Call(zip)}, tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match="__builtin__"):
        load(path)
    read = load(path, trust=True)
    assert (read["x"], list(read["y"])) == ([1, 2], [])


def test_trust_says_what_cannot_be_imported(tmp_path: Path) -> None:
    module = types.ModuleType("nobody_has_this")
    made = type("Thing", (), {"__module__": "nobody_has_this"})
    module.Thing = made  # type: ignore[attr-defined]
    sys.modules["nobody_has_this"] = module
    try:
        path = save({"x": made()}, tmp_path / "a.pt")
    finally:
        del sys.modules["nobody_has_this"]
    with pytest.raises(UnsafePickle, match=r"nobody_has_this\.Thing, which cannot be imported here .*install"):
        load(path, trust=True)


@each_format
def test_streams_of_bytes_are_read(tmp_path: Path, file_format: str) -> None:
    """Transformer Engine keeps its modules' states in such, and Megatron-Core saves them."""
    stream = io.BytesIO(b"abc\xff")
    stream.seek(2)
    path = save([stream], tmp_path / "a.pt", file_format)
    for trust in (False, True):
        (found,) = load(path, trust=trust)
        assert (type(found), found.getvalue(), found.tell()) == (io.BytesIO, b"abc\xff", 2)


class OddStream(io.BytesIO):
    state: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return io.BytesIO, (), self.state


@pytest.mark.parametrize(
    "state", [(b"ab", 3, None), (b"ab", -1, None), ("ab", 0, None), (b"ab", 0, {"x": 1}), (b"ab",)]
)
def test_streams_with_another_state_are_refused(tmp_path: Path, state: Any) -> None:
    stream = OddStream()
    stream.state = state
    path = save([stream], tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpoint, match=r"a\.pt: not a readable pickle"):
        load(path)


class Colour(enum.Enum):
    RED = "r"


def test_trust_takes_members_of_other_enumerations_by_name(tmp_path: Path) -> None:
    """As Python 3.11.2 writes them."""
    path = save({"x": Call(getattr, Colour, "RED")}, tmp_path / "a.pt")
    with pytest.raises(UnsafePickle, match="Colour"):
        load(path)
    assert load(path, trust=True) == {"x": Colour.RED}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (b"deepspeed.runtime.zero.config\nZeroStageEnum", b"__class__"),
        (b"deepspeed.runtime.zero.config\nZeroStageEnum", b"mro"),
        (b"collections\nOrderedDict", b"fromkeys"),
        (b"builtins\ngetattr", b"__self__"),
    ],
)
def test_attributes_are_members_of_enumerations_only(owner: bytes, name: bytes) -> None:
    pickled = b"\x80\x02c__builtin__\ngetattr\nc" + owner + b"\nX" + len(name).to_bytes(4, "little") + name + b"\x86R."
    with pytest.raises(UnsafePickle, match=rf"asks for '{name.decode()}' of .*nothing was run"):
        run(pickled)
