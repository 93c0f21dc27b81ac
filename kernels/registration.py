"""Registers an op and its backward with ``torch.library`` from one list of its arguments.

The arguments are the fields of a ``NamedTuple``, tensors first. Schemas, fakes and the gradient
follow from it, and implementations take it whole:

    NAME(arguments[, keep]) -> outputs             with ``keeps``, the last output is for backward
    NAME_backward(*gradients of outputs, [kept,] arguments, need) -> {argument: gradient}

``need`` has a bool per tensor argument. An operator cannot return None: an unneeded gradient is an
empty tensor.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema
from torch.utils.flop_counter import register_flop_formula

from earlyfuse.kernels.backend import implementation

_TENSORS = (Tensor, Tensor | None)


def register(
    name: str,
    arguments: Any,
    package: str,
    *,
    fake: Callable[..., Any],
    outputs: int = 1,
    keeps: bool = False,
    flops: tuple[Callable[[Any], int], Callable[[Any, list[bool]], int]],
) -> tuple[CustomOpDef, CustomOpDef]:
    """Registers ``earlyfuse::NAME(*arguments, [keep,] backend)`` and ``earlyfuse::NAME_backward``.

    ``fake(arguments[, keep])`` returns empty outputs. ``flops``: of forward, by the shapes of the
    arguments, and of backward, by these and ``need``.
    """
    fields = get_type_hints(arguments)
    count, tensors = len(fields), sum(kind in _TENSORS for kind in fields.values())
    names = list(fields)[:tensors]
    given = outputs - keeps  # incoming gradients of backward

    def forward(*values: Any) -> Any:
        run = getattr(implementation(package, values[-1]), name)
        return run(arguments(*values[:count]), *values[count:-1])

    def backward(*values: Any) -> list[Tensor]:
        *before, need, backend = values
        inputs, first = before[-count:], before[-count]
        run = getattr(implementation(package, backend), f"{name}_backward")
        found = run(*before[:-count], arguments(*inputs), need)
        return [
            found[of].to(like.dtype).contiguous() if needed else first.new_empty(0)
            for of, like, needed in zip(names, inputs[:tensors], need, strict=True)
        ]

    def backward_fake(*values: Any) -> list[Tensor]:
        inputs, need = values[-count - 2 : -2], values[-2]
        return [
            like.new_empty(like.shape) if needed else inputs[0].new_empty(0)
            for like, needed in zip(inputs[:tensors], need, strict=True)
        ]

    extra = {"keep": bool, "backend": str} if keeps else {"backend": str}
    returns = Tensor if outputs == 1 else tuple.__class_getitem__((Tensor,) * outputs)
    forward_op = _operator(name, forward, {**fields, **extra}, returns)
    incoming = {f"gradient{number}": Tensor | None for number in range(given)}
    kept = {"kept": Tensor} if keeps else {}
    last = {"need": list[bool], "backend": str}
    backward_op = _operator(
        f"{name}_backward", backward, {**incoming, **kept, **fields, **last}, list[Tensor]
    )
    forward_op.register_fake(lambda *values: fake(arguments(*values[:count]), *values[count:-1]))
    backward_op.register_fake(backward_fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.flags, ctx.backend = inputs[tensors:count], inputs[-1]
        if keeps:
            ctx.mark_non_differentiable(output[-1])
            ctx.set_materialize_grads(False)  # else zeros of its size are allocated
            ctx.save_for_backward(output[-1], *inputs[:tensors])
        else:
            ctx.save_for_backward(*inputs[:tensors])

    def gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        if all(dy is None for dy in gradients[:given]):
            return (None,) * len(wanted)
        need = list(wanted[:tensors])
        found = backward_op(*gradients[:given], *ctx.saved_tensors, *ctx.flags, need, ctx.backend)
        used = (dx if needed else None for dx, needed in zip(found, need, strict=True))
        return (*used, *(None for _ in wanted[tensors:]))

    forward_op.register_autograd(gradient, setup_context=setup_context)

    @register_flop_formula(getattr(torch.ops.earlyfuse, name))
    def _(*shapes: Any, **_: Any) -> int:
        return flops[0](arguments(*shapes[:count]))

    @register_flop_formula(getattr(torch.ops.earlyfuse, f"{name}_backward"))
    def _(*shapes: Any, **_: Any) -> int:
        return flops[1](arguments(*shapes[-count - 2 : -2]), shapes[-2])

    return forward_op, backward_op


def _operator(
    name: str, function: Callable[..., Any], parameters: dict[str, Any], returns: Any
) -> CustomOpDef:
    """``function`` as an operator with a schema of these types."""

    def prototype(*_: Any) -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed = [inspect.Parameter(of, kind, annotation=is_a) for of, is_a in parameters.items()]
    prototype.__signature__ = inspect.Signature(typed, return_annotation=returns)  # type: ignore[attr-defined]
    schema = infer_schema(prototype, mutates_args=())
    return custom_op(f"earlyfuse::{name}", function, mutates_args=(), schema=schema)


def needs_gradient(tensors: Sequence[Any]) -> bool:
    """True if autograd records an op on these arguments, so that forward must save tensors."""
    return torch.is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors
    )
