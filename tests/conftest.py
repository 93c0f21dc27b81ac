"""Shared fixtures and settings: one thread, Triton's interpreter where there is no GPU, test order,
uninitialised memory filled with NaN.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from raw_shards import prepared, raw  # noqa: F401  fixtures
from toy import make_data

# of kernels, of jobs under faults and a launcher, of collectives counted on ranks
SLOW_FIXTURES = {"compiled", "story", "started_twice", "counted_on_ranks"}
# minutes each: they go first, so that no worker is left alone with one of them
LONGEST = (
    "test_soak.py",
    "test_faults.py",
    "test_ranks.py",
    "test_kernels_compiled.py",
    "test_hosts.py",
    "test_elastic_resume.py",
    "test_training.py",
    "test_traffic.py",
    "test_exit.py",
    "test_rank_logs.py",
    "test_study.py",
    "test_sequence_parallel.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests by file, the longest first; tests of a fixture that takes minutes are slow."""
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run in parallel workers; more threads in each would only contend."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Destroy the process group of a single-process trainer before the next file."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data, prepared once: read, not written to."""
    return make_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN, so that reading uninitialised memory shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill_before
    torch.use_deterministic_algorithms(before)
