"""The DeepSpeed plugin: resume a DeepSpeed run from a checkpoint of any layout.

    import ucp.deepspeed
    engine, optimizer, loader, scheduler = ucp.deepspeed.initialize(model=model, config=ds_config, ...)
    engine.load_checkpoint(folder)        # saved at any ZeRO stage, on any number of ranks

``initialize`` takes and returns what ``deepspeed.initialize`` does. The plugin is on if the config says
``"ucp": {"enabled": true}``. Programs that call ``deepspeed.initialize`` themselves import `ucp.deepspeed.auto`.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

from ucp.tested import does_not_import

try:
    import deepspeed
except (ImportError, AttributeError, ValueError) as error:  # what releases raise that torch has left behind
    raise ImportError(does_not_import(error)) from error

from ucp.deepspeed.config import find, parse, with_config
from ucp.deepspeed.engine import EngineUcp, bind
from ucp.deepspeed.live.state import warn
from ucp.deepspeed.supported import TESTED_VERSIONS, check_version
from ucp.elastic.layouts import adapted, fitted
from ucp.job.data_order import GlobalBatches, GlobalOrder

NOT_ENABLED = (
    'this engine is DeepSpeed\'s own: its config has no "ucp": {"enabled": true}, so it saves as DeepSpeed does and '
    'resumes on the layout that saved alone; "enabled": false says that this is meant'
)

# DeepSpeed's own, kept before `ucp.deepspeed.auto` may replace it.
stock_initialize = deepspeed.initialize


def _bound(args: Any, kwargs: Any, *, save_async: bool) -> Any:
    """Call ``deepspeed.initialize``, and bind the engine if its config says so."""
    bound = inspect.signature(stock_initialize).bind_partial(*args, **kwargs)
    given = bound.arguments
    found = find(given.get("args"), given.get("config"), given.get("config_params"))
    early = parse(found)
    what = None
    if early.enabled:
        check_version(early.allow_untested_version, found)
        world = int(os.environ.get("WORLD_SIZE", 1))
        what, fitting = fitted(found, world), adapted(found, world)
        if fitting is not found:
            with_config(given, fitting)
            args, kwargs = bound.args, bound.kwargs
    result = stock_initialize(*args, **kwargs)
    config = parse(result[0]._config._param_dict, save_async=save_async)
    if config.enabled:
        check_version(config.allow_untested_version)
        bind(result[0], config, what)
    elif "enabled" not in config.model_fields_set:
        warn(NOT_ENABLED)
    return result


@functools.wraps(stock_initialize)
def initialize(*args: Any, **kwargs: Any) -> Any:
    """As ``deepspeed.initialize``, but bind the engine if its config says ``"ucp": {"enabled": true}``.

    Returns
    -------
    tuple
        What ``deepspeed.initialize`` returns: engine, optimizer, data loader and lr scheduler.

    Raises
    ------
    Unsupported
        For a DeepSpeed version or an engine that is not supported, by name.
    BadArgument
        For a ``"ucp"`` section that is wrong.
    """
    return _bound(args, kwargs, save_async=True)


@functools.wraps(stock_initialize)
def initialize_for_others(*args: Any, **kwargs: Any) -> Any:
    """As `initialize`, but saves are synchronous unless the config says ``"save": {"async": true}``. Programs that do
    not know of this plugin delete the older checkpoint right after a save."""
    return _bound(args, kwargs, save_async=False)


def attach(engine: Any) -> Any:
    """Bind an engine that exists already, whatever its config's ``enabled`` says.

    Returns
    -------
    DeepSpeedEngine
        The same engine, which now has `EngineUcp` as ``engine.ucp``.

    Raises
    ------
    Unsupported, BadArgument
        As for `initialize`.
    """
    config = parse(engine._config._param_dict)
    check_version(config.allow_untested_version, engine._config._param_dict)
    bind(engine, config)
    return engine


__all__ = ["TESTED_VERSIONS", "EngineUcp", "GlobalBatches", "GlobalOrder", "attach", "initialize"]
