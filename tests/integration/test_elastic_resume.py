"""A checkpoint of any layout resumes on any other with the same rows and losses, and on its own
layout bit for bit.

One process trains six steps of two models, saving every second. Each layout takes its step 2 to the
end, and one process takes the layout's step 4 to the end again.
"""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from elastic_ranks import LAYOUTS, STEPS, WITH_FULL_DISK, config_of, is_hybrid, train
from places import SUPPORT
from ranks import forked, output_of
from tiny_runs import metrics
from toy import make_data

from earlyfuse.parallel.checkpoint.manifest import read_manifest
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model
from earlyfuse.parallel.compat import can_pipeline


def unbroken(root: Path, layout: str) -> Path:
    """The run of one process that a layout takes over."""
    return root / ("alone-hybrid" if is_hybrid(layout) else "alone")


def copy_step(source: Path, target: Path, step: int) -> None:
    name = f"checkpoint/step-{step}"
    shutil.copytree(source / name, target / name)


pytestmark = pytest.mark.slow  # each layout trains three times


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with ``data``, and with the runs of one process."""
    root = tmp_path_factory.mktemp("elastic")
    make_data(root / "data")
    for layout in ("fsdp2", "cp2"):
        train(config_of(unbroken(root, layout), root / "data", layout, alone=True).build())
    return root


@pytest.fixture(scope="module")
def launch(root):
    """Runs all layouts of a number of ranks, once; returns what was printed."""

    @cache
    def launch(ranks: int) -> str:
        names = [name for name, (count, _) in LAYOUTS.items() if count == ranks and runs(name)]
        for name in names:
            copy_step(unbroken(root, name), root / name, 2)
        return output_of(forked(ranks, SUPPORT / "elastic_ranks.py", str(root), *names))

    return launch


def runs(name: str) -> bool:
    return "pp" not in name or can_pipeline()


NO_PIPELINE = pytest.mark.skip("torchtitan 0.3's pipeline schedules need torch 2.14")


def layouts() -> Iterator:
    for name, (ranks, _) in LAYOUTS.items():
        marks = [pytest.mark.slow] * (ranks > 2) + [NO_PIPELINE] * (not runs(name))
        yield pytest.param(name, marks=marks)


@pytest.fixture(params=layouts())
def layout(request, launch) -> str:
    """The name of a layout whose runs are done."""
    launch(LAYOUTS[request.param][0])
    return request.param


def files(folder: Path, step: int) -> dict:
    return read_manifest(folder / "checkpoint" / f"step-{step}").files


def lanes(folder: Path, step: int) -> torch.Tensor:
    """int64 (G, K): where each lane of the data stands, which follows from the rows it gave."""
    checkpoint = folder / "checkpoint" / f"step-{step}"
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {"dataloader": {"lanes": torch.zeros(metadata["dataloader.lanes"].size).long()}}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state["dataloader"]["lanes"]


def assert_same_training(folder: Path, reference: Path, after: int) -> None:
    """Losses of every logged step beyond ``after`` to 1e-5, token counts and lanes exactly."""
    expected = [line for line in metrics(reference) if line["step"] > after]
    found = [line for line in metrics(folder) if line["step"] > after]
    assert [(x["step"], x["kind"]) for x in found] == [(x["step"], x["kind"]) for x in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name in wanted:
            if name.startswith("loss"):
                assert line[name] == pytest.approx(wanted[name], rel=0, abs=1e-5), name
            if name.startswith("tokens"):
                assert line[name] == wanted[name], name
    assert lanes(folder, STEPS).equal(lanes(reference, STEPS))


def test_a_layout_continues_the_run_of_one_process(layout, root):
    assert_same_training(root / layout, unbroken(root, layout), after=2)
    ranks, _ = LAYOUTS[layout]
    assert read_manifest(root / layout / "checkpoint" / "step-4").ranks == ranks


def test_the_parts_of_all_ranks_load_as_one_model(layout, root):
    model, _ = load_model(root / layout)
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load(state, checkpoint_id=root / layout / "checkpoint" / f"step-{STEPS}", no_dist=True)
    assert [
        name for name, tensor in model.state_dict().items() if not tensor.equal(state[name])
    ] == []


def test_one_process_continues_the_run_of_a_layout(layout, root, tmp_path):
    copy_step(root / layout, tmp_path, 4)
    train(config_of(tmp_path, root / "data", layout, alone=True).build())
    assert_same_training(tmp_path, unbroken(root, layout), after=4)


def test_on_its_own_layout_a_resumed_run_is_the_unbroken_one_bit_for_bit(layout, root):
    """This run also skipped a damaged checkpoint, whose step it saves again."""
    assert files(root / f"{layout}-damaged", 6) == files(root / layout, 6)
    assert metrics(root / f"{layout}-damaged") == metrics(root / layout)


def test_a_damaged_file_is_refused_on_all_ranks(layout, root):
    ranks, _ = LAYOUTS[layout]
    refusals = [(root / f"{layout}-damaged" / f"refusal-{r}").read_text() for r in range(ranks)]
    assert all(f"__{ranks - 1}_0.distcp has another SHA-256" in line for line in refusals)


def test_a_full_disk_of_one_rank_costs_one_checkpoint_and_nothing_else(root, launch):
    output, folder = launch(2), root / f"{WITH_FULL_DISK}-full"
    assert sorted(p.name for p in (folder / "checkpoint").glob("step-*")) == ["step-2", "step-6"]
    assert files(folder, 6) == files(root / WITH_FULL_DISK, 6)
    (warning,) = [x for x in output.splitlines() if "warning" in x and str(folder) in x]
    assert "step 4" in warning and "rank 1: [Errno 28] No space left on device" in warning
