"""What Megatron-Core asks of ``torch.cuda``, answered for a processor. For processes of its own: torch is changed."""

from __future__ import annotations

from typing import Any

import torch


class _Nothing:
    """A stream or an event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _legacy(dtype: torch.dtype) -> type:
    """A class like torch.cuda.FloatTensor, whose instances are the tensors of this type."""

    class Meta(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor) and value.dtype == dtype

    class Legacy(metaclass=Meta):
        def __new__(cls, *args: Any) -> Any:
            if len(args) == 1 and isinstance(args[0], (list, tuple)):
                return torch.tensor(args[0], dtype=dtype)
            return torch.empty(*args, dtype=dtype)

    return Legacy


def without_compiler() -> None:
    """Megatron compiles small functions. Its import takes three times as long with torch's compiler, and each rank
    would compile them anew. Call it before Megatron is imported."""

    def plain(function: Any = None, **_: Any) -> Any:
        return plain if function is None else function

    torch.compile = plain  # type: ignore[assignment]


def stand_in() -> None:
    """Let everything that asks for a GPU have the processor."""
    without_compiler()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.is_initialized = lambda: False
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Stream = cuda.Event = cuda.stream = cuda.current_stream = cuda.default_stream = _Nothing
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.HalfTensor, cuda.BFloat16Tensor = _legacy(torch.float16), _legacy(torch.bfloat16)
    cuda.FloatTensor, cuda.LongTensor = _legacy(torch.float32), _legacy(torch.int64)
    cuda.IntTensor, cuda.ByteTensor = _legacy(torch.int32), _legacy(torch.uint8)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    _name_types_of_cuda()
    _allocate_on_the_processor()
    import megatron.core.tensor_parallel.random as generators
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    multi_latent_attention.TELinear = type("TELinear", (), {})  # a class that nothing is of
    moe_utils.te_general_gemm = None  # which 0.16.1 forgets to define where Transformer Engine isn't there
    generators._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _name_types_of_cuda() -> None:
    real: Any = torch.Tensor.type

    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return real(self).replace("torch.", "torch.cuda.")
        return real(self, *(a.replace("torch.cuda.", "torch.") if isinstance(a, str) else a for a in args), **kwargs)

    torch.Tensor.type = named  # type: ignore[method-assign]


def _allocate_on_the_processor() -> None:
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn"):
        real = getattr(torch, name)

        def made(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if "cuda" in str(kwargs.get("device", "")):
                kwargs["device"] = "cpu"
            return _real(*args, **kwargs)

        setattr(torch, name, made)
