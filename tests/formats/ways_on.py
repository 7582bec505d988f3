"""What another program wrote, converted to each of the forms that this one writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ucp

FORMS: Mapping[str, Mapping[str, Any]] = {
    "universal": {},
    "deepspeed": {"layout": "dp=3,zero=3", "ds_config": {}},
    "dcp": {},
    "huggingface": {},
}


def is_converted(path: Path, truth: Mapping[str, Mapping[str, Tensor]], folder: Path, **reading: Any) -> None:
    """Every weight, and but for the model folder every state, is the truth's after each conversion."""
    for to, options in FORMS.items():
        ucp.convert(path, folder / to, to, **options, **reading)
        with ucp.open(folder / to) as opened:
            for name, states in truth.items():
                wanted = {"param"} if to == "huggingface" else states.keys() - {"step"}
                assert wanted <= opened.parameters[name].states.keys() | opened.parameters[name].scalars.keys(), name
                for state in wanted & opened.parameters[name].states.keys():
                    assert torch.equal(opened.read(name, state), states[state].detach()), (to, name, state)
