"""The public surface: what is here a program may rely on, so nothing of it may be lost. More may come.

JSON's keys are held by tests/cli/test_json.py.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import ucp
import ucp.dcp
import ucp.errors
from ucp.cli import convert, main, spec

ROOT = Path(__file__).parents[1]

# What may be given by position, then after * by name alone; with "=" it may be left out; ** is handed on.
CALLS = {
    "ucp:open": "path spec= tag= * model_config= sizes= trust_client_state= param_names= verify=",
    "ucp:convert": (
        "source dest to= layout= spec= * model_config= sizes= virtual= tag= digests= workers= max_memory= overwrite= "
        "resume= dry_run= team= ds_config= dtype= max_shard_size= like= trust_client_state= progress="
    ),
    "ucp:save": "state_dict path * timeout= metrics=",
    "ucp:async_save": "state_dict path * lazy= memory= timeout= metrics=",
    "ucp:digest": "state_dict",
    "ucp:affine_map": "source state=",
    "ucp:load": "state_dict path * allow_missing= verify= metrics= **",
    "ucp:save_training": (
        "path * model optimizer= lr_scheduler= dataloader= step= samples= rng= extra= background= memory= timeout= "
        "metrics="
    ),
    "ucp:load_training": (
        "path * model optimizer= lr_scheduler= dataloader= rng= allow_missing= allow_unused= verify= metrics= **"
    ),
    "ucp:Checkpoint.read": "self name state= region=",
    "ucp:Checkpoint.verify": "self progress=",
    "ucp:Checkpoint.close": "self",
    "ucp.dcp:StorageReader": "path * model= verify= **",
    "ucp.dcp:StorageWriter": "path * timeout=",
    "ucp.inspection.summary:summarise": "checkpoint",
    "ucp.inspection.listing:listing": "folder",
    "ucp.inspection.verify:verify": "path tag= * spec= model_config= sizes= quick= finite= progress=",
    "ucp.inspection.difference:diff": (
        "a b * params= states= absolute= relative= types= training_state= values= progress="
    ),
    "ucp.inspection.planning:plan": (
        "checkpoint layout * spec= model_config= sizes= ds_config= rank_bandwidth= storage_bandwidth= ranks_per_node="
    ),
    "ucp.inspection.report:write_report": (
        "path output * tag= layout= ds_config= spec= model_config= sizes= quick= finite= progress="
    ),
}
DEEPSPEED_CALLS = {
    "ucp.deepspeed:attach": "engine",
    "ucp.deepspeed:initialize": (
        "args= model= optimizer= model_parameters= training_data= lr_scheduler= distributed_port= mpu= "
        "dist_init_required= collate_fn= config= mesh_param= config_params="
    ),
    "ucp.deepspeed:GlobalOrder": "length batch * rank world seen= seed= shuffle=",
    "ucp.deepspeed:EngineUcp.wait": "self",
    "ucp.deepspeed:EngineUcp.hold": "self",
}
ATTRIBUTES = {
    "Checkpoint": "close format layout parameters read reader training_state verify",
    "ConversionReport": (
        "bytes_read bytes_written destination dry_run files layout parameters seconds source source_format tag "
        "target_layout tensors to unverified_bytes verified_bytes virtual"
    ),
    "Layout": "dp tp pp ep zero world_size",
    "ParameterInfo": "name shape states kind scalars aliases",
    "ParamGroup": "names options",
    "TrainingState": (
        "client_state clip_grad config dp_world_size extra global_batch_size global_samples global_steps loss_scaler "
        "lr_scheduler param_groups skipped_steps"
    ),
}
ERRORS = {
    "NotACheckpoint": "UcpError",
    "DamagedCheckpoint": "UcpError",
    "DigestMismatch": "DamagedCheckpoint",
    "UnsafePickle": "UcpError",
    "Unsupported": "UcpError",
    "Mismatch": "UcpError",
    "BadArgument": "UcpError",
    "DestinationError": "UcpError",
    "SaveFailed": "UcpError",
    "ProcessLost": "UcpError",
}
SPEC = "--tag --spec --model-config --set"
EVERY = "--json --quiet --debug"
COMMANDS = {
    "ucp inspect": f"checkpoint --tree --param {SPEC} {EVERY}",
    "ucp ls": f"folder {EVERY}",
    "ucp verify": f"checkpoint --finite --quick {SPEC} {EVERY}",
    "ucp diff": (
        f"a b --tag-a --tag-b --param --state --atol --rtol --ignore-types --tensors-only --no-values {SPEC} {EVERY}"
    ),
    "ucp plan": (
        f"checkpoint --layout --ds-config --rank-bandwidth --storage-bandwidth --ranks-per-node --matrix {SPEC} {EVERY}"
    ),
    "ucp report": f"checkpoint -o --output --plan-layout --ds-config --quick --finite {SPEC} {EVERY}",
    "ucp convert": "",
    "ucp spec": "",
    "ucp-convert": (
        f"source dest --version --to --layout {SPEC} --virtual --digests --workers --max-memory --ds-config --dtype "
        f"--max-shard-size --like --overwrite --no-resume --trust-client-state --dry-run {EVERY}"
    ),
    "ucp-spec check": f"spec checkpoint --config --set --model --section --tag {EVERY}",
    "ucp-spec infer": f"checkpoint --tag {EVERY}",
    "ucp-spec show": f"spec {EVERY}",
}


def public(where: str) -> Any:
    """What stands at ``module:name``."""
    module, _, name = where.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_docstrings_have_one_style(name: str) -> None:
    """Every parameter under its own heading, and what is returned and raised; no ``name: what it is`` in a line."""
    call = public(name)
    text = inspect.getdoc(call) or ""
    code = (call.__init__ if inspect.isclass(call) else call).__code__  # `convert` has a signature of its settings
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    asked = [parameter for parameter in code.co_varnames[:count] if parameter != "self"]
    headings = {word for line in re.findall(r"^[\w*, ]+$", text, re.M) for word in re.split(r", ", line)}
    assert set(asked) <= headings, set(asked) - headings
    assert not re.findall(r"^[a-z_]+(?:, [a-z_]+)*: ", text, re.M)
    if asked:
        assert re.search(r"^Parameters\n-+$", text, re.M)
        assert re.search(r"\b[Rr]eturns?\b", text) or inspect.isclass(call)


def test_the_package() -> None:
    assert set(ucp.__all__) >= {
        *(name.partition(":")[2] for name in CALLS if name.startswith("ucp:") and "." not in name),
        *ATTRIBUTES,
        "UcpError",
        "__version__",
    }
    assert all(hasattr(ucp, name) for name in ucp.__all__)
    assert set(ucp.dcp.__all__) >= {"StorageReader", "StorageWriter"}


def described(function: Any) -> tuple[list[str], set[str]]:
    """What may be given by position, in order, and by name alone: each with "=" where it may be left out."""
    kinds = inspect.Parameter
    ordered, named = [], set()
    for name, p in inspect.signature(function).parameters.items():
        text = name if p.default is p.empty else f"{name}="
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            ordered.append(text)
        elif p.kind == kinds.KEYWORD_ONLY:
            named.add(text)
        elif p.kind == kinds.VAR_KEYWORD:
            named.add("**")
    return ordered, named


def check_call(where: str, wanted: str) -> None:
    ordered, named = described(public(where))
    positional, _, by_name = wanted.partition("*" if "* " in wanted else "\0")
    assert ordered[: len(positional.split())] == positional.split()
    assert all(extra.endswith("=") for extra in ordered[len(positional.split()) :])
    assert named >= set(by_name.split())
    assert all(extra.endswith("=") or extra == "**" for extra in named - set(by_name.split()))


@pytest.mark.parametrize("where", CALLS)
def test_calls(where: str) -> None:
    check_call(where, CALLS[where])


@pytest.mark.parametrize("where", DEEPSPEED_CALLS)
def test_calls_of_the_plugin(where: str) -> None:
    pytest.importorskip("deepspeed")
    check_call(where, DEEPSPEED_CALLS[where])


def test_the_plugins_names() -> None:
    pytest.importorskip("deepspeed")
    import ucp.deepspeed as plugin

    assert set(plugin.__all__) >= {"TESTED_VERSIONS", "EngineUcp", "GlobalOrder", "attach", "initialize"}
    assert {"hold", "wait", "samples_seen"} <= set(dir(plugin.EngineUcp))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str) -> None:
    kind = getattr(ucp, name)
    fields = set(getattr(kind, "__dataclass_fields__", ()))
    assert {a for a in dir(kind) if not a.startswith("_")} | fields >= set(ATTRIBUTES[name].split())


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    assert issubclass(getattr(ucp.errors, name), getattr(ucp.errors, ERRORS[name]))


def options_of(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, set[str]]]:
    """Each command's arguments, its subcommands' too."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child, one in action.choices.items():
                yield from options_of(one, f"{name} {child}")
        else:
            found |= set(action.option_strings) or {action.dest}
    yield name, found


def test_every_commands_arguments() -> None:
    parsers = {"ucp": main.parser(), "ucp-convert": convert.parser(), "ucp-spec": spec.parser()}
    found = {key: given for name, parser in parsers.items() for key, given in options_of(parser, name)}
    for command, wanted in COMMANDS.items():
        assert found[command] >= set(wanted.split()), command
    # In the order in which they are given, too.
    assert [a.dest for a in convert.parser()._actions if not a.option_strings] == ["source", "dest"]


def test_console_scripts() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]\n")[2].partition("\n[")[0]
    scripts = dict(re.findall(r'^([\w-]+) = "([\w.:]+)"$', section, re.MULTILINE))
    assert set(scripts) >= {"ucp", "ucp-convert", "ucp-spec"}
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
