"""Traces a step of every model family on fake CUDA tensors: forward, loss, backward, update.

``python tests/support/fake_cuda_trace.py LIBRARY CASE …`` prints a JSON object: case → list of
problems. A problem is an op that mixes devices, copies between host and device, or makes the host
wait for the device. ``LIBRARY`` is ``fake_cuda.cpp``, compiled.

Real CUDA kernels are stood in for by the fakes of our ops and by SDPA for FlexAttention, which
torch compiles.
"""

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

if __name__ == "__main__":
    LIBRARY = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch

import torch
import torch.nn.functional as F
from tiny_runs import DEPTHS, MAMBA_SHAPE, MAMBAS, MODELS, SHAPE, THRESHOLDS, VECTORS, moma
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from earlyfuse.configs import decoders, mamba_decoders
from earlyfuse.models import masks
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks import attention
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.models.objectives.sums import Losses
from earlyfuse.models.objectives.transfusion import TransfusionObjective
from earlyfuse.models.routing.router import CAUSAL_RULES
from earlyfuse.models.routing.running_threshold import RunningThreshold
from earlyfuse.models.routing.token_choice import TokenChoice
from earlyfuse.models.vocabulary import Modality
from earlyfuse.parallel.strategies import gradient_clipping
from earlyfuse.parallel.strategies.gradient_clipping import GradientClipping
from earlyfuse.parallel.training import skip_step
from earlyfuse.parallel.training.skip_step import SkipRule, step_unless_skipped
from earlyfuse.parallel.training.step_metrics import LossMean

ROWS, SEQ_LEN = 2, 256
SPEECH = tuple(Modality)
FAMILIES: dict[str, Callable[[], Decoder.Config]] = (
    MODELS
    | MAMBAS
    | DEPTHS
    | THRESHOLDS
    | {name: VECTORS[name] for name in ("tf_unet", "tf_clean", "tf_mixture_of_mamba")}
    | {
        "dense_dropout": lambda: decoders.dense(replace(SHAPE, dropout=0.1)),
        "moe_1t1i": lambda: decoders.moe_1t1i(SHAPE),
        "moma_speech": lambda: decoders.moma(
            replace(SHAPE, modalities=SPEECH),
            dict.fromkeys(SPEECH, 2),
            dict.fromkeys(SPEECH, 1 / 3),
        ),
        "moma_exact": lambda: decoders.with_routers(moma(), budget="exact"),
        "token_choice_all": lambda: decoders.token_choice(SHAPE, 4),
        "mixture_of_mamba_speech": lambda: mamba_decoders.mixture_of_mamba(
            replace(MAMBA_SHAPE, modalities=SPEECH)
        ),
        "hybrid_moma": lambda: mamba_decoders.hybrid(moma(replace(SHAPE, layers=3)), "ams"),
    }
)


class _Watch(TorchDispatchMode):
    """Notes ops whose tensors lie on different devices; a number on the host may meet any device,
    as CUDA kernels take it as an argument.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [
            leaf
            for leaf in tree_leaves((args, kwargs, out))
            if isinstance(leaf, torch.Tensor) and not (leaf.ndim == 0 and leaf.device.type == "cpu")
        ]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.problems.append(f"{func} meets host and device at {_place()}")
        return out


class _WatchFactories(TorchFunctionMode):
    """Notes tensors made on the device from Python values: a blocking copy from the host."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and out.device.type == "cuda":
            self.watch.problems.append(f"{func.__name__} copies to the device at {_place()}")
        return out


def _place() -> str:
    """The innermost line of the package that is running."""
    ours = [
        frame
        for frame in traceback.extract_stack()
        if "/models/" in frame.filename or "/kernels/" in frame.filename
    ]
    ours = [frame for frame in ours if "site-packages" not in frame.filename]
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "the test"


def _flex_attention(q: Any, k: Any, v: Any, block_mask: Any, enable_gqa: bool) -> torch.Tensor:
    tables = [block_mask.kv_num_blocks, block_mask.kv_indices]
    assert {t.device.type for t in (q, k, v, *tables)} == {"cuda"}
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


def trace(case: str) -> list[str]:
    """Problems of one case: ``family``, ``family:bfloat16``, ``family:spans`` (of vectors, inside
    which attention is bidirectional), ``family:validation``, ``family:causal`` or
    ``family:threshold``.
    """
    family, _, form = case.partition(":")
    config = FAMILIES[family]()
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    watch = _Watch()
    with FakeTensorMode(), torch.device("cuda"):
        model = config.build()
        for module in model.modules():  # fake parameters cannot be cast in place
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.to(dtype)))
        tokens_BS = torch.randint(0, SHAPE.vocab_size, (ROWS, SEQ_LEN))
        modality_BS = (tokens_BS % len(config.modalities)).to(torch.uint8)
        batch = MixedBatch.of(
            tokens_BS, modality_BS, labels_BS=tokens_BS, label_modality_BS=modality_BS
        )
        if form == "spans" or config.vectors:
            batch.has_vector_BS = modality_BS != 0
        if config.vectors:
            batch.vectors_BSP = torch.randn(ROWS, SEQ_LEN, config.vectors.width)
    kind = TransfusionObjective if config.vectors else ChameleonObjective
    objective = kind.Config().build().for_model(config)
    step = ForwardSettings(step=1, step_tokens=ROWS * SEQ_LEN, recording=True)
    validation = ForwardSettings(budgets="exact", recording=True)
    settings = {rule: ForwardSettings(rule=rule) for rule in CAUSAL_RULES}
    settings["validation"] = validation

    try:
        build = partial(_with_spans, ForwardContext.build) if form == "spans" else None
        patched = mock.patch.object(ForwardContext, "build", build) if build else nullcontext()
        with tokens_BS.fake_mode, watch, _WatchFactories(watch), patched:
            batch = objective.prepare(batch, step)
            if form in settings:
                model.eval()
                with torch.no_grad():
                    model(batch, settings[form], loss=objective.loss_of(batch))
            else:
                losses = model(batch, step, loss=objective.loss_of(batch))
                losses.mean(objective.counts(batch)).backward()
                without = [n for n, p in model.named_parameters() if p.grad is None]
                watch.problems += [f"{name} has no gradient" for name in without]
                _finish_step(model, losses)
    except (DataDependentOutputException, DynamicOutputShapeException) as wait:
        line = next(
            frame
            for frame in reversed(traceback.extract_tb(wait.__traceback__))
            if "site-packages" not in frame.filename and frame.filename != __file__
        )
        place = f"{line.filename.rpartition('/')[2]}:{line.name}"
        watch.problems.append(f"the host waits for {wait} in {place}")
    except RuntimeError as error:
        watch.problems.append(f"{type(error).__name__}: {error}"[:500])
    return list(dict.fromkeys(watch.problems))


def _with_spans(build: Callable[..., ForwardContext], *args: Any, **options: Any) -> ForwardContext:
    return build(*args, **(options | {"bidirectional": True, "noised_hidden": True}))


def _finish_step(model: Decoder, losses: Losses) -> None:
    """Runs the trainer's work between backward and the next step."""
    clipping = GradientClipping([list(model.parameters())], 1.0)
    clipping.copies[0, len(clipping.groups[0])] = torch.ones(
        len(clipping.groups[0]), dtype=torch.int64, device="cuda"
    )
    (norm,) = clipping()
    for guard in (False, True):
        rule = SkipRule.Config(spike_guard=guard).build()
        taken = rule.decide(1, losses.sums["loss"].sum(), norm, losses.sums.values())
    LossMean().add(losses.sums, {"labels": norm.new_ones(1, dtype=torch.int64)}, taken)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step_unless_skipped([optimizer], taken)
    for module in model.modules():
        if isinstance(module, TokenChoice):
            module.balance(module.load_E, taken)
        if isinstance(module, RunningThreshold):
            module.update(module.sums_2E, ROWS * SEQ_LEN, taken)


class _NoHostCopy:
    """A copy to the host is read later, when the device has come so far."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device.type == "cuda"


def main(cases: list[str]) -> None:
    LIBRARY.register_guard()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # Triton's ops, by their fakes
    attention._compiled_flex_attention = lambda: _flex_attention
    masks.compiled_create_block_mask = lambda: create_block_mask  # eager: the same tables
    skip_step.HostCopy = _NoHostCopy
    gradient_clipping.dist.get_world_size = lambda: 1  # a CPU build has no NCCL to ask
    print(json.dumps({case: trace(case) for case in cases}), flush=True)
    os._exit(0)  # autograd's device threads cannot end without a device


if __name__ == "__main__":
    main(sys.argv[2:])
