"""Runs of depth-routed models: logged, validated, saved, resumed, read and generated from."""

from functools import cache

import pytest
import torch
from tiny_runs import DEPTHS, metrics, run, state, tiny_config
from toy import VOCABULARY

from earlyfuse.models.generate.session import generate
from earlyfuse.parallel.checkpoint.open_checkpoint import load_model

# the losses under rules of inference that validation reports
RULES = {
    "mod": {"causal"},
    "moma_mod": {"causal"},
    "p_mod": set(),  # its selection compares tokens of an image with later ones
    "gamma_mod": {"causal"},
    "videollm_mod": set(),
    "depth_threshold": {"threshold"},
    "static": set(),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """Name of a model → its run of three steps, and the trainer."""
    folder = tmp_path_factory.mktemp("depths")

    @cache
    def trained(name: str):
        config = tiny_config(folder / name, data, DEPTHS[name](), steps=3)
        return folder / name, run(config)

    return trained


@pytest.mark.parametrize("name", DEPTHS)
def test_a_run_logs_what_its_layers_keep_and_the_loss_of_each_rule(trained, name):
    folder, trainer = trained(name)
    lines = metrics(folder)
    (last,) = [line for line in lines if line["kind"] == "train" and line["step"] == 3]
    for index, layer in enumerate(trainer.model.config.layers):
        if layer.depth is not None:
            assert 0 < last[f"depth/layer{index}/kept"] <= 1
    held_out = [line for line in lines if line["kind"] == "validation"][-1]
    found = {rule for rule in ("causal", "threshold") if f"{rule}_loss" in held_out}
    assert found == RULES[name]


@pytest.mark.parametrize("name", DEPTHS)
def test_a_checkpoint_is_read_and_generated_from(trained, name):
    folder, trainer = trained(name)
    model, _ = load_model(folder)
    saved = trainer.model.state_dict()
    assert all(value.equal(saved[key]) for key, value in model.state_dict().items())
    if name == "static":  # its experts have no causal routers
        with pytest.raises(ValueError, match="it has no causal router and no thresholds"):
            generate(model, VOCABULARY, [[0, 6]], new_tokens=8)
        return
    texts = generate(model, VOCABULARY, [[0, 6], [0, 3, 33, 34, 35, 36, 4]], new_tokens=8)
    assert all(0 < len(text) <= 8 for text in texts)


@pytest.mark.parametrize("name", ["gamma_mod", "depth_threshold"])
def test_a_resumed_run_is_the_unbroken_one(trained, data, tmp_path, name):
    folder, trainer = trained(name)
    config = tiny_config(tmp_path, data, DEPTHS[name](), steps=3)
    config.checkpoint.interval = 2
    run(config, stop_after=2)
    resumed = state(run(config))
    expected = state(trainer)
    assert expected.keys() == resumed.keys()
    assert [key for key, value in expected.items() if not resumed[key].equal(value)] == []
    assert metrics(tmp_path)[-1] == metrics(folder)[-1]


def test_without_a_cache_a_rule_that_knows_the_prompt_is_refused(trained):
    for name in ("p_mod", "gamma_mod"):
        model, _ = load_model(trained(name)[0])
        with pytest.raises(ValueError, match=r"cache \(False\) must be True.*depth.router"):
            generate(model, VOCABULARY, [[0, 6]], new_tokens=2, cache=False)


@torch.no_grad()
def test_cached_and_uncached_documents_are_the_same_where_every_token_decides_alike(trained):
    for name in ("mod", "moma_mod", "depth_threshold"):
        model, _ = load_model(trained(name)[0])
        prompts = [[0, 6, 7], [0, 3, 33, 34, 35, 36, 4, 9]]
        found = [
            generate(model, VOCABULARY, prompts, new_tokens=8, cache=cached)
            for cached in (True, False)
        ]
        assert found[0] == found[1]
