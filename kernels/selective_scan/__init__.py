"""The selective scan of Mamba-1 (arXiv 2312.00752, 3.2): a diagonal, input-dependent recurrence.

B batch, L tokens, D channels, N states, G groups of tokens that share a step bias.

================  ===============  =================================================================
argument          shape, dtype     meaning
================  ===============  =================================================================
``u_BLD``         (B, L, D) float  inputs of the scan
``delta_BLD``     (B, L, D) as u   step sizes before bias and softplus
``A_DN``          (D, N) fp32      rates of decay, negative: ``-exp(A_log)``, computed by the caller
``B_BLN``         (B, L, N) as u   weight of the input in each state, the same for all channels
``C_BLN``         (B, L, N) as u   weight of each state in the output
``skip_D``        (D,) fp32        factor of the input in the output (the D of the paper), or none
``z_BLD``         (B, L, D) as u   gate: the output is multiplied by silu(z); or none
``bias_GD``       (G, D) fp32      added to delta in fp32, a row per group of tokens; or none
``group_BL``      (B, L) integer   each token's row of ``bias_GD``; none: there is one row
``reset_BL``      (B, L) bool      true at the first token of a document; or none
``state_BDN``     (B, D, N) fp32   the state before the first token; none: zero
================  ===============  =================================================================

    dt_t = softplus(delta_t + bias[group_t])
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t          the factor of h_{t-1} is 0 where reset_t
    y_t  = (C_t · h_t + skip u_t) silu(z_t)

fp32 stands for fp64 where ``u`` is fp64. Inputs may be slices of wider tensors, read in place where
the last dimension is dense. In Mixture-of-Mamba the bias belongs to a modality: G = modalities,
``group_BL`` = modality ids; no (B, L, D) bias exists. Backends: ``triton`` (CUDA), ``torch`` (fast
on CPU), ``reference`` (the definition). A decoding step is a scan of length 1.
"""

import torch

from earlyfuse.kernels.backend import resolve
from earlyfuse.kernels.checks import FLOATS, INTEGERS, SAME, WIDE, check, check_ids, rules
from earlyfuse.kernels.registration import needs_gradient
from earlyfuse.kernels.selective_scan import op, reference
from earlyfuse.kernels.selective_scan.reference import step_sizes

BACKENDS = ("triton", "torch", "reference")
TRITON_STATES = (16, 32, 64)
_RULES = rules(
    u_BLD=FLOATS,
    delta_BLD=(SAME,),
    A_DN=(WIDE,),
    B_BLN=(SAME,),
    C_BLN=(SAME,),
    skip_D=(WIDE,),
    z_BLD=(SAME,),
    bias_GD=(WIDE,),
    group_BL=INTEGERS,
    reset_BL=(torch.bool,),
    state_BDN=(WIDE,),
)


def selective_scan(
    u_BLD: torch.Tensor,
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    skip_D: torch.Tensor | None = None,
    z_BLD: torch.Tensor | None = None,
    bias_GD: torch.Tensor | None = None,
    group_BL: torch.Tensor | None = None,
    reset_BL: torch.Tensor | None = None,
    state_BDN: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, D) in the dtype of ``u``, and the final state (B, D, N) in that of ``A``.

    Gradients reach every floating-point argument, through both results. No state crosses a reset:
    there the gradient through the decay is exactly 0. Raises ``ValueError`` on wrong shapes,
    dtypes, devices or groups, and on an unavailable backend.
    """
    arguments = op.Scan(
        *(u_BLD, delta_BLD, A_DN, B_BLN, C_BLN),
        *(skip_D, z_BLD, bias_GD, group_BL, reset_BL, state_BDN),
    )
    _check(arguments)
    name = backend_for(backend, A_DN, u_BLD)
    if name == "reference":
        return reference.selective_scan(arguments)
    y_BLD, final_BDN, _ = op.selective_scan(*arguments, needs_gradient(arguments), name)
    return y_BLD, final_BDN


def segment_decay(
    delta_BLD: torch.Tensor,
    A_DN: torch.Tensor,
    bias_GD: torch.Tensor | None = None,
    group_BL: torch.Tensor | None = None,
    reset_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decay of a state over all these tokens (B, D, N): exp(A Σ dt), 0 if one is a reset.

    Joins scans of consecutive segments: final(start) = final(0) + decay · start. Differentiable;
    needs no scan. Shapes as in ``selective_scan``.
    """
    dt_BD = step_sizes(delta_BLD.to(A_DN.dtype), bias_GD, group_BL).sum(1)
    decay_BDN = torch.exp(dt_BD[..., None] * A_DN)
    return decay_BDN if reset_BL is None else decay_BDN * ~reset_BL.any(1)[:, None, None]


def backend_for(requested: str, A_DN: torch.Tensor, u_BLD: torch.Tensor) -> str:
    """Backend of ``selective_scan`` for these tensors; raises ``ValueError`` if it cannot run."""
    states = A_DN.shape[1]
    fits = states in TRITON_STATES
    if requested == "triton" and not fits:
        raise ValueError(
            f"A_DN {tuple(A_DN.shape)} must have N of {', '.join(map(str, TRITON_STATES))} for "
            "backend 'triton'; choose 'torch'"
        )
    return resolve("selective_scan", requested, BACKENDS if fits else BACKENDS[1:], u_BLD)


def _check(of: op.Scan) -> None:
    if of.group_BL is not None and of.bias_GD is None:
        raise ValueError("group_BL needs bias_GD, whose rows it picks; pass both")
    sizes = {} if of.bias_GD is None or of.group_BL is not None else {"G": 1}
    if of.A_DN.numel() == 0 and of.A_DN.shape[-1] == 0:
        raise ValueError(f"A_DN {tuple(of.A_DN.shape)} must have at least one state")
    check(_RULES, of, **sizes)
    if of.group_BL is not None and of.bias_GD is not None:
        check_ids("group_BL", of.group_BL, of.bias_GD.shape[0], "the rows of bias_GD")
