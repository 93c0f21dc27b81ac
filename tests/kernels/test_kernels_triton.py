"""The Triton kernels of routed computation equal their references: in Triton's interpreter here, on
the device where there is one.

The interpreter takes about 0.1 s for a program and a step of its inner loop, so sizes are small.
"""

import importlib.util
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DEVICE, assert_equal, outputs_and_gradients, strided

from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu

triton = pytest.importorskip("triton")
triton_impl = pytest.importorskip("earlyfuse.kernels.grouped_gemm.triton_impl")
triton_configurations = pytest.importorskip("earlyfuse.kernels.grouped_gemm.triton_configurations")

# name → (tokens of each group, whether no token occurs twice)
ROUTES = {
    "modalities": ([list(range(0, 21, 2)), list(range(1, 21, 2))], True),
    "experts: tokens in several groups, one empty": ([[3, 5, 9, 9], [], [20, 3, 0]], False),
    "one group, as in Mixture-of-Depths": ([[7, 1, 20]], True),
    "no rows": ([[], []], True),
}
TOKENS = 21


def leaf(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype).requires_grad_()


def routes_of(groups):
    row_R = torch.tensor([token for group in groups for token in group], dtype=torch.int64)
    offset_G1 = torch.tensor([0, *[len(group) for group in groups]]).cumsum(0)
    return row_R.to(DEVICE), offset_G1.to(DEVICE)


def problem(groups, tokens=TOKENS, width=10, hidden=14, dtype=torch.float32):
    """x, w1, w3, w2, row, offset, weight."""
    row_R, offset_G1 = routes_of(groups)
    scale = width**-0.5
    weights = [
        (leaf(len(groups), hidden, width, seed=1) * scale),
        (leaf(len(groups), hidden, width, seed=2) * scale),
        (leaf(len(groups), width, hidden, seed=3) * hidden**-0.5),
    ]
    w1, w3, w2 = (w.detach().to(dtype).requires_grad_() for w in weights)
    weight_R = torch.rand(row_R.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    x = leaf(tokens, width, dtype=dtype)
    return x, w1, w3, w2, row_R, offset_G1, weight_R.requires_grad_()


def assert_equal_to_reference(tensors, once, bound):
    x, w1, w3, w2, row_R, offset_G1, weight_R = tensors
    for op, inputs in ((grouped_swiglu, (x, w1, w3, w2)), (grouped_linear, (x, w1))):
        rest = (row_R, offset_G1, weight_R)
        expected = outputs_and_gradients(op, inputs, *rest, backend="reference")
        actual = outputs_and_gradients(op, inputs, *rest, unique_tokens=once, backend="triton")
        assert_equal(actual, expected, bound)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", ROUTES)
def test_outputs_and_gradients_equal_the_reference(name, weighted):
    groups, once = ROUTES[name]
    *tensors, weight_R = problem(groups)
    assert_equal_to_reference((*tensors, weight_R if weighted else None), once, 1e-5)


def test_half_precision_agrees_with_the_reference():
    groups, once = ROUTES["experts: tokens in several groups, one empty"]
    bound = 1e-2 if DEVICE == "cuda" else 2e-2  # the interpreter truncates instead of rounding
    assert_equal_to_reference(problem(groups, dtype=torch.bfloat16), once, bound)


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
def test_groups_of_several_tiles_in_both_directions_equal_the_reference(tma, monkeypatch):
    """Ragged groups larger than a tile; widths above one tile that are not multiples of it."""
    generator = torch.Generator().manual_seed(5)
    groups = [torch.randint(0, 90, (n,), generator=generator).tolist() for n in (70, 0, 3)]
    choose(monkeypatch, tma)
    dtype, bound = (TMA_TYPE, TMA_BOUND) if tma else (torch.float32, 1e-5)
    sizes = (72, 136) if tma else (70, 72)
    assert_equal_to_reference(problem(groups, 90, *sizes, dtype), False, bound)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_sizes_equal_the_reference(dtype):
    generator = torch.Generator().manual_seed(6)
    sizes = (1024, 1024, 1024, 1024, 37, 0, 2000, 1)
    groups = [torch.randint(0, 4096, (n,), generator=generator).tolist() for n in sizes]
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    tensors = problem(groups, tokens=4096, width=1024, hidden=2816, dtype=dtype)
    assert_equal_to_reference(tensors, False, bound)


def test_a_token_twice_gives_the_same_bits_on_every_run():
    groups, _ = ROUTES["experts: tokens in several groups, one empty"]
    *inputs, row_R, offset_G1, weight_R = problem(groups)
    first, second = (
        outputs_and_gradients(grouped_swiglu, inputs, row_R, offset_G1, weight_R, backend="triton")
        for _ in range(2)
    )
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


def test_tensors_may_have_any_strides():
    groups, once = ROUTES["experts: tokens in several groups, one empty"]
    *inputs, row_R, offset_G1, weight_R = map(strided, problem(groups))
    assert_equal_to_reference((*inputs, row_R, offset_G1.int(), weight_R), once, 1e-5)
    same_R = weight_R.detach()[0].expand(row_R.shape).requires_grad_()
    assert_equal_to_reference((*inputs, row_R.int(), offset_G1, same_R), once, 1e-5)


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 6])
def test_each_gradient_comes_right_when_no_other_is_asked_for(needed):
    """As with frozen weights: what nobody needs is left out."""
    tensors = problem(ROUTES["modalities"][0])

    def gradient(op, places, wanted):
        leaves = [tensors[place].detach().requires_grad_(place in wanted) for place in places]
        y = op(*leaves[:-1], *tensors[4:6], leaves[-1], backend="triton")
        return torch.autograd.grad(y.sin().sum(), leaves[places.index(needed)])[0]

    for op, places in ((grouped_swiglu, (0, 1, 2, 3, 6)), (grouped_linear, (0, 1, 6))):
        if needed in places:
            assert torch.equal(gradient(op, places, {needed}), gradient(op, places, places))


def test_no_rows_give_zero_gradients_without_a_launch(monkeypatch):
    """An autotuner that met no rows first would choose among configurations that do nothing."""
    monkeypatch.setattr(triton_impl, "weight_gradient_kernel", None)
    *inputs, row_R, offset_G1, _ = problem([[], []])
    y, *gradients = outputs_and_gradients(
        grouped_swiglu, inputs, row_R, offset_G1, backend="triton"
    )
    assert not y.any() and not any(gradient.any() for gradient in gradients)


# ---------------------------------------------------------------- choosing a configuration


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter: a GPU chooses by itself")
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("best", ["first", "last"])
def test_what_was_tried_before_a_configuration_was_chosen_leaves_no_trace(best, monkeypatch):
    """On a GPU the first call runs every configuration of a kernel, and then the best again."""
    tries = count(1)

    def tried(configs, key, prune_configs_by, **options):
        def do_bench(call, quantiles):
            call()
            return [next(tries) * (1 if best == "first" else -1)] * len(quantiles)

        return triton.autotune(configs, key, do_bench=do_bench, **options)

    monkeypatch.setattr(triton_configurations, "tuned", tried)
    spec = importlib.util.find_spec("earlyfuse.kernels.grouped_gemm.triton_kernels")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    names = ("rows", "gate_up", "activation_backward", "weight_gradient")
    for name in (f"{name}_kernel" for name in names):
        monkeypatch.setattr(triton_impl, name, getattr(kernels, name))
    tensors = problem([[3, 5, 9, 9], [20, 3, 0]], hidden=72)
    assert_equal_to_reference(tensors, False, 1e-5)
    assert next(tries) > 12


# ---------------------------------------------------------------- tiles by TMA

# what a device with TMA uses it for; the interpreter computes in fp32 whatever it is given
TMA_TYPE, TMA_BOUND = (torch.float32, 1e-5) if DEVICE == "cpu" else (torch.bfloat16, 1e-2)


def choose(monkeypatch, tma):
    """TMA or pointers, whatever the device has; returns (TMA, readings) of launches to come."""
    if DEVICE == "cuda" and tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a device with TMA")
    launches, operands = [], triton_impl.operands

    def noted(*readings):
        launches.append((operands(*readings)[0], [how for _, how in readings]))
        return operands(*readings)

    monkeypatch.setattr(triton_impl, "has_tma", lambda tensor: tma)
    monkeypatch.setattr(triton_impl, "operands", noted)
    return launches


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("name", [name for name in ROUTES if name != "no rows"])
def test_tiles_by_tma_equal_the_reference(name, monkeypatch):
    groups, once = ROUTES[name]
    launches = choose(monkeypatch, tma=True)
    tensors = problem(groups, width=24, hidden=40, dtype=TMA_TYPE)
    assert_equal_to_reference(tensors, once, TMA_BOUND)
    # all but the weight gradient of both tokens and their gradients, which has no dense operand
    assert launches and all(
        tma == (set(how) != {triton_impl.Reading.GATHERED}) for tma, how in launches
    )


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
def test_nan_in_one_group_moves_no_bit_of_another(tma, monkeypatch):
    """Every tile here is larger than its group, so it would read what lies next to it."""
    choose(monkeypatch, tma)
    groups = [list(range(7)), [7, 8, 9], list(range(10, 18))]
    *clean, row_R, offset_G1, weight_R = problem(groups, 18, 24, 40, TMA_TYPE)
    damaged = [tensor.detach().clone() for tensor in clean]
    damaged[0][7:10] = torch.nan
    for weights in damaged[1:]:
        weights[1] = torch.nan
    others = [0, 1, 2, 3, 4, 5, 6, *range(10, 18)]
    for op, used in ((grouped_swiglu, 4), (grouped_linear, 2)):
        expected, found = (
            outputs_and_gradients(op, inputs, row_R, offset_G1, weight_R, backend="triton")
            for inputs in (clean[:used], [t.requires_grad_() for t in damaged[:used]])
        )
        y, dx, *dw, dweight = zip(expected, found, strict=True)
        for want, have in (y, dx, dweight):
            assert torch.equal(have[others], want[others])
        for want, have in dw:
            assert have[1].isnan().all() and torch.equal(have[[0, 2]], want[[0, 2]])


def test_what_tma_cannot_address_comes_through_pointers(monkeypatch):
    choose(monkeypatch, tma=True)
    dense, gathered = triton_impl.Reading.DENSE, triton_impl.Reading.GATHERED

    def by_tma(*tensors):
        return triton_impl.operands(*((tensor, dense) for tensor in tensors))[0]

    whole = torch.zeros(2, 3, 8, device=DEVICE)
    assert by_tma(whole)
    assert not by_tma(torch.zeros(2, 3, 6, device=DEVICE))  # rows of 24 bytes
    assert not by_tma(torch.zeros(49, device=DEVICE)[1:].view(2, 3, 8))  # begins at 4 bytes
    assert not by_tma(torch.zeros(2, 0, 8, device=DEVICE))
    assert not by_tma(whole, torch.zeros(2, 3, 6, device=DEVICE))
    assert not triton_impl.operands((whole[0], gathered), (whole[0], gathered))[0]
    # the one matrix of a tensor with another's stride is still addressed by its own
    tma, (single,) = triton_impl.operands((whole.as_strided((1, 3, 8), (1, 8, 1)), dense))
    assert tma and list(single.strides) == [24, 8, 1]


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_tma_is_for_half_precision_on_devices_that_have_it(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    for dtype, wanted in ((torch.bfloat16, has), (torch.float16, has), (torch.float32, False)):
        assert triton_impl.has_tma(SimpleNamespace(device=cuda, dtype=dtype)) == wanted
    assert not triton_impl.has_tma(torch.zeros(1, dtype=torch.bfloat16))
