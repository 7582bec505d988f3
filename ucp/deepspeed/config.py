"""The ``"ucp"`` section of a DeepSpeed configuration."""

from __future__ import annotations

import base64
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import hjson  # DeepSpeed's own requirement, and its way to read config files

from ucp import limits
from ucp.errors import BadArgument
from ucp.loading.exchange import ADAPTIVE
from ucp.loading.proof import ALWAYS, FULL
from ucp.printable import logger
from ucp.saving.background import POLICIES
from ucp.spec.select import Choice, choose

log = logger(__name__)


@dataclass(frozen=True)
class Config:
    """What the section says.

    enabled: bind the engine. spec, sizes: how tensor parallelism cuts the model, as for `ucp.open`.
    allow_missing, allow_unused: name patterns that a load may leave unrestored or unread.
    verify: check digests while loading. read_once: have each byte that several ranks want read by one of them and
    exchanged: True, False, or 'adaptive', where that is measured to be faster. prove: compare what is live after a
    load with the checkpoint's logical digests: True, where it has them; False; 'full', never a sample in host memory;
    or 'always', computing those that it lacks from its files, too. trust_client_state: unpickle any class in client
    state, running its code. allow_untested_version: try a DeepSpeed that the tests have not run.
    save_format: 'universal', or 'deepspeed' for
    DeepSpeed's own save. save_async: save in the background. save_memory: bytes of host memory that a rank's copies for
    that may take. save_policy: 'wait' for a save under way before the next one, or 'skip' the next one. save_timeout:
    seconds that the first rank waits for the others' files. keep_last, keep_every: how many of the newest checkpoints
    stay, and of which steps besides; None for all. metrics: write timings of saves and loads beside the checkpoints.
    """

    enabled: bool = False
    spec: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    allow_missing: tuple[str, ...] = ()
    allow_unused: tuple[str, ...] = ()
    verify: bool = True
    read_once: bool | str = ADAPTIVE
    prove: bool | str = True
    trust_client_state: bool = False
    allow_untested_version: bool = False
    save_format: str = "universal"
    save_async: bool = True
    save_memory: int = limits.STAGING_BYTES
    save_policy: str = "wait"
    save_timeout: float = limits.SAVE_TIMEOUT_SECONDS
    keep_last: int | None = None
    keep_every: int | None = None
    metrics: bool = False

    def choice(self) -> Choice:
        """The spec that counts for a tensor-parallel model, live or saved."""
        return choose(self.spec, None, self.sizes)


_TOP: dict[str, Any] = {
    "enabled": bool,
    "spec": str,
    "sizes": dict,
    "load": dict,
    "save": dict,
    "trust_client_state": bool,
    "allow_untested_version": bool,
    "metrics": bool,
}
_LOAD: dict[str, Any] = {
    "allow_missing": list,
    "allow_unused": list,
    "verify": bool,
    "read_once": object,
    "prove": object,
}
_SAVE: dict[str, Any] = {
    "format": str,
    "async": bool,
    "memory": int,
    "policy": str,
    "timeout": float,
    "keep_last": int,
    "keep_every": int,
}
_ACCEPTED: dict[type, Any] = {dict: Mapping, list: (list, tuple), float: (int, float)}
FORMATS = ("universal", "deepspeed")


def parse(config: Mapping[str, Any], *, save_async: bool = True) -> Config:
    """Read the section of a DeepSpeed config dict; without one, nothing is enabled.

    save_async: whether saves go on in the background where the section does not say so. Raises BadArgument for unknown
    keys and wrong types.
    """
    section = config.get("ucp")
    if section is None:
        return Config()
    _check('"ucp"', section, _TOP)
    sizes = section.get("sizes", {})
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes.values()):
        raise BadArgument(f'"ucp": {{"sizes"}} needs whole numbers by name, found {sizes!r}')
    load = section.get("load", {})
    _check('"ucp": {"load"}', load, _LOAD)
    for key in ("allow_missing", "allow_unused"):
        if not all(isinstance(p, str) for p in load.get(key, [])):
            raise BadArgument(f'"ucp": {{"load": {{"{key}"}}}} needs a list of name patterns, found {load[key]!r}')
    once = load.get("read_once", ADAPTIVE)
    if not isinstance(once, bool) and once != ADAPTIVE:
        raise BadArgument(
            f'"ucp": {{"load": {{"read_once"}}}} is true, false or "{ADAPTIVE}" (never "auto", which Accelerate '
            f"refuses in a config); found {once!r}"
        )
    if not any(load.get("prove", True) is known for known in (True, False)) and load["prove"] not in (ALWAYS, FULL):
        raise BadArgument(
            f'"ucp": {{"load": {{"prove"}}}} is true, false, "{FULL}" or "{ALWAYS}"; found {load["prove"]!r}'
        )
    save = section.get("save", {})
    _check('"ucp": {"save"}', save, _SAVE)
    for key, known in (("format", FORMATS), ("policy", POLICIES)):
        if save.get(key, known[0]) not in known:
            raise BadArgument(f'"ucp": {{"save": {{"{key}"}}}} is one of {", ".join(known)}; found {save[key]!r}')
    for key in ("memory", "keep_last", "keep_every"):
        if key in save and (save[key] < 1 or save[key] is True):
            raise BadArgument(f'"ucp": {{"save": {{"{key}"}}}} needs a number of at least 1, found {save[key]!r}')
    if "keep_every" in save and "keep_last" not in save:
        raise BadArgument('"ucp": {"save": {"keep_every"}} needs "keep_last" beside it; without that, all are kept')
    if save.get("format") == "deepspeed" and (others := [key for key in save if key != "format"]):
        raise BadArgument(
            f'"ucp": {{"save": {{"{others[0]}"}}}} is for "format": "universal", and the config asks for "deepspeed"'
        )
    if not save.get("timeout", 1) > 0:
        raise BadArgument(f'"ucp": {{"save": {{"timeout"}}}} needs seconds above 0, found {save["timeout"]!r}')
    return Config(
        enabled=section.get("enabled", False),
        spec=section.get("spec"),
        sizes=dict(section.get("sizes", {})),
        allow_missing=tuple(load.get("allow_missing", ())),
        allow_unused=tuple(load.get("allow_unused", ())),
        verify=load.get("verify", True),
        read_once=once,
        prove=load.get("prove", True),
        trust_client_state=section.get("trust_client_state", False),
        allow_untested_version=section.get("allow_untested_version", False),
        save_format=save.get("format", FORMATS[0]),
        save_async=save.get("async", save_async),
        save_memory=save.get("memory", limits.STAGING_BYTES),
        save_policy=save.get("policy", POLICIES[0]),
        save_timeout=float(save.get("timeout", limits.SAVE_TIMEOUT_SECONDS)),
        keep_last=save.get("keep_last"),
        keep_every=save.get("keep_every"),
        metrics=section.get("metrics", False),
    )


def _check(where: str, section: Any, known: Mapping[str, type]) -> None:
    if not isinstance(section, Mapping):
        raise BadArgument(f"{where} in the DeepSpeed config needs an object, found {section!r}")
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"
            raise BadArgument(f"{where} in the DeepSpeed config has the unknown key '{key}'{hint}")
        wanted = known[key]
        if not isinstance(value, _ACCEPTED.get(wanted, wanted)) or (wanted is float and isinstance(value, bool)):
            raise BadArgument(f"{where}: '{key}' needs a {wanted.__name__}, found {value!r}")


def find(args: Any, config: Any, config_params: Any) -> Mapping[str, Any]:
    """The config dict that ``deepspeed.initialize`` will use, so that mistakes in it are told before an engine is made.

    It may be a dict, a file's path or base64 text, in JSON with comments (``runtime/config.py: DeepSpeedConfig``). What
    cannot be read is left to DeepSpeed, which says so: {} then.
    """
    source = config if config is not None else config_params
    for name in ("deepspeed_config", "deepscale_config"):
        given = getattr(args, name, None) if args is not None else None
        if given is not None and source is None:
            source = given
    if isinstance(source, (str, os.PathLike)):
        source = _text(source)
    return source if isinstance(source, Mapping) else {}


def _text(source: str | os.PathLike[str]) -> Any:
    try:
        if os.path.exists(source):
            with open(source, encoding="utf-8") as f:
                return hjson.load(f)
        return hjson.loads(base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8"))
    except (OSError, ValueError) as error:
        log.debug("the DeepSpeed config cannot be read beforehand: %s", error)
        return None
