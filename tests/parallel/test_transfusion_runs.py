"""Runs of Transfusion: resumed, without images, without text, on other data, read and compared."""

import re
from dataclasses import replace

import pytest
import torch
from tiny_runs import SHAPE, VECTORS, changed, metrics, run, state, tiny_config, with_vectors
from toy import VECTOR_VOCABULARY, make_data

from earlyfuse.configs import decoders
from earlyfuse.configs.transfusion import JIT, PAPER
from earlyfuse.models.objectives.next_token import ChameleonObjective
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("vectors") / "data", vocabulary=VECTOR_VOCABULARY)


def config(folder, data, name="tf_moma", **fields):
    return changed(tiny_config(folder, data, VECTORS[name]()), fields)


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path, vectors):
    name = "tf_moma"
    fields = {"ema.decay": 0.9}
    whole = run(config(tmp_path / "whole", vectors, name, **fields))
    run(config(tmp_path / "parts", vectors, name, **fields), stop_after=3)
    resumed = run(config(tmp_path / "parts", vectors, name, **fields))
    for key, value in state(whole).items():
        assert torch.equal(value, state(resumed)[key]), key
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in one.items() if "loss" in k} == {
            k: v for k, v in other.items() if "loss" in k
        }


@pytest.mark.parametrize("source", ["text", "pairs"])
def test_a_run_without_images_and_one_of_images_alone(tmp_path, vectors, source):
    one = config(tmp_path / "run", vectors, "tf_dense")
    one.data.shares, one.dataloader.media_share = {source: 1.0}, None
    run(one)
    for line in metrics(tmp_path / "run"):
        if line["kind"] == "train":
            assert line["loss"] > 0
            assert ("diffusion_loss/image" in line) == (source == "pairs")


def test_the_checkpoint_holds_the_adapters_and_the_diffusion(tmp_path, vectors):
    trainer = run(config(tmp_path / "run", vectors, "tf_unet"))
    model, vocabulary = load_model(tmp_path / "run")
    assert model.config == trainer.model.config and vocabulary.media[0].continuous
    for name, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_a_checkpoint_of_another_diffusion_is_refused_by_name(tmp_path, vectors):
    """The same parameters, which would predict something else."""
    folder = tmp_path / "run"
    small = decoders.dense(SHAPE)
    run(tiny_config(folder, vectors, with_vectors(small, diffusion=JIT)), stop_after=3)
    other = replace(JIT, predicts="v")
    for diffusion, field in ((other, "predicts"), (PAPER, "schedule")):
        with pytest.raises(ValueError, match=re.escape(field)):
            run(tiny_config(folder, vectors, with_vectors(small, diffusion=diffusion)))


def test_objective_data_and_model_must_agree(tmp_path, vectors, data):
    one = config(tmp_path / "a", vectors, "tf_dense")
    one.loss = ChameleonObjective.Config()
    with pytest.raises(ValueError, match="TransfusionObjective"):
        run(one)
    with pytest.raises(ValueError, match="vectors"):
        run(config(tmp_path / "b", data, "tf_dense"))
    with pytest.raises(ValueError, match="vectors"):
        run(tiny_config(tmp_path / "c", vectors, decoders.dense(SHAPE)))
    assert not (tmp_path / "a" / "checkpoint").exists()
