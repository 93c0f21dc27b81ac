"""Adapts torchtitan 0.3.0 to torch 2.13 and to machines without a GPU.

Each entry says which event removes it. Nothing else in the project patches anything, but for the
launcher's agent (``tools/launch.py``).

==============================  ===================================================================
entry                           goes away when
==============================  ===================================================================
``_use_cpu_if_alone``           torchtitan finds the CPU by itself instead of assuming CUDA
``_CpuDevice``                  ``torch.cpu`` has the memory and property calls of ``torch.cuda``
``_shim_set_timeout``           the pinned torch is ≥ 2.14: it has ``dist.set_timeout``
``_losses_are_visible``         torchtitan's trainer warns only where rank 0 does not log the losses
``_quiet_cpu_meshes``           torch's random operators on DTensors know CPU meshes, or torchtitan
                                seeds them only where a model draws from them; none here does
``can_pipeline``                the pinned torch is ≥ 2.14: schedules take micro-batches as they are
``_recompute_past_profiling``   torch leaves the profiler's marks out of what it compares, or FSDP's
                                hooks make as many in backward as in forward
``reduce_with_plain_sums``      gloo supports PREMUL_SUM, or torchtitan stops dividing by 1
``light_imports``               torchtitan imports ``datasets``, and compiles, where it uses them
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
    """Make torchtitan usable here; safe to call again, before or after other torchtitan imports."""
    _use_cpu_if_alone()
    _shim_set_timeout()
    _losses_are_visible()
    _quiet_cpu_meshes()
    _recompute_past_profiling()


def join_process_group_alone() -> bool:
    """Without a launcher, become the only rank of a job of one; False if there is a launcher.

    torchtitan always needs a process group. This one lives in memory: no port, no environment
    variables that a child process could inherit, besides LOCAL_RANK, which torchtitan reads the
    device from.
    """
    if "RANK" in os.environ:
        return False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return True


def can_pipeline() -> bool:
    """Whether torch's pipeline schedules take the micro-batches that torchtitan gives them."""
    return torch.__version__ >= "2.14"


def reduce_with_plain_sums(model: nn.Module) -> None:
    """Let FSDP reduce by plain sums: its division by 1.0 is a PREMUL_SUM, which gloo lacks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def light_imports() -> Iterator[None]:
    """Import torchtitan in here: 6.7 s of CPU time instead of 10.3, and less memory, in every rank.

    Its own text data bring Hugging Face's ``datasets`` (pandas, arrow, aiohttp), and its
    attention is compiled at import, which brings torch's inductor. A run of ours uses neither;
    whoever does gets them at the first use.
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
    """Stands for a module in ``from … import``."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LateName(self.__name__, name)


class _LateName:
    """A function or class that is imported when it is called or asked for its instances."""

    def __init__(self, module: str, name: str):
        self.find = lambda: getattr(importlib.import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.find()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.find())


def _compile_late(compile: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of functions, done when they are first called."""

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
        """The kernel's peak of resident memory cannot be reset."""

    def empty_cache(self) -> None:
        """The CPU allocator keeps no cache of its own."""


def _use_cpu_if_alone() -> None:
    if titan_utils.device_type == "cpu" or torch.accelerator.is_available():
        return
    old_type, old_module = titan_utils.device_type, titan_utils.device_module
    cpu = _CpuDevice()
    # torchtitan's modules copy the two globals when they are imported, so mend every copy
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan."):
            if getattr(module, "device_type", None) == old_type:
                module.device_type = "cpu"  # type: ignore[attr-defined]
            if getattr(module, "device_module", None) is old_module:
                module.device_module = cpu  # type: ignore[attr-defined]


def _losses_are_visible() -> None:
    """Of a pipeline, too: rank 0 logs all metrics. torchtitan would ask for another rank's log."""
    trainer = sys.modules.get("torchtitan.trainer")  # slow to import, and not always needed
    if trainer is not None:
        trainer.ensure_pp_loss_visible = lambda **_: None  # type: ignore[attr-defined]


def _quiet_cpu_meshes() -> None:
    warnings.filterwarnings("ignore", "DTensor .* may not have complete support on cpu")


def _recompute_past_profiling() -> None:
    """FSDP units inside a block mark its recomputation as the root, a mark more than in forward,
    which selective checkpointing takes for another computation.
    """
    marks = torch.ops.profiler
    SAC_IGNORED_OPS.update(
        {marks._record_function_enter_new.default, marks._record_function_exit._RecordFunction}
    )


def _shim_set_timeout() -> None:
    if not hasattr(dist, "set_timeout"):
        from torch.distributed import distributed_c10d

        vars(dist)["set_timeout"] = distributed_c10d._set_pg_timeout
