"""A branch and a router defined in this file go from config to generation with no other file
changed.

``main`` is the program of the two ranks.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from places import SUPPORT
from ranks import forked, output_of
from tiny_runs import SHAPE, SHARES, metrics, run, state, tiny_config
from torch import nn
from torch.distributed.tensor import DTensor
from toy import VOCABULARY

from earlyfuse.configs import decoders
from earlyfuse.models.blocks.branch import Branch, Matrix
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.flops import count_parameters, training_flops
from earlyfuse.models.generate.session import Sampling, generate
from earlyfuse.models.init_weights import constant, normal
from earlyfuse.models.routes import Routes
from earlyfuse.models.routing.router import Router
from earlyfuse.models.routing.router_stats import RouterStats, Statistics
from earlyfuse.models.state_dicts import decoder_config
from earlyfuse.models.upcycle import upcycle
from earlyfuse.parallel.estimates import dry_run
from earlyfuse.parallel.plan import check_parallelism

STEPS, PROMPTS = 4, [[0, 7, 8, 9], [0, 12]]


class TokenShift(Branch):
    """A token and the one before it, mixed by a gate, through one matrix."""

    @dataclass(kw_only=True, slots=True)
    class Config(Branch.Config):
        supports: ClassVar = ("decoding",)

        dim: int

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
        self.gates = GateStats(sums=2)

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

    @property
    def nbytes(self):
        return self.last_B1D.nbytes

    def select(self, row_R):
        self.last_B1D = self.last_B1D[row_R]


class GateStats(Statistics):
    kind = "shift"

    def summary(self):
        total, count = self.sums_K.tolist()
        return {"gate": total / max(count, 1)}


class Threshold(Router):
    """A token takes every expert whose score is above one half."""

    @dataclass(kw_only=True, slots=True)
    class Config(Router.Config):
        needs_whole_rows: ClassVar[bool] = False

        expected: float = 1.0

        @property
        def causal_rules(self):
            return ("causal",)

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


def without():
    return decoders.moma(SHAPE, dict.fromkeys(SHARES, 2), SHARES)


def model(shift=TokenShift):
    config = without()
    for layer in config.layers:
        layer.extra_branches = {"shift": shift.Config(dim=SHAPE.dim)}
    for _, pool, _, _ in config.traverse(ExpertPool.Config):
        pool.router = Threshold.Config()
    return config


def run_config(folder, data):
    config = tiny_config(folder, data, model(), steps=STEPS)
    config.checkpoint.interval = STEPS // 2
    config.metrics.enable_tensorboard = config.sampler.enable = False
    config.validator.batch_rows = 4
    return config


def parameters(trainer):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in trainer.model.named_parameters()
    }


def main(folder, data):
    torch.set_num_threads(1)
    found = parameters(run(run_config(Path(folder), Path(data))))
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "parameters.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken")
    return run(run_config(folder, data)), folder


def test_a_branch_runs_between_attention_and_feed_forward_under_its_name():
    block = model().build().layers["0"]
    assert block.branches == ("attention", "shift", "feed_forward")
    names = dict(block.named_parameters())
    assert {"shift_norm.weight", "shift.gate", "shift.out"} < names.keys()


def test_two_ranks_train_as_one_and_log_the_same(tmp_path, data, unbroken, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{SUPPORT}")
    output_of(forked(2, Path(__file__), str(tmp_path), str(data)))
    found, (trainer, folder) = torch.load(tmp_path / "parameters.pt"), unbroken
    for name, value in parameters(trainer).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(found["layers.0.shift.gate"], torch.full((SHAPE.dim,), 0.5))
    for line, expected in zip(metrics(tmp_path), metrics(folder), strict=True):
        if line["kind"] == "train":
            for key in ("loss", "shift/layer0/gate", "router/layer1.pool0/reached"):
                assert line[key] == pytest.approx(expected[key], rel=1e-5)
            assert 0.3 < line["shift/layer1/gate"] < 0.7
            assert 0 < line["router/layer1.pool0/reached"] <= 1


def test_a_resumed_run_is_the_unbroken_one(tmp_path, data, unbroken):
    run(run_config(tmp_path, data), stop_after=STEPS // 2)
    resumed = state(run(run_config(tmp_path, data)))
    for name, value in state(unbroken[0]).items():
        assert torch.equal(resumed[name], value), name


def test_costs_are_in_every_estimate(tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # put back afterwards
    total = count_parameters(model()).total
    assert total == sum(p.numel() for p in model().build().parameters())
    shift = SHAPE.dim**2 + 2 * SHAPE.dim  # matrix, gate, norm
    assert total - count_parameters(without()).total == SHAPE.layers * shift
    more = training_flops(model(), 32)[0] - training_flops(without(), 32)[0]
    assert more == SHAPE.layers * 6 * SHAPE.dim**2
    config = run_config(tmp_path, data)
    config.parallelism.expert_parallel_degree = 2
    page = dry_run.describe("toy", config, ranks=2)
    for part in (f"{total / 1e3:.4g} k parameters", "expert counts", "expert rows"):
        assert part in page


def test_generation_with_the_cache_equals_generation_without():
    built = model().build()
    built.init_states()
    with torch.no_grad():
        for block in built.layers.values():
            block.shift.out.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        built.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    options = {"new_tokens": 20, "mode": "text", "sampling": Sampling(temperature=0.5)}
    written = [
        generate(built, VOCABULARY, PROMPTS, cache=cache, **options) for cache in (True, False)
    ]
    assert written[0] == written[1] and sum(map(len, written[0])) > 10


def test_unsupported_uses_are_refused_by_name(data, tmp_path, monkeypatch):
    class Silent(TokenShift):
        @dataclass(kw_only=True, slots=True)
        class Config(TokenShift.Config):
            supports: ClassVar = ()

    silent, config = model(Silent), run_config(tmp_path, data)
    place = r"layers\[0\].shift: \S*Silent does not say how it works with"
    with pytest.raises(ValueError, match=f"{place} decoding"):
        generate(silent.build(), VOCABULARY, PROMPTS, new_tokens=2, mode="text")
    for axis in ("tensor", "context"):
        parallelism = replace(config.parallelism, **{f"{axis}_parallel_degree": 2})
        with pytest.raises(
            ValueError, match=rf"{axis}_parallel_degree \(2\) must be 1: {place} {axis} par"
        ):
            check_parallelism(parallelism, config.training, silent, 2)
    for name in ("causal_rules", "needs_whole_rows"):
        monkeypatch.setattr(Threshold.Config, name, getattr(Router.Config, name))
    assert "(Threshold)" in model().layers[0].feed_forward.refusal("context_parallel")
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.pools.0.router cannot route"):
        generate(model().build(), VOCABULARY, PROMPTS, new_tokens=2, mode="text")


def test_configs_are_written_and_read_by_name():
    fields = json.loads(json.dumps(decoder_config.to_dict(model())))
    layer = fields["layers"][0]
    assert layer["extra_branches"]["shift"] == {"kind": "TokenShift", "dim": 32}
    assert layer["feed_forward"]["pools"][0]["router"] == {"kind": "Threshold", "expected": 1.0}
    assert decoder_config.from_dict(fields) == model()
    assert "extra_branches" not in decoder_config.to_dict(without())["layers"][0]
    layer["extra_branches"]["shift"]["kind"] = "os.system"
    rule = r"shift.kind \('os.system'\) must be one of .*'TokenShift'"
    with pytest.raises(ValueError, match=rule):
        decoder_config.from_dict(fields)


def test_what_a_contract_requires_cannot_be_left_out(monkeypatch):
    class NoCost(Branch):
        @dataclass(kw_only=True, slots=True)
        class Config(Branch.Config):
            dim: int

    with pytest.raises(TypeError, match=r"abstract methods '?matrices'?, '?saved"):
        NoCost.Config(dim=4)
    with pytest.raises(TypeError, match=r"abstract method '?rows_per_token"):
        Router.Config()
    monkeypatch.setattr(TokenShift, "draws", lambda self: {"gate": constant(0.5)})
    with pytest.raises(ValueError, match=r"layers.0.shift.out has no initial value"):
        model().build().init_states()


def test_upcycling_keeps_a_branch_and_refuses_a_parent_without_it():
    origins = upcycle(model(), model())
    assert {name: origin.name for name, origin in origins.items()} == {n: n for n in origins}
    for parent, child in ((model(), without()), (without(), model())):
        with pytest.raises(ValueError, match=r"layers\[0\] is made of attention and .*shift"):
            upcycle(parent, child)
