"""A router defined in this file goes from config to generation, with no other file changed."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import contract_runs
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from tiny_runs import SHAPE, SHARES
from torch import nn
from toy import VOCABULARY, make_data

from earlyfuse.configs import decoders
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.flops import count_parameters, forward_flops
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.init_weights import normal
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.router import Router
from earlyfuse.models.routing.router_stats import RouterStats
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.plan import check_parallelism


class Threshold(Router):
    """A token takes every expert whose score is above one half."""

    @dataclass(kw_only=True, slots=True)
    class Config(Router.Config):
        needs_whole_rows: ClassVar[bool] = False

        expected: float = 1.0

        @property
        def decides_causally(self):
            return True

        @property
        def rows_per_token(self):
            return self.expected

    def __init__(self, config, *, dim, experts, share):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.stats = RouterStats(experts)

    def draws(self):
        return {"weight": normal(10.0)}

    def forward(self, x_TD, eligible_T, context):
        logits_TE = F.linear(x_TD.float(), self.weight)
        taken_TE = logits_TE > 0
        if eligible_T is not None:
            taken_TE = taken_TE & eligible_T[:, None]
        expert_R, row_R = taken_TE.t().nonzero(as_tuple=True)
        offset_G1 = F.pad(taken_TE.sum(0).cumsum(0), (1, 0))
        routes = Routes(row_R, offset_G1, logits_TE[row_R, expert_R].sigmoid())
        if context.settings.recording:
            self.stats.record(logits_TE, eligible_T, routes)
        return routes


def model():
    config = decoders.moma(SHAPE, dict.fromkeys(SHARES, 2), SHARES)
    for _, pool, _, _ in config.traverse(ExpertPool.Config):
        pool.router = Threshold.Config()
    return config


main = contract_runs.on_ranks(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken")
    return tiny_runs.run(contract_runs.config(folder, data, model())), folder


def test_two_ranks_train_as_one_and_count_what_it_counts(tmp_path, data, unbroken, monkeypatch):
    found, lines = contract_runs.trained_on_two_ranks(__file__, tmp_path, data, monkeypatch)
    trainer, folder = unbroken
    for name, value in contract_runs.parameters(trainer).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    for line, expected in zip(lines, contract_runs.lines(folder), strict=True):
        if line["kind"] == "train":
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            place = "router/layer1.pool0/reached"
            assert line[place] == pytest.approx(expected[place], rel=1e-5) and line[place] > 0


def test_a_resumed_run_is_the_unbroken_one(tmp_path, data, unbroken):
    config = contract_runs.config(tmp_path, data, model())
    tiny_runs.run(config, stop_after=contract_runs.STEPS // 2)
    resumed = tiny_runs.state(tiny_runs.run(contract_runs.config(tmp_path, data, model())))
    for name, value in tiny_runs.state(unbroken[0]).items():
        assert torch.equal(resumed[name], value), name


def test_its_cost_is_in_every_estimate(tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # put back afterwards
    moma = decoders.moma(SHAPE, dict.fromkeys(SHARES, 2), SHARES)
    assert count_parameters(model()) == count_parameters(moma)
    assert forward_flops(model(), 32) == forward_flops(moma, 32)
    config = contract_runs.config(tmp_path, data, model())
    config.parallelism.expert_parallel_degree = 2
    page = dry_run.describe("toy", config, ranks=2)
    assert "expert counts" in page and "expert rows" in page


def test_it_generates_since_it_decides_by_the_token_alone(unbroken):
    trained = unbroken[0].model
    written = [
        generate(
            *(trained, VOCABULARY, [[0, 7, 8, 9], [0, 12]]),
            new_tokens=8,
            mode="text",
            sampling=Sampling(temperature=0),
            cache=cache,
        )
        for cache in (True, False)
    ]
    assert written[0] == written[1]


def test_one_that_does_not_say_that_it_is_causal_is_refused_by_name(data, tmp_path, monkeypatch):
    for name in ("decides_causally", "needs_whole_rows"):
        monkeypatch.setattr(Threshold.Config, name, getattr(Router.Config, name))
    built = model().build()
    built.init_states()
    with pytest.raises(
        ValueError, match=r"layers.0.feed_forward.pools.0.router cannot route causal"
    ):
        generate(built, VOCABULARY, [[0, 7]], new_tokens=2, mode="text")
    config = contract_runs.config(tmp_path, data, model())
    parallelism = replace(config.parallelism, context_parallel_degree=2)
    with pytest.raises(ValueError, match=r"layers\[0\].feed_forward: .*text .*\(Threshold\)"):
        check_parallelism(parallelism, config.training, model(), 2)


def test_its_config_is_written_and_read_by_its_name():
    fields = json.loads(json.dumps(decoder_config.to_dict(model())))
    router = fields["layers"][0]["feed_forward"]["pools"][0]["router"]
    assert router == {"kind": "Threshold", "expected": 1.0}
    assert decoder_config.from_dict(fields) == model()
