"""``ucp-spec`` as a user meets it: exit codes, refusals with their place on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats import raw
from tests.spec.models import MODELS, config_of, names_of
from ucp.cli import spec as command
from ucp.spec import shipped

ROOT = Path(__file__).resolve().parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    try:
        code = command.main([str(a) for a in arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A consolidated checkpoint with the names and shapes of a tiny Llama, and its config.json."""
    module = MODELS["llama-bias-tied"].make()
    found = names_of(module)
    shapes = {n: s for n, s in found.shapes.items() if n not in found.buffers}
    owner = {o: (a,) for a, o in found.aliases.items()}
    made = raw.make(tmp_path / "raw", shapes=shapes, aliases=owner, states=("param",))
    folder = raw.write_consolidated(tmp_path / "checkpoint", made.catalog)
    (folder / "config.json").write_text(json.dumps(config_of(module)))
    return folder


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """Llama's spec with a line for the one frozen parameter that the checkpoint has beside."""
    text = (shipped.FOLDER / "llama.yaml").read_text()
    path = tmp_path / "my.yaml"
    path.write_text(text.replace("\ntied:", '  frozen.weight: "6 5"\n\ntied:'))
    return path


def test_show_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "show")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(shipped.names())
    code, out, _ = call(capsys, "show", "--json")
    found = json.loads(out)
    assert found["schema"] == "ucp.spec-list/1"
    assert {one["name"]: one["models"] for one in found["specs"]}["llama"] == ["llama", "mistral"]


def test_show_says_it_in_the_papers_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "show", "phi3")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  model.")}
    assert rows["model.norm.weight"].endswith("replicated")
    assert rows["model.layers.{i}.self_attn.qkv_proj.weight"].endswith("fragment over tp (dimension 0, 3 segments)")
    assert rows["model.embed_tokens.weight"].endswith("fragment over tp (dimension 0, padded)")
    found = json.loads(call(capsys, "show", "mixtral", "--json")[1])
    experts = found["parameters"]["model.layers.{i}.mlp.experts.down_proj"]
    assert experts["pattern"] == "fragment over ep (dimension 0), fragment over tp (dimension 2)"


@pytest.mark.parametrize("name", shipped.names())
def test_every_spec_can_be_shown_and_is_well_formed(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert call(capsys, "show", name)[::2] == (0, "")
    code, out, err = call(capsys, "check", name)
    assert (code, err) == (0, "")
    assert f"/{name}.yaml: " in out
    assert "well formed" in out


def test_check_against_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(MODELS["llama"].make())))
    code, out, err = call(capsys, "check", "llama", "--config", tmp_path / "config.json")
    assert (code, err) == (0, "")
    assert out.startswith("hidden=24, kv_heads=2, q_per_kv=3, head_dim=10, ffn=20, vocab=101\n")
    assert "  model.layers.{i}.self_attn.q_proj.weight  [60, 24]" in out
    found = json.loads(
        call(capsys, "check", "llama", "--config", tmp_path / "config.json", "--set", "ffn=8", "--json")[1]
    )
    assert found["sizes"]["ffn"] == 8
    assert found["shapes"]["model.layers.{i}.mlp.down_proj.weight"] == [24, 8]


def test_check_against_a_checkpoint(capsys: pytest.CaptureFixture[str], llama: Path, spec: Path) -> None:
    code, out, err = call(capsys, "check", spec, llama)
    assert (code, err) == (0, "")
    assert "  model.layers.{i}.self_attn.k_proj.bias    2 ×  [8]        fragment over tp (dimension 0)" in out
    found = json.loads(call(capsys, "check", spec, llama, "--json")[1])
    names = found["parameters"]
    assert names["lm_head.weight"]["shape"] == [101, 24]
    assert names["mask"] == {"shape": [3, 3], "line": None, "axes": None, "pattern": "replicated"}
    assert [s for s in found["trust"] if "equal dimensions" in s]
    assert call(capsys, "check", spec, llama, "--quiet") == (0, "", "")


def test_padding_is_reported(capsys: pytest.CaptureFixture[str], llama: Path, spec: Path) -> None:
    code, out, _ = call(capsys, "check", spec, llama, "--set", "vocab=97")
    assert code == 0
    assert "padding: vocab is 97, kept as 101\n" in out


def test_a_spec_that_does_not_fit(capsys: pytest.CaptureFixture[str], llama: Path, spec: Path) -> None:
    text = spec.read_text().replace('q_proj.weight: "(kv_heads/tp q_per_kv', 'q_proj.weight: "(kv_heads/tp 2 q_per_kv')
    spec.write_text(text)
    code, out, err = call(capsys, "check", spec, llama)
    assert (code, out) == (2, "")
    first, shown, marks, *_ = err.splitlines()
    line = next(k + 1 for k, t in enumerate(text.splitlines()) if "(kv_heads/tp 2" in t)
    column = text.splitlines()[line - 1].index("(kv_heads/tp 2") + 1
    assert first == (
        f"ucp-spec: error: {spec}:{line}:{column}: '(kv_heads/tp 2 q_per_kv head_dim)' is 48 (kv_heads 2, q_per_kv 3, "
        "head_dim 4), but 'model.layers.0.self_attn.q_proj.weight' has 24 in dimension 0"
    )
    assert shown == "    (kv_heads/tp 2 q_per_kv head_dim) hidden"
    assert marks == "    ^" + "^" * 32


def test_the_catalogues_own_lacks_the_frozen_parameter(capsys: pytest.CaptureFixture[str], llama: Path) -> None:
    code, _, err = call(capsys, "check", "llama", llama)
    assert code == 2
    assert err.endswith(
        "/llama.yaml:1:1: no line under parameters: matches 'frozen.weight' (shape [6, 5]); write one\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("check",), "the following arguments are required: SPEC"),
        (("check", "lama"), "no spec 'lama' in the catalogue; did you mean 'llama'?"),
        (("check", "no/where.yaml"), "no/where.yaml: can't be read as a spec: No such file or directory"),
        (("show", "nothing"), "no spec 'nothing' in the catalogue"),
        (("check", "llama", "--set", "ffn"), "--set ffn: write NAME=N with a whole number"),
        (("check", "llama", "--set", "fn=3"), "has no size 'fn'; did you mean 'ffn'?"),
        (("check", "llama", "--config", "no.json"), "no.json: there is no such file"),
        (("check", "gpt2", "--section", "autotp"), "has no such section under layouts: (it has none)"),
        (("check", "llama", "."), ""),
    ],
)
def test_arguments_at_fault(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ucp-spec")
    assert message in err
    assert err.count("\n") == 1


def test_a_checkpoint_without_a_config(capsys: pytest.CaptureFixture[str], llama: Path, spec: Path) -> None:
    (llama / "config.json").unlink()
    code, _, err = call(capsys, "check", spec, llama)
    assert code == 2
    assert err.endswith("has no config.json; give the model's with --config, or sizes with --set\n")
    (llama / "config.json").write_text("[]")
    assert f"{llama}/config.json: is not a JSON object" in call(capsys, "check", spec, llama)[2]


def test_unused_sizes_are_warned_of(capsys: pytest.CaptureFixture[str], spec: Path) -> None:
    spec.write_text(spec.read_text().replace("  vocab:", "  unused: '3'\n  vocab:"))
    code, _, err = call(capsys, "check", spec)
    assert code == 0
    assert err.startswith(f"ucp-spec: warning: {spec}:")
    assert err.endswith("nothing uses the size 'unused'\n")


def test_the_module_form_and_its_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ucp.cli.spec", "check", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for flag in ["SPEC", "CHECKPOINT", "--config", "--set", "--section", "--tag", "--json", "--quiet", "--debug"]:
        assert flag in done.stdout


def test_the_catalogue_and_the_command_are_installed_with_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'ucp-spec = "universal_checkpoint.cli.spec:main"' in text
    assert '"specs/*.yaml"' in text
    assert shipped.FOLDER.resolve() == (ROOT / "specs").resolve() or "site-packages" in str(shipped.FOLDER)
