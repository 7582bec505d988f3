"""Universal checkpoints: open, convert and resume any DeepSpeed ZeRO checkpoint on any ZeRO stage and number of ranks.

    import ucp
    with ucp.open(path) as checkpoint:
        checkpoint.read("model.norm.weight", "exp_avg", region=(slice(0, 16),))
    ucp.convert(source, dest)
    ucp.save(state_dict, path); ucp.load(state_dict, path)  # torch.distributed's, as its own checkpoint functions

For live programs there are `ucp.deepspeed`, and `ucp.torchdist` with `ucp.dcp` for torch.distributed. Importing this
package imports neither torch nor numpy. The names below load what they need when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucp import _neighbours
from ucp.lazy import names_of

if TYPE_CHECKING:
    from ucp.catalog import ParameterInfo, ParamGroup, TrainingState
    from ucp.checkpoint import Checkpoint, open  # noqa: A004 (`ucp.open` is the public name, as `gzip.open` is)
    from ucp.conversion import ConversionReport, convert
    from ucp.errors import UcpError
    from ucp.inspection.affine import affine_map
    from ucp.merging.combine import MergeReport, merge
    from ucp.parallel.mesh import Layout
    from ucp.torchdist.digest import digest
    from ucp.torchdist.load import load
    from ucp.torchdist.save import async_save, save
    from ucp.torchdist.training import load_training, save_training

    __version__: str

__all__ = [
    "open",
    "convert",
    "merge",
    "save",
    "async_save",
    "load",
    "digest",
    "save_training",
    "load_training",
    "affine_map",
    "Checkpoint",
    "ConversionReport",
    "Layout",
    "MergeReport",
    "ParameterInfo",
    "ParamGroup",
    "TrainingState",
    "UcpError",
    "__version__",
]

_HOMES = {
    "open": "ucp.checkpoint",
    "Checkpoint": "ucp.checkpoint",
    "convert": "ucp.conversion",
    "merge": "ucp.merging.combine",
    "MergeReport": "ucp.merging.combine",
    "save": "ucp.torchdist.save",
    "async_save": "ucp.torchdist.save",
    "load": "ucp.torchdist.load",
    "digest": "ucp.torchdist.digest",
    "save_training": "ucp.torchdist.training",
    "load_training": "ucp.torchdist.training",
    "affine_map": "ucp.inspection.affine",
    "ConversionReport": "ucp.conversion",
    "Layout": "ucp.parallel.mesh",
    "ParameterInfo": "ucp.catalog",
    "ParamGroup": "ucp.catalog",
    "TrainingState": "ucp.catalog",
    "UcpError": "ucp.errors",
}

_named = names_of("ucp", _HOMES)

_neighbours.refuse_ucx_py()


if not TYPE_CHECKING:  # else any name would be there for a type checker, of any type

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from ucp.version import version

            return version()
        return _named(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
