"""Adapts torchtitan 0.3.0 to torch 2.13 and to machines without a GPU.

Each entry states when it can be removed. Nothing else in the project patches libraries, except for
the launcher's agent (``tools/launch.py``).

==============================  ===================================================================
entry                           can be removed when
==============================  ===================================================================
``_use_cpu``                    torchtitan detects the CPU instead of assuming CUDA
``_CpuDevice``                  ``torch.cpu`` has the memory and property calls of ``torch.cuda``
``_shim_set_timeout``           the pinned torch is ≥ 2.14: it has ``dist.set_timeout``
``_allow_hidden_losses``        torchtitan warns only if rank 0 does not log the losses
``_quiet_cpu_meshes``           torch's random operators on DTensors support CPU meshes
``can_pipeline``                the pinned torch is ≥ 2.14: schedules accept split micro-batches
``_ignore_profiler_marks``      selective checkpointing ignores the profiler's operators
``reduce_with_plain_sums``      gloo supports PREMUL_SUM, or torchtitan stops dividing by 1
``light_imports``               torchtitan imports ``datasets``, and compiles, on first use
==============================  ===================================================================
"""

import functools
import importlib
import os
import platform
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan_utils
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import SAC_IGNORED_OPS


def apply() -> None:
    """Patch torchtitan; idempotent, before or after other imports of torchtitan."""
    _use_cpu()
    _shim_set_timeout()
    _allow_hidden_losses()
    _quiet_cpu_meshes()
    _ignore_profiler_marks()


def join_process_group_alone() -> bool:
    """Without a launcher, become a job of one rank; False under a launcher.

    torchtitan needs a process group. This one is in memory: no port, and no environment variables
    that child processes inherit, except LOCAL_RANK, from which torchtitan takes the device.
    """
    if "RANK" in os.environ:
        return False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return True


def can_pipeline() -> bool:
    """True if torch's pipeline schedules accept torchtitan's micro-batches."""
    return torch.__version__ >= "2.14"


def reduce_with_plain_sums(model: nn.Module) -> None:
    """Reduce by plain sums in FSDP: dividing by 1.0 takes PREMUL_SUM, which gloo lacks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def light_imports() -> Iterator[None]:
    """Import torchtitan in this context: 6.7 s of CPU time instead of 10.3, and less memory.

    Its text data import Hugging Face's ``datasets`` (pandas, arrow, aiohttp), and its attention
    calls ``torch.compile``, which imports inductor. Runs use neither; both load on first use.
    """
    late = {name: _LateModule(name) for name in ("datasets", "datasets.distributed")}
    if "datasets" in sys.modules:
        late = {}
    with mock.patch.object(torch, "compile", _compile_late(torch.compile)):
        sys.modules.update(late)
        try:
            yield
        finally:
            for name in late:
                del sys.modules[name]


class _LateModule(ModuleType):
    """Stands in for a module in ``from … import``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LateName(self.__name__, name)


class _LateName:
    """A function or class that is imported when called or used in ``isinstance``."""

    def __init__(self, module: str, name: str):
        self.find = lambda: getattr(importlib.import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.find()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.find())


def _compile_late(compile: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` that compiles a function on its first call."""

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        do = functools.cache(lambda: compile(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: do()(*args, **kwargs))

    return compiled


class _CpuDevice:
    """``torch.cpu`` with the calls that torchtitan makes on a device module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, device: Any = None) -> str:
        return f"CPU ({platform.processor() or platform.machine()})"

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """No effect: the peak of resident memory cannot be reset."""

    def empty_cache(self) -> None:
        """No effect: the CPU allocator has no cache."""


def _use_cpu() -> None:
    if titan_utils.device_type == "cpu" or torch.accelerator.is_available():
        return
    old_type, old_module = titan_utils.device_type, titan_utils.device_module
    cpu = _CpuDevice()
    # torchtitan's modules copy both globals on import: patch every copy
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            if getattr(module, "device_type", None) == old_type:
                module.device_type = "cpu"  # type: ignore[attr-defined]
            if getattr(module, "device_module", None) is old_module:
                module.device_module = cpu  # type: ignore[attr-defined]


def _allow_hidden_losses() -> None:
    """Silence a warning for pipelines: rank 0 logs all metrics."""
    trainer = sys.modules.get("torchtitan.trainer")  # slow to import, not always needed
    if trainer is not None:
        trainer.ensure_pp_loss_visible = lambda **_: None  # type: ignore[attr-defined]


def _quiet_cpu_meshes() -> None:
    warnings.filterwarnings("ignore", "DTensor .* may not have complete support on cpu")


def _ignore_profiler_marks() -> None:
    """FSDP units inside a block emit a profiler mark more in recomputation than in forward, which
    selective checkpointing takes for another computation.
    """
    marks = torch.ops.profiler
    SAC_IGNORED_OPS.update(
        {marks._record_function_enter_new.default, marks._record_function_exit._RecordFunction}
    )


def _shim_set_timeout() -> None:
    if not hasattr(dist, "set_timeout"):
        from torch.distributed import distributed_c10d

        vars(dist)["set_timeout"] = distributed_c10d._set_pg_timeout
