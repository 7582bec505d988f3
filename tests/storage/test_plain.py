"""Values through JSON text and back: equal in type and value, whatever they are nested in."""

from __future__ import annotations

import argparse
import collections
import io
import json
import math
import pathlib
import random
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from tests.property import law
from ucp.errors import DamagedCheckpoint, UcpError, Unsupported
from ucp.storage import plain
from ucp.storage.plain_decoder import KINDS
from ucp.storage.torch_pt.values import DeviceName, DtypeName, Size, Standin, TensorRef


def through_json(value: Any, torch_values: bool = False) -> Any:
    tensors: dict[str, Any] = {}

    def put(tensor: Any) -> str:
        tensors[f"t{len(tensors)}"] = tensor
        return f"t{len(tensors) - 1}"

    text = json.dumps(plain.encode(value, put), ensure_ascii=False, allow_nan=False)
    return plain.decode(json.loads(text.encode("utf-8")), tensors.__getitem__, torch_values=torch_values)


def same(a: Any, b: Any) -> bool:
    """Equal in type, value, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float | np.floating | complex | np.complexfloating):
        return bits(a) == bits(b)
    if isinstance(a, np.ndarray):
        return (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes()) and (
            a.flags.f_contiguous == b.flags.f_contiguous
        )
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        factories = [getattr(x, "default_factory", None) for x in (a, b)]
        return len(a) == len(b) and factories[0] is factories[1] and same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple | collections.deque):
        lengths = [getattr(x, "maxlen", None) for x in (a, b)]
        return len(a) == len(b) and lengths[0] == lengths[1] and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, argparse.Namespace):
        return same(vars(a), vars(b))
    if isinstance(a, Standin):
        return (a.class_module, a.class_name) == (b.class_module, b.class_name) and same(
            [a.class_args, a.state], [b.class_args, b.state]
        )
    if isinstance(a, torch.Tensor):
        return a is b
    return bool(a == b)


def bits(number: Any) -> bytes:
    if isinstance(number, float):
        return struct.pack(">d", number)
    if isinstance(number, complex):
        return struct.pack(">dd", number.real, number.imag)
    return bytes(number.tobytes())


keys = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.just("$")
) | st.tuples(st.integers(), st.text())
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**3000), 2**3000)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(codec=None, exclude_categories=[]))
    | st.binary()
    | st.binary().map(bytearray)
    | st.frozensets(keys)
    | st.sets(keys)
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 9))
    | st.builds(slice, st.none() | st.integers(), st.integers(), st.none() | st.integers())
    | st.sampled_from(["a/b", "/", ".", "~/x y"]).map(pathlib.Path)
    | st.sampled_from([pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\x\\y")])
    | st.lists(st.integers(0, 9)).map(Size)
    | st.sampled_from([DtypeName("bfloat16"), DeviceName("cuda:3"), np.dtype("<f4"), np.dtype(">i2")])
    | nps.arrays(
        nps.scalar_dtypes() | nps.unicode_string_dtypes() | nps.byte_string_dtypes(),
        nps.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3),
    )
    | nps.arrays(np.float32, (2, 3)).map(np.asfortranarray)
    | nps.scalar_dtypes().flatmap(lambda dtype: nps.arrays(dtype, ())).map(lambda array: array[()])
)


def namespace(attributes: dict[str, Any]) -> argparse.Namespace:
    """With any names: set as attributes, those such as ``__dict__`` would change what the object is."""
    out = argparse.Namespace()
    vars(out).update(attributes)
    return out


values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.builds(
            collections.defaultdict, st.sampled_from([None, list, int, dict, float]), st.dictionaries(keys, inner)
        )
        | st.dictionaries(keys, st.integers(), max_size=3).map(collections.Counter)
        | st.builds(collections.deque, st.lists(inner, max_size=3), st.none() | st.integers(3, 5))
        | st.dictionaries(st.text(), inner, max_size=3).map(namespace)
        | st.builds(
            Standin,
            st.just("a.b"),
            st.just("C"),
            st.tuples(inner),
            st.dictionaries(st.text(max_size=3), inner, max_size=2),
        )
    ),
    max_leaves=12,
)


@law(150)
@given(values)
def test_any_plain_value_survives_json(value: Any) -> None:
    assert same(through_json(value), value)


def test_what_programs_really_keep_survives_json() -> None:
    ordered = torch.nn.BatchNorm1d(2).state_dict()
    value = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.999), inner=argparse.Namespace(names=["a"], none=None)),
        "rng": [random.getstate(), np.random.get_state()],
        3: {(0, "x"): {1, 2}},
        "$": {"$": "tensor", "v": "no tensor"},
        "losses": [0.1, -0.0, 1e-310, float("inf"), float("-inf"), float("nan")],
        "2**64": [2**64, -(2**64), 2**64 - 1, 10**5000],
    }
    assert same(through_json(value), value)
    back = through_json(ordered)
    assert list(back) == list(ordered)
    assert back._metadata == ordered._metadata  # type: ignore[attr-defined]
    nan = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]
    assert bits(through_json(nan)) == bits(nan)
    assert math.copysign(1, through_json(-0.0)) == -1


def test_simple_values_are_simple_json() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}}
    assert plain.encode(value) == value


def test_equal_sets_are_stored_alike() -> None:
    names = [f"name{i}" for i in range(50)]
    program = (
        "import json, sys; from ucp.storage import plain; "
        "print(json.dumps(plain.encode({f'name{i}' for i in range(50)})))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert texts == {json.dumps(plain.encode(set(names)))}


def test_tensors_go_through_the_callback() -> None:
    ref = TensorRef("f", 0, "float32", (2,), (1,), "cpu", ("0", 2))
    a, b = torch.ones(2), torch.nn.Parameter(torch.ones(3))
    value = {"a": a, "b": [b, (ref,)], "again": a}
    put: list[Any] = []
    data = json.loads(json.dumps(plain.encode(value, lambda tensor: put.append(tensor) or len(put) - 1)))
    assert [id(tensor) for tensor in put] == [id(tensor) for tensor in (a, b, ref, a)]
    back = plain.decode(data, put.__getitem__)
    assert back["a"] is a
    assert back["b"][0] is b
    assert back["b"][1] == (ref,)
    with pytest.raises(Unsupported, match=r"state\['b'\]\[0\]: a tensor, where only plain values"):
        plain.encode({"b": [b]}, where="state")
    with pytest.raises(DamagedCheckpoint, match="refer to a tensor"):
        plain.decode(data)


def test_torchs_small_values_come_back_as_asked() -> None:
    value = [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1), torch.device("cpu")]
    back = through_json(value, torch_values=True)
    assert back == value
    assert type(back[0]) is torch.Size
    assert through_json(value) == [Size([2, 3]), DtypeName("bfloat16"), DeviceName("cuda:1"), DeviceName("cpu")]
    assert through_json({"version": torch.__version__}) == {"version": str(torch.__version__)}


class Own:
    pass


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [Own()]}, r"client_state\['a'\]\[0\]: .*tests\.storage\.test_plain\.Own"),
        ((1, {2: Own}), r"client_state\[1\]\[2\]: .*builtins\.type"),
        (argparse.Namespace(f=len), r"client_state\.f: .*builtin_function"),
        ([Point(1, 2)], r"client_state\[0\]: .*Point"),
        ({Point(1, 2): 1}, r"client_state key Point\(x=1, y=2\): .*Point"),
        ([np.array([None])], r"client_state\[0\]: .*object"),
        ([np.zeros(2, [("a", "f4")])], r"client_state\[0\]: .*'a'"),
        ([np.ma.array([1])], r"client_state\[0\]: .*MaskedArray"),
        ([collections.defaultdict(lambda: 1)], r"client_state\[0\]: a defaultdict of .*lambda"),
        ([torch.Generator()], r"client_state\[0\]: .*Generator"),
        ([lambda: 1], r"client_state\[0\]: .*function"),
    ],
)
def test_other_classes_are_refused_with_their_place(value: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        plain.encode(value, lambda tensor: "x", "client_state")


def test_structures_that_contain_themselves_or_are_too_deep_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["a"] = [loop]
    with pytest.raises(Unsupported, match=r"value\['a'\]\[0\]: contains itself"):
        plain.encode(loop)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Unsupported, match="too deeply"):
        plain.encode(deep)
    shared = [1]
    assert plain.encode([shared, shared]) == [[1], [1]]


@pytest.mark.parametrize(
    "data",
    [
        {"$": "int", "v": "xyz"},
        {"$": "int"},
        {"$": "tuple", "v": 3},
        {"$": "bytes", "v": "?"},
        {"$": "dict", "v": [[1]]},
        {"$": "dict", "v": [[[], 1]]},
        {"$": "defaultdict", "factory": "eval", "v": []},
        {"$": "path", "kind": "system", "v": "x"},
        {"$": "numpy.dtype", "v": "O"},
        {"$": "numpy.ndarray", "dtype": "|O", "shape": [1], "order": "C", "v": "AAAAAAAAAAA="},
        {"$": "numpy.ndarray", "dtype": "<f4", "shape": [1000000], "order": "C", "v": ""},
        {"$": "numpy.scalar", "dtype": "<f4", "v": ""},
        {"$": "standin", "class": "x", "args": [], "v": []},
        {"$": [], "v": []},
    ],
)
def test_data_that_encode_does_not_make_are_damaged(data: Any) -> None:
    with pytest.raises(DamagedCheckpoint, match="stored values are damaged"):
        plain.decode([data])


def test_kinds_of_the_future_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="'quaternion'"):
        plain.decode({"$": "quaternion", "v": []})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text("ab<f4=", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"$": st.sampled_from(KINDS), "v": inner})
        | st.fixed_dictionaries(
            {
                "$": st.sampled_from(["numpy.ndarray", "numpy.scalar"]),
                "dtype": st.text("<>f48US0", max_size=3),
                "v": inner,
            },
            optional={"shape": inner, "order": st.sampled_from(["C", "F", "x"])},
        )
        | st.dictionaries(st.text("ab$", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@law(200)
@given(json_values)
def test_any_data_decode_or_are_damaged(data: Any) -> None:
    try:
        plain.decode(data)
    except UcpError:
        return


def test_streams_of_bytes() -> None:
    stream = io.BytesIO(b"abc\x00")
    stream.seek(3)
    found = plain.decode(json.loads(json.dumps(plain.encode({"x": stream}))))["x"]
    assert (type(found), found.getvalue(), found.tell()) == (io.BytesIO, b"abc\x00", 3)
