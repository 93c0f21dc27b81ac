"""Helpers of all Triton implementations: interpreter, autotuning, launches.

Needs Triton: import it from Triton modules only.

Triton's interpreter stores bf16 as raw bits and computes nonsense with them, so kernels convert to
``compute_type`` when they load; on a GPU that is the dtype of the data. The interpreter has no
clock either, so it takes the first configuration of a list.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
P = ParamSpec("P")
T = TypeVar("T")

TL_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Type to which a kernel converts loaded values of ``dtype`` before ``tl.dot``."""
    return tl.float32 if INTERPRETED else TL_TYPES[dtype]


class _FirstConfig:
    """A kernel with one configuration, launched like an autotuned one."""

    def __init__(self, kernel: Any, config: triton.Config) -> None:
        self.fn, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            arguments = {**kwargs, **self.config.kwargs}
            if self.config.pre_hook is not None:
                positional = dict(zip(self.fn.arg_names, args, strict=False))
                self.config.pre_hook(positional | arguments)
            return self.fn[grid](*args, **arguments)

        return launch


def tuned(
    configs: Sequence[triton.Config], key: Sequence[str], **options: Any
) -> Callable[[Any], Any]:
    """``triton.autotune``; in the interpreter, ``configs[0]``."""
    if INTERPRETED:
        return lambda kernel: _FirstConfig(kernel, configs[0])
    return triton.autotune(configs=list(configs), key=list(key), **options)


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates ``function`` to run with its first tensor's device as the current one, on which
    Triton launches.
    """

    @functools.wraps(function)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(_first_tensor(args)):
            return function(*args, **kwargs)

    return launch


def _first_tensor(values: Any) -> Any:
    """First tensor among the values, or in an op's arguments (a tuple) among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, tuple):
            return value[0]
    raise ValueError("no tensor among the arguments of a launch")


def launcher(function: Callable[P, T]) -> Callable[P, T]:
    """``on_its_device`` for kernels that need contiguous tensors, which it makes."""

    @functools.wraps(function)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        packed: Any = (
            type(v)(*map(_packed, v)) if isinstance(v, tuple) else _packed(v) for v in args
        )
        return function(*packed, **kwargs)

    return on_its_device(launch)


def _packed(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def product_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: fp32 products follow torch's setting."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
