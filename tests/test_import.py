"""Importing the package: quick, lazy, and with a clear word beside the other project of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ucp
from tests.formats import raw
from tests.slow_cases import slow_but
from ucp._neighbours import refuse_ucx_py

ROOT = Path(ucp.__file__).resolve().parents[1]


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    search = ":".join(map(str, [*path, ROOT]))
    return subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": search}, capture_output=True, text=True, check=False
    )


def test_importing_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "tqdm", "pydantic"}
    done = python(f"import sys, ucp, ucp.cli.convert; sys.exit(bool({heavy!r} & set(sys.modules)) or 0)")
    assert done.returncode == 0, done.stderr


def test_a_format_is_imported_when_it_is_read(tmp_path: Path) -> None:
    """What looks at a folder, or converts our own form, loads no other format and no language of specs."""
    raw.write_consolidated(tmp_path / "universal", raw.make(tmp_path / "raw").catalog)
    code = f"import sys, ucp; ucp.convert({str(tmp_path / 'universal')!r}, {str(tmp_path / 'universal-out')!r});"
    others = ["torch", "yaml", "ucp.formats.deepspeed.read.checkpoint", "ucp.formats.dcp.reader"]
    others += ["ucp.formats.huggingface.reader"]
    done = python(f"{code} sys.exit(' '.join(set({others!r}) & set(sys.modules)) or 0)")
    assert done.stderr == ""
    assert done.returncode == 0
    assert (tmp_path / "universal-out").is_dir()


@pytest.mark.slow
def test_a_program_without_dtensors_imports_none(tmp_path: Path) -> None:
    """torch takes three seconds to import them, which the first load of a small program would pay for."""
    code = "import sys, torch, ucp; state = {'w': torch.ones(3), 'layer': torch.nn.Linear(2, 2), 'step': 7};"
    code += f"ucp.save(state, {str(tmp_path / 'there')!r}); ucp.load(state, {str(tmp_path / 'there')!r});"
    heavy = ["torch.distributed.tensor", "torch.distributed.checkpoint", "sympy"]
    done = python(f"{code} sys.exit(' '.join(set({heavy!r}) & set(sys.modules)) or 0)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_plain_load_imports_only_what_it_uses(tmp_path: Path) -> None:
    """No language of specs, no declared changes, nothing that saves: a restart would pay for them in its first load."""
    ucp.save({"w": torch.ones(3)}, tmp_path / "there")
    code = f"import sys, torch, ucp; ucp.load({{'w': torch.ones(3)}}, {str(tmp_path / 'there')!r});"
    unused = [
        "yaml",
        "ucp.changes.apply",
        "ucp.spec.language",
        "ucp.merging.computed",
        "ucp.saving",
        "ucp.transfer.write",
    ]
    done = python(f"{code} sys.exit(' '.join(set({unused!r}) & set(sys.modules)) or 0)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", slow_but(["dcp"], ["dcp", "megatron"]))
def test_writing_what_torch_reads_needs_no_torch(tmp_path: Path, target: str) -> None:
    weight = {"decoder.layers.0.mlp.linear_fc1.weight": torch.ones(8, 4)}
    torch.save({"model": weight}, tmp_path / "one.pt")
    ucp.convert(tmp_path / "one.pt", tmp_path / "universal")
    layout = ", layout='tp=2'" if target == "megatron" else ""
    paths = f"{str(tmp_path / 'universal')!r}, {str(tmp_path / 'there')!r}"
    code = f"import sys, ucp; ucp.convert({paths}, {target!r}{layout});"
    done = python(f"{code} ucp.open({str(tmp_path / 'there')!r}); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    for name in ucp.__all__:
        assert getattr(ucp, name) is not None
        assert name in dir(ucp)
    with pytest.raises(AttributeError, match="no attribute 'close'"):
        ucp.close  # noqa: B018


def test_beside_ucx_py_it_says_so(tmp_path: Path) -> None:
    """A distribution of ucx-py as an installer leaves it: its metadata folder on the path."""
    (tmp_path / "ucx_py_cu12-0.41.0.dist-info").mkdir()
    done = python("import ucp", tmp_path)
    assert done.returncode != 0
    assert "ImportError: RAPIDS' ucx-py is installed in" in done.stderr
    assert str(tmp_path) in done.stderr


def test_over_ucx_py_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "core.py").write_text("")
    (tmp_path / "_libs").mkdir()
    with pytest.raises(ImportError, match=r"holds files of RAPIDS' ucx-py \(_libs, core\.py\)"):
        refuse_ucx_py([], str(tmp_path))


def test_other_packages_are_no_reason(tmp_path: Path) -> None:
    (tmp_path / "ucx_pyramid-1.0").mkdir()
    (tmp_path / "libucx_cu12-1.0.dist-info").mkdir()
    refuse_ucx_py([str(tmp_path), str(tmp_path / "missing.zip"), ""])
