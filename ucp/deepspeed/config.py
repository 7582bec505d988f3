"""The ``"ucp"`` section of a DeepSpeed configuration."""

from __future__ import annotations

import base64
import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import hjson  # DeepSpeed's own requirement, and its way to read config files; so is pydantic
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticKnownError

from ucp import limits
from ucp.errors import BadArgument
from ucp.loading.exchange import ADAPTIVE
from ucp.loading.proof import ALWAYS, FULL
from ucp.memory.options import Options, nbytes
from ucp.printable import logger
from ucp.saving.background import POLICIES
from ucp.saving.share import CACHES
from ucp.spec.select import Choice, choose

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

log = logger(__name__)


def _one_of(*known: bool | str, text: str) -> PlainValidator:
    """The values that a key may have; text names them in a refusal. 1 is not true here, and 0 is not false."""

    def check(value: Any) -> Any:
        if not any(value is word or (isinstance(value, str) and value == word) for word in known):
            raise ValueError(f"is {text}; found {value!r}")
        return value

    return PlainValidator(check)


def _no_null(fault: Literal["int_type", "string_type"]) -> BeforeValidator:
    """Refuse null in the config as any other wrong type. None is the value of a missing key only."""

    def check(value: Any) -> Any:
        if value is None:
            raise PydanticKnownError(fault)
        return value

    return BeforeValidator(check)


def _group(value: Any) -> Any:
    if value != "node" and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
        raise ValueError(f'is "node", or a number of nodes of at least 2; found {value!r}')
    return value


def _load_memory(value: Any) -> int:
    """A size of memory in bytes. It may be text, such as "256MiB"."""
    try:
        found = nbytes(value, "memory")
    except BadArgument:
        found = 0
    if found < limits.LOAD_MEMORY_LEAST_BYTES or (isinstance(value, str) and "/" in value):
        least = limits.LOAD_MEMORY_LEAST_BYTES >> 20
        raise ValueError(f'is a size of at least {least}MiB, such as "256MiB"; found {value!r}')
    return found


FORMATS = ("universal", "deepspeed")

_Once = _one_of(
    *(True, False, ADAPTIVE),
    text=f'true, false or "{ADAPTIVE}" (never "auto", which Accelerate refuses in a config)',
)
_Prove = _one_of(True, False, FULL, ALWAYS, text=f'true, false, "{FULL}" or "{ALWAYS}"')
_Group = PlainValidator(_group)
_Format = _one_of(*FORMATS, text=f"one of {', '.join(FORMATS)}")
_Policy = _one_of(*POLICIES, text=f"one of {', '.join(POLICIES)}")
_Cache = _one_of(*CACHES, text=f"one of {', '.join(CACHES)}")
_Patterns = Annotated[tuple[str, ...], Field(strict=False, description="a list of name patterns")]
_Number = Annotated[int, Field(ge=1)]


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return nbytes(value, "limit")  # which is no rate
        except BadArgument:
            raise ValueError(f'is bytes, or a size such as "16GiB"; found {value!r}') from None
    return value


_Bytes = Annotated[_Number, BeforeValidator(_bytes)]
_Steps = Annotated[_Number | None, _no_null("int_type")]


class _Section(BaseModel):
    """One object of the config. Unknown keys are refused, and no value is turned into another type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def keys(cls) -> list[str]:
        """Its keys, as they are written in a config."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class LoadSection(_Section):
    """How checkpoints are loaded.

    - allow_missing, allow_unused: name patterns of what a load may leave unrestored or unread.
    - trust_paths: follow a virtual checkpoint to files outside the folder that it names as its source.
    - allow_approximate: take a checkpoint with layers that a repair has filled in.
    - verify: check digests while loading.
    - read_once: have one rank read each byte that several want, and pass it on. True, False, or 'adaptive', which does
      so where it is measured to be faster.
    - prove: compare what is live after a load with the checkpoint's logical digests. True: if it has them. 'full': as
      True, but never a sample in host memory. 'always': also compute from its files those that it lacks. False: never.
    - changes: what of the model was changed on purpose since the checkpoint was saved, as a mapping or the path of a
      file (`ucp.spec.changes`).
    - memory: how much host memory a load may take on each rank beyond what is live, such as "256MiB".
    - lr_scheduler: 'keep' the checkpoint's, or 'reset' to the program's own.
    - reading: options of reading the checkpoint's format, such as skip_unknown_objects, model_key, optimizer_key. In a
      config the key is ``options``.
    - override: hyperparameters that all param groups have after a load, whatever the checkpoint says.
    """

    allow_missing: _Patterns = ()
    allow_unused: _Patterns = ()
    trust_paths: bool = False
    allow_approximate: bool = False
    verify: bool = True
    read_once: Annotated[bool | str, _Once] = ADAPTIVE
    prove: Annotated[bool | str, _Prove] = True
    memory: Annotated[str | int, PlainValidator(_load_memory)] = limits.LOAD_MEMORY_BYTES
    lr_scheduler: Annotated[str, _one_of("keep", "reset", text="one of keep, reset")] = "keep"
    changes: Annotated[dict[str, Any] | str | None, _no_null("string_type")] = None
    reading: Annotated[dict[str, Any], Field(description="options by name")] = Field(
        default_factory=dict, alias="options"
    )
    override: Annotated[dict[str, Any], Field(description="hyperparameters by name")] = Field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What of it is an argument of `ucp.loading.load.load`."""
        return self.model_dump(include={"verify", "read_once", "prove", "memory"})

    @model_validator(mode="after")
    def _overrides(self) -> LoadSection:
        if "params" in self.override:
            raise ValueError('has "params" in "override", which is for hyperparameters of all param groups')
        return self


class SaveSection(_Section):
    """How checkpoints are saved.

    - format: 'universal', or 'deepspeed' for DeepSpeed's own save.
    - background: save while training goes on. In a config the key is ``async``.
    - memory: how many bytes of host memory a rank's copies for that may take, or a size such as "16GiB".
    - policy: 'wait' for a save under way before the next one, or 'skip' the next one.
    - cache: 'keep' what is written in the page cache for the next load, 'bypass' it, or 'auto' for what fits.
    - timeout: how many seconds the first rank waits for the others' files.
    - gradient_norms: measure each layer's gradient every so many steps, for `ucp.repair`. None: never.
    - keep_last: how many of the newest checkpoints stay. None: all.
    - keep_every: also keep the checkpoints of steps that are a multiple of this.
    """

    format: Annotated[str, _Format] = FORMATS[0]
    background: bool = Field(default=True, alias="async")
    memory: _Bytes = limits.STAGING_BYTES
    policy: Annotated[str, _Policy] = POLICIES[0]
    cache: Annotated[str, _Cache] = CACHES[0]
    timeout: Annotated[float, Field(gt=0)] = limits.SAVE_TIMEOUT_SECONDS
    gradient_norms: _Steps = None
    keep_last: _Steps = None
    keep_every: _Steps = None

    @model_validator(mode="after")
    def _agrees(self) -> SaveSection:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError('with "keep_every" needs "keep_last" beside it; without that, all are kept')
        others = [
            key for key in self.model_dump(by_alias=True, exclude_unset=True) if key not in ("format", "gradient_norms")
        ]
        if self.format == "deepspeed" and others:
            raise ValueError(f'has "{others[0]}", which is for "format": "universal"; the config asks for "deepspeed"')
        return self


class MemorySection(_Section):
    """How snapshots are kept in memory (`ucp.memory.options.Options`, with sizes as text).

    enabled: keep snapshots. group: 'node' for one group of all nodes, or at most how many nodes protect each other.
    """

    enabled: bool = False
    run: Annotated[str | None, _no_null("string_type")] = None
    every: Annotated[int, Field(ge=0)] = 1
    policy: Annotated[str, _Policy] = POLICIES[0]
    redundancy: Annotated[int, Field(ge=0, le=32)] = 1
    group: Annotated[str | int, _Group] = "node"
    keep: Annotated[int, Field(ge=2)] = 2
    limit: Annotated[str | int | None, _no_null("string_type")] = None
    persist_every: Annotated[int, Field(ge=0)] = 0
    network: Annotated[str | int | None, _no_null("string_type")] = None

    def options(self) -> Options:
        """The options. Raises BadArgument for text that is not a size."""
        return Options(
            run=self.run,
            every=self.every,
            policy=self.policy,
            redundancy=self.redundancy,
            group=None if self.group == "node" else int(self.group),
            keep=self.keep,
            limit=None if self.limit is None else nbytes(self.limit, "limit"),
            persist_every=self.persist_every,
            network=None if self.network is None else nbytes(self.network, "network"),
        )


class ElasticSection(_Section):
    """How a run continues with another number of ranks (`ucp.elastic.layouts.fitted`).

    layouts: layouts such as "dp=2,zero=3", one for each number of ranks; None allows any number. min: the least number
    of ranks. micro: sizes that a micro-batch may have, besides the config's own. batch: 'keep' the global batch.
    uneven: where no size divides it, some ranks take a sample less than others, and losses are weighed by samples.
    rng: 'per_rank' restores ranks' generators where as many resume; with 'per_sample' random numbers belong to samples
    (`EngineUcp.samples`), and seed is theirs.
    """

    layouts: Annotated[tuple[str, ...] | None, Field(strict=False, description="a list of layouts")] = None
    min: _Number = 1
    micro: Annotated[tuple[_Number, ...], Field(strict=False, description="a list of numbers")] = ()
    batch: Annotated[str, _one_of("keep", text='"keep"')] = "keep"
    uneven: bool = False
    rng: Annotated[str, _one_of("per_rank", "per_sample", text="one of per_rank, per_sample")] = "per_rank"
    seed: int = 0


class Config(_Section):
    """What the section says.

    enabled: bind the engine. spec, sizes: how tensor parallelism cuts the model, as for `ucp.open`.
    trust_client_state: unpickle any class in client state, which runs its code. allow_untested_version: try a DeepSpeed
    version that has not been tested. metrics: write timings of saves and loads beside the checkpoints.
    """

    enabled: bool = False
    spec: Annotated[str | None, _no_null("string_type")] = None
    sizes: Annotated[dict[str, int], Field(description="whole numbers by name")] = Field(default_factory=dict)
    load: LoadSection = LoadSection()
    save: SaveSection = SaveSection()
    memory: MemorySection = MemorySection()
    elastic: ElasticSection | None = None
    trust_client_state: bool = False
    allow_untested_version: bool = False
    metrics: bool = False

    def choice(self) -> Choice:
        """The spec to use for a tensor-parallel model, live or saved."""
        return choose(self.spec, None, self.sizes)


# pydantic's error types -> what the key needs, in our words.
_NEEDS = {
    "bool_type": "true or false",
    "dict_type": "a dict",
    "float_type": "a float",
    "greater_than": "seconds above 0",
    "greater_than_equal": "a number of at least 1",
    "int_type": "a number of at least 1",
    "model_type": "a dict",
    "string_type": "a str",
    "tuple_type": "a list",
}
_UNKNOWN = ("extra_forbidden", "invalid_key")


def parse(config: Mapping[str, Any], *, save_async: bool = True) -> Config:
    """Read the section of a DeepSpeed config dict. Without the section nothing is enabled.

    save_async: whether saves are in the background if the section does not say. Raises BadArgument for unknown keys,
    wrong types and values that a key can't have.
    """
    section = config.get("ucp")
    if section is None:
        return Config()
    if not isinstance(section, Mapping):
        raise BadArgument(f'"ucp" in the DeepSpeed config needs an object, found {section!r}')
    try:
        said = Config.model_validate(dict(section))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # An unknown key is told first: the misspelling may be the cause of the other errors.
        raise BadArgument(_line(next((f for f in faults if f["type"] in _UNKNOWN), faults[0]), section)) from None
    if "background" in said.save.model_fields_set:
        return said
    return said.model_copy(update={"save": said.save.model_copy(update={"background": save_async})})


def _line(fault: ErrorDetails, section: Mapping[str, Any]) -> str:
    """One of pydantic's faults as our one line: where, what is expected, what was found."""
    path = list(fault["loc"])
    if fault["type"] in _UNKNOWN:
        known = _section_at(path[:-1]).keys()
        near = difflib.get_close_matches(str(path[-1]), known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"
        return f"{_where(path[:-1])} in the DeepSpeed config has the unknown key '{path[-1]}'{hint}"
    if fault["type"] == "value_error":
        return f"{_where(path)} {fault['ctx']['error']}"
    depth = 1 if path[0] not in _SECTIONS else 2
    needs = _NEEDS.get(fault["type"], f"another value ({fault['msg']})")
    if path[depth:]:  # an item of a list or of sizes is wrong; the message shows the key with its whole value
        needs = _section_at(path[: depth - 1]).model_fields[str(path[depth - 1])].description or needs
    found: Any = section
    for key in path[:depth]:
        found = found[key]
    return f"{_where(path[: min(depth, len(path)) - 1])}: '{path[:depth][-1]}' needs {needs}, found {found!r}"


_SECTIONS: dict[int | str, type[_Section]] = {
    "load": LoadSection,
    "save": SaveSection,
    "memory": MemorySection,
    "elastic": ElasticSection,
}


def _section_at(path: Sequence[int | str]) -> type[_Section]:
    return _SECTIONS[path[0]] if path else Config


def _where(path: Sequence[int | str]) -> str:
    """A key's place as it is written in a config: `"ucp": {"save": {"memory"}}`."""
    text = "".join(f': {{"{key}"' for key in path)
    return f'"ucp"{text}{"}" * len(path)}'


def find(args: Any, config: Any, config_params: Any) -> Mapping[str, Any]:
    """The config dict that ``deepspeed.initialize`` will use. It is read to report mistakes before an engine is made.

    It may be a dict, a file's path or base64 text, in JSON with comments (``runtime/config.py: DeepSpeedConfig``). For
    a config that cannot be read this is {}, since DeepSpeed itself reports that.
    """
    source = config if config is not None else config_params
    for name in ("deepspeed_config", "deepscale_config"):
        given = getattr(args, name, None) if args is not None else None
        if given is not None and source is None:
            source = given
    if isinstance(source, (str, os.PathLike)):
        source = _text(source)
    return source if isinstance(source, Mapping) else {}


def with_config(arguments: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Replace the config in these arguments of ``deepspeed.initialize`` by this one."""
    arguments.pop("config_params", None)
    arguments["config"] = dict(config)
    args = arguments.get("args")
    if args is not None:
        args = arguments["args"] = copy.copy(args)
        for name in ("deepspeed_config", "deepscale_config"):
            if getattr(args, name, None) is not None:
                setattr(args, name, None)


def _text(source: str | os.PathLike[str]) -> Any:
    try:
        if os.path.isfile(source):
            with open(source, encoding="utf-8") as f:
                return hjson.load(f)
        return hjson.loads(base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8"))
    except (OSError, ValueError) as error:
        log.debug("the DeepSpeed config cannot be read beforehand: %s", error)
        return None
