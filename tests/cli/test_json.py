"""Every key that ``--json`` prints is in ``ucp/cli/json.md``, and every key there is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.formats import raw
from tests.inspection.conftest import OLDER
from tests.merging.test_adapters import adapter
from ucp.cli.main import main

DOCUMENT = Path(__file__).resolve().parents[2] / "ucp/cli/json.md"


def documented() -> dict[str, set[str]]:
    """The keys below each schema, as paths."""
    out: dict[str, set[str]] = {}
    for part in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        (schema,) = re.findall(r"^`(.*)`$", part.splitlines()[0])
        keys = [row.split("|")[1] for row in part.splitlines() if row.startswith("| `")]
        out[schema] = {key for cell in keys for key in re.findall(r"`([^`]+)`", cell)}
    return out


def seen(value: Any, keys: set[str], path: str = "") -> set[str]:
    """The documented paths that lead to something in a value; raises for a key that is in no documented path."""
    if path in keys:
        return {path}
    if isinstance(value, list):
        return set().union(*(seen(item, keys, f"{path}[]") for item in value))
    assert isinstance(value, dict), f"'{path}' is not documented"
    out: set[str] = set()
    for key, item in value.items():
        below = f"{path}.{key}" if path else key
        wild = f"{path}.*"
        known = any(one == below or one.startswith((f"{below}.", f"{below}[")) for one in keys)
        out |= seen(item, keys, below if known else wild)
    return out


def lost(folder: Path) -> Path:
    """A checkpoint of three layers that has lost the file of one."""
    made = raw.make(folder / "raw", shapes={f"layers.{k}.w": (8, 4) for k in range(3)})
    path = raw.write_consolidated(folder / "checkpoint", made.catalog, max_shard=128)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    (path / index["weight_map"]["layers.1.w"]).unlink()
    return path


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    made = raw.make(tmp_path / "raw", aliases={"embed.weight": ("head.weight",)})
    good = raw.write_consolidated(tmp_path / "run/step7", made.catalog)
    other = raw.make(tmp_path / "other", seed=1)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}))
    return {
        "GOOD": str(good),
        "OTHER": str(raw.virtual_checkpoint(tmp_path / "o", other)),
        "OUT": str(tmp_path / "out"),
        "NATIVE": str(OLDER / "0.14.4-z1-bf16"),
        "CONFIG": str(config),
        "LOST": str(lost(tmp_path / "lost")),
        "LORA": str(adapter(tmp_path / "lora", 0)),
    }


COMMANDS = {
    "ucp.inspect/1": ["inspect GOOD", "inspect GOOD --tree --param *"],
    "ucp.ls/1": ["ls GOOD"],
    "ucp.doctor/1": ["doctor"],
    "ucp.verify/1": ["verify GOOD --finite", "verify GOOD --against 00000000000000000000000000000000"],
    "ucp.digest/1": ["digest GOOD --compute"],
    "ucp.diff/1": ["diff GOOD OTHER", "diff GOOD OTHER --quick"],
    "ucp.plan/1": ["plan GOOD --layout dp=2,zero=3 --matrix"],
    "ucp.report-written/1": ["report GOOD -o OUT"],
    "ucp.convert/1": ["convert GOOD OUT --dry-run"],
    "ucp.merge/1": ["merge GOOD GOOD OUT --plan"],
    "ucp.repair/1": ["repair LOST OUT --dry-run"],
    "ucp.merge-adapters/1": ["merge LORA LORA OUT --adapter-merge delta"],
    "ucp.spec-list/1": ["spec show"],
    "ucp.spec-show/1": ["spec show llama"],
    "ucp.spec-infer/1": ["spec infer NATIVE"],
    "ucp.spec-check/1": ["spec check llama"],
}
# Printed only with a checkpoint whose names and config are the spec's: `test_spec`.
ELSEWHERE = {"shapes", "padding", "absent", "merged", "copies", "trust", "trial"}


def test_the_document_is_about_all_schemas() -> None:
    assert documented().keys() == COMMANDS.keys()


@pytest.mark.parametrize("schema", COMMANDS)
def test_keys(capsys: pytest.CaptureFixture[str], places: dict[str, str], schema: str) -> None:
    keys = documented()[schema]
    met: set[str] = set()
    for command in COMMANDS[schema]:
        assert main([*(places.get(word, word) for word in command.split()), "--json"]) in (0, 1)
        found = json.loads(capsys.readouterr().out)
        assert found.pop("schema") == schema
        met |= seen(found, keys)
    missing = keys - met - ELSEWHERE
    assert not {key for key in missing if not key.startswith("parameters.*.") or schema == "ucp.spec-show/1"}
