"""Any config on any data: ids, modalities, vectors and budgets are those of the data."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import DEPTHS, MODELS, VECTORS, changed, run, tiny_config
from tiny_sources import loader, steps, write_source

from earlyfuse.data.atomic import atomic_write_json
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.training.data_config import DataSet

IMAGE = MediaCodes(Modality.IMAGE, 50, 16, begin=3, end=4, block=4)
SPEECH = MediaCodes(Modality.SPEECH, 66, 8, begin=5, end=6)
TEXT_ALONE = Vocabulary(size=50, bos=0, eos=1, pad=2)
WITH_SPEECH = Vocabulary(size=74, bos=0, eos=1, pad=2, media=(IMAGE, SPEECH))
DOCUMENTS = {
    "text": [0, *range(10, 30), 1],
    "pairs": [0, 3, 50, 51, 52, 53, 4, 12, 13, 1],
    "talks": [0, 14, 15, 5, *range(66, 74), 66, 6, 1],
}


def make_data(folder, vocabulary, names):
    for split, count in (("train", 30), ("validation", 5)):
        for name in names:
            documents = [DOCUMENTS[name]] * count
            write_source(folder / split / name, documents, 1, {}, vocabulary)
    (folder / "tokenizers").mkdir()
    atomic_write_json(folder / "tokenizers" / "vocabulary.json", vocabulary.to_dict())
    return folder


@pytest.fixture
def speech(tmp_path):
    return make_data(tmp_path / "speech", WITH_SPEECH, DOCUMENTS)


@pytest.fixture
def text(tmp_path):
    return make_data(tmp_path / "text", TEXT_ALONE, ["text"])


def config_of(tmp_path, data, model, **fields):
    config = tiny_config(tmp_path / "run", data, model)
    fields = {"data.shares": {}, "dataloader.media_share": None} | fields
    return changed(config, fields)


def model_of(config):
    return DataSet(config.data).resolve(config, 1).model_spec.model


def test_a_model_of_two_modalities_trains_on_three_of_another_vocabulary(
    tmp_path, speech, text, capsys
):
    off = {
        "training.steps": 1,
        "training.seq_len": 96,
        "validator.enable": False,
        "sampler.enable": False,
    }
    config = config_of(tmp_path, speech, MODELS["moma"](), **off)
    trained = run(config)
    assert trained.model.config.vocab_size == len(trained.model.tok_embeddings.weight) == 74
    assert (trained.tokens_M > 0).tolist()[:3] == [True] * 3
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["model_spec"]["model"]
    assert (kept["vocab_size"], kept["modalities"]) == (74, [0, 1, 2])
    said = capsys.readouterr().out
    assert "74 ids (config: 48); text, image, speech (config: text, image)" in said
    assert re.search(r"talks: .* 32% of the run, 0\.272 epochs", said.partition("step 1")[0])
    assert f"{speech}: " in said
    config.data.folder = str(text)
    with pytest.raises(ValueError, match=r"vocab_size|modalities|data of the data"):
        run(changed(config, {"training.steps": 2}))


def test_a_model_has_a_group_for_each_modality_of_the_data_and_no_other(tmp_path, speech, text):
    three, one = (model_of(config_of(tmp_path, d, MODELS["mot"]())) for d in (speech, text))
    assert three.modalities == (0, 1, 2) and one.modalities == (0,)
    sets = [(x.attention.groups, x.feed_forward.groups, x.norm_groups) for x in three.layers]
    assert sets == [(3, 3, 3)] * 2 and one.layers[0].attention.groups == 1
    assert one == replace(MODELS["dense"](), vocab_size=50, modalities=(0,))
    routed = model_of(config_of(tmp_path, speech, DEPTHS["gamma_mod"]())).layers[0].depth
    assert routed is None or routed.selection.competing != (1,)
    for data, model, said in (
        (text, DEPTHS["p_mod"](), "the data have text, and the model cannot: depth selects among"),
        (speech, MODELS["token_choice"](), r"router.serves of the all experts names modality"),
        (text, VECTORS["tf_dense"](), r"vectors \(of width 12\) need data with continuous"),
    ):
        with pytest.raises(ValueError, match=said):
            model_of(config_of(tmp_path, data, model))


def test_budgets_of_experts_are_those_of_the_tokens_that_are_read(tmp_path, speech):
    def budgets(**fields):
        model = model_of(config_of(tmp_path, speech, MODELS["moma"](), **fields))
        pools = [pool for _, pool, _, _ in model.layers[1].traverse(ExpertPool.Config)]
        return {pool.name: pool.share for pool in pools}

    tokens = np.concatenate(list(DOCUMENTS.values()))
    media = {"image": (50, 66), "speech": (66, 74)}
    expected = {
        label: ((low <= tokens) & (tokens < high)).mean() for label, (low, high) in media.items()
    }
    found = budgets()
    assert found == pytest.approx(expected | {"text": 1 - sum(expected.values())}, abs=1e-4)
    # with a quota, what the loader draws then
    names = {str(speech / "train" / name): 1 / 3 for name in DOCUMENTS}
    quota = budgets(
        **{"dataloader.media_share": 0.45, "data.shares": dict.fromkeys(DOCUMENTS, 1 / 3)}
    )
    drawn = steps([loader(names, local=8, media_share=0.45, prefetch=0)], 30)
    modality = torch.cat([batch["modality_BS"][batch["document_BS"] > 0] for batch in drawn])
    for group, label in enumerate(("text", "image", "speech")):
        assert quota[label] == pytest.approx((modality == group).float().mean().item(), abs=0.03)


def test_a_dry_run_is_of_the_model_that_the_data_make(tmp_path, speech):
    config = config_of(tmp_path, speech, MODELS["moma"]())
    page = dry_run.describe("tiny", config, 1)
    assert "speech tokens use" in page and "74 ids (config: 48)" in page
    config.data.folder = ""
    page = dry_run.describe("tiny", config, 1)
    assert "speech tokens use" not in page and "30 codes at most" in page
