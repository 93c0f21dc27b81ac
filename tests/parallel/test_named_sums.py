"""A sum that an objective adds is in metrics.jsonl, TensorBoard, console and curves by itself."""

import pytest
import torch
from places import SUPPORT
from ranks import forked, output_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import metrics
from toy import make_data

from earlyfuse.parallel.reporting.plots import added_sums
from earlyfuse.parallel.training.step_metrics import losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and output of the same run on one rank and on two."""
    folder = tmp_path_factory.mktemp("sums")
    data = make_data(folder / "data")
    found = {}
    for ranks in (1, 2):
        process = forked(ranks, SUPPORT / "sum_ranks.py", str(folder / str(ranks)), str(data))
        found[ranks] = folder / str(ranks), output_of(process)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_added_sum_is_logged_by_modality_and_source(runs, ranks):
    folder, output = runs[ranks]
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    lines = metrics(folder)
    for line in lines:
        names = ("top1", "top1/text", "top1/image", "top1_by_source/text", "loss_by_source/pairs")
        for key in names:
            assert line[key] >= 0 and f"{line['kind']}/{key}" in events.Tags()["scalars"]
        assert line["top1"] <= 1
    assert "| top1 0." in output and "by source text" in output
    assert added_sums(lines) == ["top1"]
    assert (folder / "loss_curves.png").exists()


def test_sums_of_two_ranks_are_those_of_one(runs):
    one, two = (metrics(runs[ranks][0]) for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        for key in a:
            if key.startswith(("loss", "top1", "z_loss")):
                assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_sources_add_up_to_the_whole():
    sums = {"loss": torch.tensor([[2.0, 6.0, 0.0], [4.0, 0.0, 0.0]])}
    counts = {"loss": torch.tensor([[2, 3, 0], [1, 0, 0]])}
    found = losses(sums, counts, ["a", "b"])
    assert found == {
        "loss": 2.0,
        "loss/text": 2.0,
        "loss/image": 2.0,
        "loss_by_source/a": 8 / 5,
        "loss_by_source/b": 4.0,
    }
