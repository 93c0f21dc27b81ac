"""The causal convolution in plain PyTorch: a few rows at a time, one pass in cache per tap.

In the time-major layout a tap is the same rows shifted by one, so the convolution is W
multiply-adds of contiguous rows. On a CPU they run over pieces that stay in cache; on CUDA, where a
launch costs more than a pass, over everything at once. A piece's window includes the V inputs
before it; its gradient reaches into the last V rows of the previous piece, so backward walks from
the last piece to the first and carries them: from the final state's gradient to the initial one's.

Pre-activations are not saved: backward recomputes them, in cache.

B rows, L tokens, D channels, W taps, V = W - 1; b rows and n tokens of a piece.
"""

from collections.abc import Sequence

import torch

from earlyfuse.kernels.causal_conv1d.op import Convolution

_aten = torch.ops.aten

PIECE = 1 << 16  # elements: a few such buffers stay in the caches of one core


def causal_conv1d(arguments: Convolution) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, D) and the final state (B, V, D)."""
    x_BLD, weight_DW, bias_D, positions_BL, state_BVD, silu = arguments
    B, L, D = x_BLD.shape
    weight_WD, bias = _taps(x_BLD, weight_DW, bias_D)
    V = weight_WD.shape[0] - 1
    y_BLD = x_BLD.new_empty(B, L, D)
    rows, tokens = _pieces(x_BLD)
    for row in rows:
        for token in tokens:
            window_bmD = _inputs(x_BLD, state_BVD, row, token, V).to(weight_WD.dtype)
            y_bnD = y_BLD[row, token]
            fits = y_BLD.dtype == weight_WD.dtype
            out_bnD = y_bnD if fits else torch.empty_like(y_bnD, dtype=weight_WD.dtype)
            _convolve(out_bnD, window_bmD, weight_WD, bias, _positions(positions_BL, row, token, V))
            if silu:
                _aten.silu.out(out_bnD, out=out_bnD)
            if not fits:
                y_bnD.copy_(out_bnD)
    last = slice(max(L - V, 0), L)
    final_BVD = x_BLD.new_empty(B, V, D)
    final_BVD.copy_(_inputs(x_BLD, state_BVD, slice(0, B), last, V)[:, -V:])
    return y_BLD, final_BVD


def causal_conv1d_backward(
    dy_BLD: torch.Tensor, dfinal_BVD: torch.Tensor, arguments: Convolution, need: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """Gradients of x, weight, bias and initial state."""
    x_BLD, weight_DW, bias_D, positions_BL, state_BVD, silu = arguments
    need_x, need_weight, need_bias, _, need_state = need
    need_inputs, need_parameters = need_x or need_state, need_weight or need_bias
    weight_WD, bias = _taps(x_BLD, weight_DW, bias_D)
    dtype, V = weight_WD.dtype, weight_WD.shape[0] - 1
    dx_BLD = x_BLD.new_empty(x_BLD.shape) if need_inputs else x_BLD.new_empty(0)
    dstate_BVD = dfinal_BVD.new_empty(dfinal_BVD.shape) if need_inputs else x_BLD.new_empty(0)
    dweight_WD = torch.zeros_like(weight_WD)
    dbias = weight_WD.new_zeros(weight_WD.shape[1])
    rows, tokens = _pieces(x_BLD)
    for row in rows:
        carry_bVD = dfinal_BVD[row].to(dtype, copy=True)
        for token in reversed(tokens):
            window_bmD = _inputs(x_BLD, state_BVD, row, token, V).to(dtype)
            positions_bn = _positions(positions_BL, row, token, V)
            dpre_bnD = _pre_activation_gradient(
                dy_BLD[row, token], window_bmD, weight_WD, bias, positions_bn, silu
            )
            dwindow_bmD = torch.zeros_like(window_bmD) if need_inputs else None
            if need_parameters:
                dbias += dpre_bnD.sum((0, 1))
            dweight = dweight_WD if need_parameters else None
            _add_gradients(dwindow_bmD, dweight, dpre_bnD, window_bmD, weight_WD, positions_bn)
            if dwindow_bmD is not None:
                dwindow_bmD[:, dpre_bnD.shape[1] :] += carry_bVD
                dx_BLD[row, token] = dwindow_bmD[:, V:]
                carry_bVD = dwindow_bmD[:, :V].clone()
        if need_inputs:
            dstate_BVD[row] = carry_bVD
    return {
        "x_BLD": dx_BLD,
        "weight_DW": dweight_WD.t(),
        "bias_D": dbias,
        "initial_state_BVD": dstate_BVD,
    }


def _convolve(
    out_bnD: torch.Tensor,
    window_bmD: torch.Tensor,
    weight_WD: torch.Tensor,
    bias_D: torch.Tensor,
    positions_bn: torch.Tensor | None,
) -> None:
    """Bias and all taps of a window into ``out``.

    The farthest tap comes first: a token too early in its document for one tap is too early for all
    farther ones, so its sum so far is set to zero.
    """
    V, n = weight_WD.shape[0] - 1, out_bnD.shape[1]
    torch.mul(window_bmD[:, :n], weight_WD[0], out=out_bnD)
    for back in range(V, 0, -1):
        _clear_early_tokens(out_bnD, positions_bn, back)
        if back > 1:
            out_bnD.addcmul_(window_bmD[:, V - back + 1 :][:, :n], weight_WD[V - back + 1])
    out_bnD.addcmul_(window_bmD[:, V:], weight_WD[V]).add_(bias_D)


def _pre_activation_gradient(
    dy_bnD: torch.Tensor,
    window_bmD: torch.Tensor,
    weight_WD: torch.Tensor,
    bias_D: torch.Tensor,
    positions_bn: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """A piece's gradient before the activation, in memory of its own."""
    if not silu:
        return torch.empty_like(
            dy_bnD, dtype=weight_WD.dtype, memory_format=torch.contiguous_format
        ).copy_(dy_bnD)
    dy_bnD = dy_bnD.to(weight_WD.dtype)
    pre_bnD = torch.empty_like(dy_bnD, memory_format=torch.contiguous_format)
    _convolve(pre_bnD, window_bmD, weight_WD, bias_D, positions_bn)
    return _aten.silu_backward.grad_input(dy_bnD, pre_bnD, grad_input=pre_bnD)


def _add_gradients(
    dwindow_bmD: torch.Tensor | None,
    dweight_WD: torch.Tensor | None,
    dpre_bnD: torch.Tensor,
    window_bmD: torch.Tensor,
    weight_WD: torch.Tensor,
    positions_bn: torch.Tensor | None,
) -> None:
    """Adds a piece's gradients of its window and of the weights; overwrites ``dpre``.

    The nearest tap comes first, and tokens too early for the next tap drop out.
    """
    V, n = weight_WD.shape[0] - 1, dpre_bnD.shape[1]
    for back in range(V + 1):
        if back:
            _clear_early_tokens(dpre_bnD, positions_bn, back)
        tokens = slice(V - back, V - back + n)
        if dweight_WD is not None:
            dweight_WD[V - back] += (dpre_bnD * window_bmD[:, tokens]).sum((0, 1))
        if dwindow_bmD is not None:
            dwindow_bmD[:, tokens].addcmul_(dpre_bnD, weight_WD[V - back])


def _clear_early_tokens(
    rows_bnD: torch.Tensor, positions_bn: torch.Tensor | None, back: int
) -> None:
    """Zeroes in place the tokens with fewer than ``back`` of their document before them."""
    if positions_bn is None:
        return
    early_bn = positions_bn < back
    if rows_bnD.device.type == "cpu":  # few: each document's first tokens
        early_N = early_bn.flatten().nonzero().squeeze(1)
        rows_bnD.view(early_bn.numel(), rows_bnD.shape[2]).index_fill_(0, early_N, 0.0)
    else:
        rows_bnD.masked_fill_(early_bn[..., None], 0.0)


def _positions(
    positions_BL: torch.Tensor | None, row: slice, token: slice, V: int
) -> torch.Tensor | None:
    """A piece's positions; None if no tap crosses a start, which only a CPU can tell for free."""
    if positions_BL is None:
        return None
    positions_bn = positions_BL[row, token]
    if positions_bn.device.type == "cpu" and not (positions_bn < V).any():
        return None
    return positions_bn


def _inputs(
    x_BLD: torch.Tensor, state_BVD: torch.Tensor | None, row: slice, token: slice, V: int
) -> torch.Tensor:
    """A piece's inputs and the V before them: (b, V + n, D)."""
    if token.start >= V:
        return x_BLD[row, token.start - V : token.stop]
    x_bnD = x_BLD[row, : token.stop]
    if state_BVD is None:
        before_bVD = x_BLD.new_zeros(x_bnD.shape[0], V, x_bnD.shape[2])
    else:
        before_bVD = state_BVD[row]
    return torch.cat([before_bVD, x_bnD], 1)[:, token.start :]


def _pieces(x_BLD: torch.Tensor) -> tuple[list[slice], list[slice]]:
    """Slices of rows and of tokens: a piece is one of each."""
    B, L, D = x_BLD.shape
    if x_BLD.device.type != "cpu":
        return [slice(0, B)], [slice(0, L)]
    n = min(max(PIECE // max(D, 1), 16), max(L, 1))
    b = max(PIECE // (L * D), 1) if n == L and D else 1
    return _slices(B, b), _slices(L, n)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _taps(
    x_BLD: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as rows (W, D), and the bias or zeros, in the type that is computed in."""
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    weight_WD = weight_DW.t().contiguous().to(dtype)
    bias = weight_WD.new_zeros(weight_WD.shape[1]) if bias_D is None else bias_D.to(dtype)
    return weight_WD, bias
