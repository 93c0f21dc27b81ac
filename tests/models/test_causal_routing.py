"""Causal routers: they learn the batch's choice, never look ahead and leave the model alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from batches import batch_of
from tiny_runs import MODELS, SHAPE, metrics, moma, run, tiny_config
from torchtitan.distributed.activation_checkpoint import FullAC

from earlyfuse.configs import decoders, stages
from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.routes import group_of_rows
from earlyfuse.models.routing.causal_router import CausalRouter, members
from earlyfuse.models.routing.expert_choice import ExpertChoice, expert_choice
from earlyfuse.models.routing.router import check_causal
from earlyfuse.parallel.strategies.activation_checkpointing import checkpoint_activations

S = 16
CAUSAL = ForwardSettings(rule="causal")


def causal_model(std: float = 0.3, **config) -> torch.nn.Module:
    """With routers that take about half of all tokens, and weights that matter."""
    model = decoders.with_routers(moma(), causal=CausalRouter.Config(**config)).build()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def batch(first: int = 0) -> MixedBatch:
    """Two rows; with ``first``, other tokens from there on and in all of the second row."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(SHAPE.vocab_size, (2, S), generator=generator)
    if first:
        tokens_BS[0, first:] = (tokens_BS[0, first:] + 7) % SHAPE.vocab_size
        tokens_BS[1] = (tokens_BS[1] + 11) % SHAPE.vocab_size
    return batch_of(tokens_BS, (tokens_BS >= 32).to(torch.uint8))


def lines(folder, kind: str) -> list[dict]:
    return [line for line in metrics(folder) if line["kind"] == kind]


# ---------------------------------------------------------------- the rule


@torch.no_grad()
def test_under_the_causal_rule_later_tokens_and_other_rows_move_nothing():
    model = causal_model().eval()
    half = S // 2
    inputs = batch(), batch(half)
    batch_rule, other = (model(each)[0, :half] for each in inputs)
    assert not torch.allclose(batch_rule, other, atol=1e-3), "batch routing does look ahead"
    before, after = (model(each, CAUSAL)[0, :half] for each in inputs)
    assert torch.equal(model(inputs[0])[0, :half], batch_rule), "a rule is of one forward alone"
    alone_1S = inputs[0].tokens_BS[:1, :half], inputs[0].modality_BS[:1, :half]
    alone = model(batch_of(*alone_1S), CAUSAL)[0]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    torch.testing.assert_close(before, alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("at_least_one", [False, True])
@pytest.mark.parametrize("weights", ["sigmoid", "normalised"])
def test_the_causal_router_selects_and_the_main_router_weighs(at_least_one, weights):
    torch.manual_seed(0)
    causal = CausalRouter.Config(at_least_one=at_least_one)
    config = ExpertChoice.Config(causal=causal, weights=weights)
    router = config.build(dim=8, experts=3, share=1.0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, eligible_T = torch.randn(40, 8), torch.arange(40) % 4 != 0
    row_R, offset_G1, weight_R = router(x_TD, eligible_T, SimpleNamespace(settings=CAUSAL))
    scores_TE = F.silu(x_TD @ router.causal.w_hidden.T) @ router.causal.w_score.T
    taken = {(e, t) for t in range(40) for e in range(3) if scores_TE[t, e] > 0}
    if at_least_one:
        without = set(range(40)) - {t for _, t in taken}
        assert without, "the guarantee is needed in this case"
        taken |= {(int(scores_TE[t].argmax()), t) for t in without}
    taken = {(e, t) for e, t in taken if t % 4}
    expert_R = group_of_rows(offset_G1, len(row_R))
    assert set(zip(expert_R.tolist(), row_R.tolist(), strict=True)) == taken
    assert len(row_R) == len(taken)
    sigmoid_R = (x_TD @ router.weight.T).sigmoid()[row_R, expert_R]
    if weights == "normalised":
        sigmoid_R = sigmoid_R / torch.zeros(40).index_add_(0, row_R, sigmoid_R)[row_R]
    torch.testing.assert_close(weight_R, sigmoid_R)


def test_a_model_without_causal_routers_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layers.0.*pools.0.router.*no causal.*--train-only"):
        check_causal(moma().build())
    check_causal(decoders.dense(SHAPE).build())  # looks ahead nowhere
    model = moma().build()
    model.init_states()
    with pytest.raises(ValueError, match="has no causal router"):
        model(batch(), CAUSAL)
    with pytest.raises(ValueError, match='must be "batch" or "causal"'):
        ForwardSettings(rule="both")


# ---------------------------------------------------------------- learning


def test_members_are_the_chosen_tokens_without_the_padding():
    logits_TE = torch.randn(24, 3)
    eligible_T = torch.arange(24) % 6 == 0  # four, and eight rows for each expert
    routes = expert_choice(logits_TE, eligible_T, 1, budget=8, capacity_factor=1.0)
    member_TE = members(routes, eligible_T, 24, 3)
    assert member_TE.equal(eligible_T[:, None].expand(24, 3))


def losses_by_hand(model) -> torch.Tensor:
    """Sum over layers and pools of the cross-entropy over share · tokens of the step."""
    seen = []

    def note(router, args, routes):
        x_TD, eligible_T, _ = args
        seen.append((router, x_TD.detach(), eligible_T, routes))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, ExpertChoice)]
    with torch.no_grad():
        model(batch())
    for hook in hooks:
        hook.remove()
    total = torch.zeros(())
    for router, x_TD, eligible_T, routes in seen:
        score_TE = (F.silu(x_TD @ router.causal.w_hidden.T) @ router.causal.w_score.T).sigmoid()
        member_TE = torch.zeros_like(score_TE)
        group_R = group_of_rows(routes.offset_G1, len(routes.row_R))
        member_TE[routes.row_R, group_R] = 1.0
        bce_T = -(member_TE * score_TE.log() + (1 - member_TE) * (1 - score_TE).log()).sum(1)
        total = total + bce_T[eligible_T].sum() / (router.share * 64)
    return total


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_the_cross_entropy_and_reach_nothing_else(recomputed):
    model = causal_model(std=0.1)
    step = ForwardSettings(step_tokens=64)
    losses_by_hand(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if ".causal." in n}
    assert all(p.grad is None for n, p in model.named_parameters() if ".causal." not in n)
    model.zero_grad()
    if recomputed:
        checkpoint_activations(model, FullAC.Config(), "")
    main = moma().build()
    main.load_state_dict(model.state_dict(), strict=False)
    for built in (model, main):
        built(batch(), step).square().sum().backward()
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")
        if ".causal." in name:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
        elif recomputed:
            grad = main.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert parameter.grad.equal(main.get_parameter(name).grad), name


def test_in_training_nothing_of_a_causal_router_reads_a_value_on_the_host():
    router = CausalRouter.Config().build(dim=8, experts=2, share=1.0).to("meta")
    x_TD = torch.randn(64, 8, device="meta")
    eligible_T = torch.zeros(64, dtype=torch.bool, device="meta")
    logits_TE = torch.randn(64, 2, device="meta", requires_grad=True)
    routes = expert_choice(logits_TE, eligible_T, 2, budget=5, capacity_factor=1.0)
    router.learn(x_TD, routes, eligible_T, ForwardSettings(recording=True)).sum().backward()
    assert router.w_hidden.grad is not None


# ---------------------------------------------------------------- runs


def test_causal_routers_alongside_leave_the_run_as_it_is_bit_for_bit(tmp_path, data):
    """Parameters, whatever is clipped; and they foretell better in the end."""
    with_causal = decoders.with_routers(moma(), causal=CausalRouter.Config())
    trainers = []
    for name, model in (("without", moma()), ("with", with_causal)):
        config = tiny_config(tmp_path / name, data, model, steps=10)
        config.checkpoint.enable = False
        config.training.max_norm = 0.5
        config.validator.freq = 100
        trainers.append(run(config))
    without, along = (trainer.model.state_dict() for trainer in trainers)
    assert [name for name in without if not without[name].equal(along[name])] == []
    for a, b in zip(
        *(lines(tmp_path / name, "train") for name in ("without", "with")), strict=True
    ):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    first, last = lines(tmp_path / "with", "validation")
    for place in ("layer0.pool0", "layer1.pool1"):
        assert last[f"causal/{place}/bce"] < first[f"causal/{place}/bce"]
    keys = {"causal_loss", "causal_loss/text", "causal_loss/image", "causal/layer0.pool1/recall"}
    assert keys <= last.keys() and last["causal_loss"] != last["loss"]
    assert "causal/layer0.pool0/precision" in lines(tmp_path / "with", "train")[-1]
    assert "causal_loss" not in lines(tmp_path / "without", "validation")[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of a MoMa without causal routers."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(tiny_config(folder, data, moma(), steps=3))
    return folder


def second_stage(folder, data, finished, steps: int = 6):
    config = tiny_config(folder, data, moma())
    config = stages.causal_routers_only(config, str(finished), lr=1e-2, warmup_steps=1, steps=steps)
    config.checkpoint.interval = 3
    return config


def test_a_second_stage_trains_causal_routers_and_nothing_else(tmp_path, data, finished):
    trainer = run(second_stage(tmp_path, data, finished))
    parent = tiny_config(finished, data, moma(), steps=3).build()
    parent.checkpointer.load()
    found, before = trainer.model.state_dict(), parent.model.state_dict()
    parent.close()
    assert [name for name in before if not before[name].equal(found[name])] == []
    optimised = trainer.optimizers.state_dict()
    assert all(".causal." in key for key in optimised)
    validation = lines(tmp_path, "validation")
    assert [line["step"] for line in validation] == [0, 1, 3, 6]
    assert len({line["loss"] for line in validation}) == 1, "the main model stands still"
    assert validation[-1]["causal/layer0.pool0/bce"] < validation[0]["causal/layer0.pool0/bce"]
    # data go on, schedule and counters begin anew
    assert trainer.dataloader.lanes[:, -1].tolist() == [9] * 4
    assert int(trainer.tokens_M.sum()) == 6 * 4 * 32
    assert lines(tmp_path, "train")[0]["lr"] == pytest.approx(1e-2)


def test_a_resumed_second_stage_equals_the_unbroken_one(tmp_path, data, finished):
    unbroken = run(second_stage(tmp_path / "unbroken", data, finished))
    run(second_stage(tmp_path / "broken", data, finished), stop_after=4)
    resumed = run(second_stage(tmp_path / "broken", data, finished))
    for a, b in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b)


def test_a_second_stage_that_cannot_be_is_refused(tmp_path, data):
    config = tiny_config(tmp_path, data, moma())
    config.train_only = "causal_routers"
    with pytest.raises(ValueError, match="needs a model that has causal routers"):
        config.build()
    config = tiny_config(tmp_path, data, MODELS["moma_causal"]())
    config.train_only = "causal_routers"
    with pytest.raises(ValueError, match="which no causal router matches"):
        config.build()
