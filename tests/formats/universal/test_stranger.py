"""A reader written from the format's description alone (ucp/formats/universal/README.md), which reads what we wrote.

`Stranger` uses json, numpy and xxhash and nothing of this project; the truth is that of `tests/released`.
"""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import struct
from collections import Counter, OrderedDict, deque
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

# --- the reader: from here to the next line like this one ------------------------------------------------------------

CHUNK = 1048576
# What numpy lacks is viewed as bits of the same width.
TYPES = {"bfloat16": "<u2", "float64": "<f8", "float32": "<f4", "float16": "<f2", "bool": "|b1", "complex64": "<c8"}
TYPES |= {f"{sign}int{8 * n}": f"<{sign or 'i'}{n}" for sign in ("", "u") for n in (1, 2, 4, 8)}
CODES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
    "BOOL": "|b1",
}


class Refused(Exception):
    """The checkpoint is damaged, or of a version that this reader does not know."""


def safetensors(data: bytes) -> dict[str, np.ndarray]:
    (length,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + at for at in entry["data_offsets"])
            out[name] = np.frombuffer(data[begin:end], CODES[entry["dtype"]]).reshape(entry["shape"])
    return out


class Stranger:
    def __init__(self, folder: Path) -> None:
        raw = (folder / "ucp.json").read_bytes()
        if raw[:20] != b'{"digest":"xxh3_128:' or raw[20:52].decode() != xxhash.xxh3_128_hexdigest(raw[54:]):
            raise Refused("the manifest's digest")
        self.body = json.loads(raw)
        if self.body["ucp"].partition(".")[0] != "1":
            raise Refused("another major version")
        files = self.body["files"]
        self.paths = [folder / path for path in files["path"]]
        self.digests = [None if text is None else base64.b64decode(text) for text in files["digests"]]
        for path, size, mtime, name in zip(self.paths, files["size"], files["mtime_ns"], files["path"], strict=True):
            inside = os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)
            if mtime is None and (os.path.isabs(name) or not inside):
                raise Refused(f"{name} leads out of the folder")
            stat = path.stat()
            if stat.st_size != size or mtime not in (None, stat.st_mtime_ns):
                raise Refused(f"{name} was changed")
        self.contents = [self._checked(k) for k in range(len(self.paths))]
        self.tensors = dict(self._tensors())
        kept = [
            safetensors(content)
            for path, content in zip(self.paths, self.contents, strict=True)
            if path.name.startswith("training-state")
        ]
        self.kept = {key: tensor for found in kept for key, tensor in found.items()}
        self.training_state = self.value(self.body["training_state"])

    def _checked(self, k: int) -> bytes:
        data = self.paths[k].read_bytes()
        chunks = [xxhash.xxh3_64_digest(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
        if self.digests[k] not in (None, b"".join(chunks)):
            raise Refused(f"a digest of {self.paths[k]}")
        return data

    def _tensors(self) -> Any:
        body, at, block, used = self.body, 0, 0, 0
        blocks, special = body["blocks"], set(body["blocks"]["strides"]["block"])
        columns = (body["tensors"][name] for name in ("parameter", "state", "dtype", "blocks"))
        for parameter, state, dtype, count in zip(*columns, strict=True):
            shape = body["parameters"]["shape"][parameter]
            kind, d = np.dtype(TYPES[body["dtypes"][dtype]]), len(shape)
            out, seen = np.zeros(shape, kind), np.zeros(shape, np.int64)
            for k in range(block, block + count):
                offsets, sizes = blocks["box"][at : at + d], blocks["box"][at + d : at + 2 * d]
                strides = [math.prod(sizes[n + 1 :]) for n in range(d)]
                if k in special:
                    strides, used = blocks["strides"]["values"][used : used + d], used + d
                where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                buffer, bytes_of = self.contents[blocks["file"][k]], tuple(kind.itemsize * s for s in strides)
                out[where] = np.ndarray(sizes, kind, buffer, blocks["byte"][k], bytes_of)
                seen[where] += 1
                at += 2 * d
            if (seen != 1).any():
                raise Refused("a tensor that is not covered exactly once")
            block += count
            yield (body["parameters"]["name"][parameter], body["states"][state]), out

    def value(self, data: Any) -> Any:
        if isinstance(data, list):
            return [self.value(item) for item in data]
        if not isinstance(data, dict):
            return data
        if "$" not in data:
            return {key: self.value(item) for key, item in data.items()}
        kind, v = data["$"], data["v"]
        if kind in ("numpy.ndarray", "numpy.scalar"):
            array = np.frombuffer(base64.b64decode(v), data["dtype"])
            return array[0] if kind == "numpy.scalar" else array.reshape(data["shape"], order=data["order"])
        kinds: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "range": lambda v: range(*v)}
        kinds |= {"slice": lambda v: slice(*v), "complex": lambda v: complex(*v)}
        kinds |= {"deque": lambda v: deque(v, data["maxlen"]), "dict": dict, "OrderedDict": OrderedDict}
        kinds |= {"Counter": lambda v: Counter(dict(v)), "defaultdict": dict, "Namespace": dict}
        kinds |= {"tensor": self.kept.__getitem__, "bytes": base64.b64decode, "int": lambda v: int(v, 16)}
        kinds |= {"float": lambda v: struct.unpack(">d", bytes.fromhex(v))[0], "bytearray": base64.b64decode}
        if kind not in kinds:
            raise Refused(f"a value of kind {kind}")
        return kinds[kind](self.value(v))


# --- the tests -------------------------------------------------------------------------------------------------------

RELEASED = Path(__file__).parents[2] / "released"
MTIME = 1_700_000_000
CASES = [
    (index.parent.name, name)
    for index in sorted(RELEASED.glob("*/index.json"))
    for name in json.loads(index.read_text())
    if not name.startswith("native")
]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("released")
    shutil.copytree(RELEASED, root, dirs_exist_ok=True)
    for file in root.rglob("*"):
        os.utime(file, (MTIME, MTIME))
    return root


def folder_of(path: Path) -> Path:
    return path / (path / "latest").read_text() if (path / "latest").exists() else path


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("release", "name"), CASES)
def test_a_stranger_reads_it(released: Path, release: str, name: str) -> None:
    folder = released / release
    which = json.loads((folder / "index.json").read_text())[name]["truth"]
    said = json.loads((folder / f"truth/{which}.json").read_text())
    truth = safetensors((folder / f"truth/{which}.safetensors").read_bytes())
    found = Stranger(folder_of(folder / name))
    wanted = {key: t for key, t in truth.items() if key.partition("|")[0] in said["kinds"]}
    assert {"|".join(key) for key in found.tensors} == set(wanted)
    for key, tensor in wanted.items():
        assert same(found.tensors[tuple(key.split("|"))], tensor), key
    names = found.body["parameters"]["name"]
    assert dict(zip(names, found.body["parameters"]["kind"], strict=True)) == said["kinds"]
    assert found.body["aliases"] == said["aliases"]
    check_training_state(found, said, truth)


def check_training_state(found: Stranger, said: dict[str, Any], truth: dict[str, np.ndarray]) -> None:
    state = found.training_state
    assert {k: state[k] for k in said["counters"]} == said["counters"]
    for group, wanted in zip(state["param_groups"], said["groups"], strict=True):
        assert sorted(group["names"]) == sorted(wanted.pop("names"))
        assert {k: json.loads(json.dumps(group["options"][k])) for k in wanted} == wanted
    if said.get("lr_scheduler"):
        assert json.loads(json.dumps(state["lr_scheduler"])) == said["lr_scheduler"]
    if said.get("client_state"):
        assert state["client_state"]["pair"] == (1, 2.5)
        assert state["client_state"]["deep"] == {"ü": [None, True, b"\x00\xff"]}
        assert same(state["client_state"]["tensor"], truth["client_state|tensor"])
    if said.get("generators"):
        for rank, own in enumerate(state["extra"]["ranks"]):
            assert same(own["rng"]["torch"], truth[f"generator|{rank}"])
    if "own" in said:
        assert [own["state_dict"]["mine"].tolist() for own in state["extra"]["ranks"]] == said["own"]
        assert state["extra"]["state_dict"] == {"numbers.epoch": 4, "numbers.rate": math.inf}


def test_strides(tmp_path: Path) -> None:
    import torch

    import ucp

    weight = torch.arange(12.0).reshape(3, 4)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    torch.save({"w": weight.t(), "b": torch.ones(2)}, model / "pytorch_model.bin")
    ucp.convert(model, tmp_path / "virtual", virtual=True)
    found = Stranger(tmp_path / "virtual")
    assert found.body["blocks"]["strides"]["block"]
    assert same(found.tensors["w", "param"], weight.t().numpy())


def mix(x: int) -> int:
    z = (x + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@lru_cache(512)
def column_key(c: int, lane: int) -> int:
    parts = [mix(0x6C6F676963616C31 + 8 * c + 4 * lane + k) >> 49 for k in range(4)]
    return sum((part - 2**14) * 2 ** (15 * k) for k, part in enumerate(parts))


def logical_digest(raw: bytes) -> str:
    words = np.frombuffer(raw + bytes(-len(raw) % 4), "<i4")
    lanes = [0, 0]
    for number in np.flatnonzero(words).tolist():
        r, c = divmod(number, 256)
        for lane in (0, 1):
            lanes[lane] += (mix(0x5563704469676573 + 2 * r + lane) | 1) * column_key(c, lane) * int(words[number])
    return "".join(f"{lane % 2**64:016x}" for lane in lanes)


def sampled(raw: bytes, seed: int, every: int) -> bytes:
    blocks = -(-len(raw) // 65536)
    picked = [g + mix((seed + g // every) % 2**64) % min(every, blocks - g) for g in range(0, blocks, every)]
    out = bytearray(len(raw))
    for block in picked:
        out[block * 65536 : (block + 1) * 65536] = raw[block * 65536 : (block + 1) * 65536]
    return bytes(out)


def test_logical_digests(tmp_path: Path) -> None:
    import torch

    import ucp

    torch.manual_seed(0)
    large = torch.zeros(75 * 8192)  # 37 and a half blocks, and then 75
    large[::61] = torch.randn(len(large[::61]))
    small = {
        "w": torch.randn(30, 17),
        "b": torch.randn(7, dtype=torch.bfloat16),
        "large": large.double(),
        "wide": large,
    }
    ucp.save({"model": small}, tmp_path / "saved")
    found = Stranger(tmp_path / "saved")
    kept = found.body["logical_digests"]
    assert kept["scheme"] == "rows-256x2-spread"
    raw = [tensor.tobytes() for tensor in found.tensors.values()]
    assert kept["whole"] == [logical_digest(each) for each in raw]
    assert kept["sampled"] == [logical_digest(sampled(each, kept["seed"], kept["every"])) for each in raw]
    assert 0 < sum(one != other for one, other in zip(kept["whole"], kept["sampled"], strict=True)) == 2


@pytest.mark.parametrize("name", ["consolidated", "dtensors"])
def test_every_flipped_bit_is_found(released: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(folder_of(released / "0.1.0" / name), folder)
    Stranger(folder)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises((Refused, ValueError)):
                Stranger(folder)
        path.write_bytes(whole)


def test_the_reader_is_short() -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    first, last = (k for k, line in enumerate(lines) if line.startswith("# --- the"))
    assert last - first < 120
    assert not any("ucp" in line and "import" in line for line in lines[first:last])
