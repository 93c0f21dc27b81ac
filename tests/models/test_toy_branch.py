"""A branch defined in this file goes from config to generation, with no other file changed."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import contract_runs
import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from tiny_runs import SHAPE
from torch import nn
from toy import VOCABULARY, make_data

from earlyfuse.configs import decoders
from earlyfuse.models.blocks.branch import Branch, Matrix
from earlyfuse.models.flops import count_parameters, training_flops
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.init_weights import constant, normal
from earlyfuse.models.routing.router_stats import Statistics
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.models.upcycle import upcycle
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.plan import check_parallelism


class TokenShift(Branch):
    """A token and the one before it, mixed by a gate, through one matrix."""

    @dataclass(kw_only=True, slots=True)
    class Config(Branch.Config):
        dim: int

        supports: ClassVar = ("decoding",)

        def matrices(self):
            return [Matrix(self.dim, self.dim)]

        def vectors(self):
            return [(self.dim, 1)]

        def saved(self, batch):
            return 3 * self.dim

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(config.dim))
        self.out = nn.Parameter(torch.empty(config.dim, config.dim))
        self.gates = GateStats()

    def draws(self):
        return {"gate": constant(0.5), "out": normal(residual=True)}

    def forward(self, x_TD, context):
        x_BSD = x_TD.unflatten(0, (context.rows, context.seq_len))
        if context.cache is None:
            before_BSD = F.pad(x_BSD, (0, 0, 1, 0))[:, :-1]
        else:
            before_BSD = context.cache.state(self, LastToken).shift(x_BSD)
        before_BSD = before_BSD.masked_fill((context.place_BS == 0).unsqueeze(-1), 0)
        if context.settings.recording:
            self.gates.add(self.gate.detach().mean(), torch.ones(()))
        return F.linear(torch.lerp(x_BSD, before_BSD, self.gate).flatten(0, 1), self.out)


class LastToken:
    """Decode state: the last real token of each row."""

    def __init__(self, cache):
        self.cache, self.last_B1D = cache, None

    def shift(self, x_BSD):
        before = torch.zeros_like(x_BSD[:, :1]) if self.last_B1D is None else self.last_B1D
        both = torch.cat([before, x_BSD], 1)
        self.last_B1D = both[torch.arange(len(both)), self.cache.real_B].unsqueeze(1)
        return both[:, :-1]

    def select(self, row_R):
        self.last_B1D = self.last_B1D[row_R]


class GateStats(Statistics):
    kind = "shift"

    def __init__(self):
        super().__init__(sums=2)

    def summary(self):
        total, count = self.sums_K.tolist()
        return {"gate": total / max(count, 1)}


class Silent(TokenShift):
    """Says nothing of what it cannot do."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenShift.Config):
        supports: ClassVar = ()


def model(kind=TokenShift):
    config = decoders.moe_1t1i(SHAPE)
    for layer in config.layers:
        layer.extra_branches = {"shift": kind.Config(dim=SHAPE.dim)}
    return config


main = contract_runs.on_ranks(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken")
    return tiny_runs.run(contract_runs.config(folder, data, model())), folder


def test_it_runs_between_attention_and_feed_forward_under_its_name():
    block = model().build().layers["0"]
    assert block.branches == ("attention", "shift", "feed_forward")
    names = dict(block.named_parameters())
    assert {"shift_norm.weight", "shift.gate", "shift.out"} < names.keys()


def test_two_ranks_train_as_one_and_count_what_it_counts(tmp_path, data, unbroken, monkeypatch):
    found, lines = contract_runs.trained_on_two_ranks(__file__, tmp_path, data, monkeypatch)
    trainer, folder = unbroken
    for name, value in contract_runs.parameters(trainer).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(found["layers.0.shift.gate"], torch.full((SHAPE.dim,), 0.5))
    for line, expected in zip(lines, contract_runs.lines(folder), strict=True):
        if line["kind"] == "train":
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            for place in ("layer0", "layer1"):
                gate = line[f"shift/{place}/gate"]
                assert gate == pytest.approx(expected[f"shift/{place}/gate"], rel=1e-5)
                assert 0.3 < gate < 0.7


def test_a_resumed_run_is_the_unbroken_one(tmp_path, data, unbroken):
    config = contract_runs.config(tmp_path, data, model())
    tiny_runs.run(config, stop_after=contract_runs.STEPS // 2)
    resumed = tiny_runs.state(tiny_runs.run(contract_runs.config(tmp_path, data, model())))
    for name, value in tiny_runs.state(unbroken[0]).items():
        assert torch.equal(resumed[name], value), name


def test_its_cost_is_in_every_estimate(tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # put back afterwards
    own = model().layers[0].extra_branches["shift"]
    without = decoders.moe_1t1i(SHAPE)
    total = count_parameters(model()).total
    assert total == sum(p.numel() for p in model().build().parameters())
    norms = SHAPE.layers * SHAPE.dim
    assert total - count_parameters(without).total == SHAPE.layers * own.parameters() + norms
    more = training_flops(model(), 32)[0] - training_flops(without, 32)[0]
    assert more == SHAPE.layers * 6 * SHAPE.dim**2
    page = dry_run.describe("toy", contract_runs.config(tmp_path, data, model()), ranks=2)
    assert f"{total / 1e3:.4g} k parameters" in page


PROMPTS = [[0, 7, 8, 9], [0, 12]]


def test_it_writes_with_its_state_what_it_writes_without():
    built = model().build()
    built.init_states()
    with torch.no_grad():
        for block in built.layers.values():
            block.shift.out.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        built.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    sampling, options = Sampling(temperature=0.5), {"new_tokens": 20, "mode": "text"}
    written = [
        generate(built, VOCABULARY, PROMPTS, sampling=sampling, cache=cache, **options)
        for cache in (True, False)
    ]
    assert written[0] == written[1] and sum(map(len, written[0])) > 10


def test_what_it_does_not_say_is_refused_by_its_name(data, tmp_path):
    silent = model(Silent)
    built = silent.build()
    built.init_states()
    words = r"layers\[0\].shift: Silent does not say how it works with decoding"
    with pytest.raises(ValueError, match=words):
        generate(built, VOCABULARY, PROMPTS, new_tokens=2, mode="text")
    config = contract_runs.config(tmp_path, data, silent)
    for axis in ("tensor", "context"):
        parallelism = replace(config.parallelism, **{f"{axis}_parallel_degree": 2})
        words = rf"{axis}_parallel_degree \(2\) must be 1: layers\[0\].shift: Silent .* {axis} par"
        with pytest.raises(ValueError, match=words):
            check_parallelism(parallelism, config.training, silent, 2)


def test_its_config_is_written_and_read_by_its_name():
    fields = json.loads(json.dumps(decoder_config.to_dict(model())))
    assert fields["layers"][0]["extra_branches"]["shift"] == {"kind": "TokenShift", "dim": 32}
    assert decoder_config.from_dict(fields) == model()
    fields["layers"][0]["extra_branches"]["shift"]["kind"] = "os.system"
    with pytest.raises(
        ValueError, match=r"shift.kind \('os.system'\) must be one of .*'TokenShift'"
    ):
        decoder_config.from_dict(fields)


def test_files_of_models_without_other_branches_are_as_they_were():
    fields = decoder_config.to_dict(decoders.dense(SHAPE))
    assert "extra_branches" not in fields["layers"][0]


def test_a_parameter_without_a_draw_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(TokenShift, "draws", lambda self: {"gate": constant(0.5)})
    with pytest.raises(ValueError, match=r"layers.0.shift.out has no initial value"):
        model().build().init_states()


def test_upcycling_keeps_it_and_refuses_a_parent_without_it():
    origins = upcycle(model(), model())
    assert {name: origin.name for name, origin in origins.items()} == {n: n for n in origins}
    for parent, child in ((model(), decoders.moe_1t1i(SHAPE)), (decoders.moe_1t1i(SHAPE), model())):
        with pytest.raises(ValueError, match=r"layers\[0\] is made of attention and .*shift"):
            upcycle(parent, child)
