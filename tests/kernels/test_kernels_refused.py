"""Ops refuse wrong arguments with name, value and rule, and backends that cannot run by name."""

import logging
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DEVICE
from scan_cases import NAMES, results, scan_inputs

from earlyfuse.kernels import backend
from earlyfuse.kernels.causal_conv1d import causal_conv1d
from earlyfuse.kernels.grouped_gemm import grouped_linear, grouped_swiglu
from earlyfuse.kernels.linear_cross_entropy import linear_cross_entropy
from earlyfuse.kernels.permute import gather_rows, scatter_add_rows, select_top_k
from earlyfuse.kernels.selective_scan import selective_scan


class Op:
    """An op and right arguments, some of which a call replaces."""

    def __init__(self, op, **right):
        self.op, self.right = op, right

    def __call__(self, **wrong):
        return self.op(**self.right | wrong)


X, ROW, OFFSET = torch.zeros(4, 6), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
W, LABELS = torch.zeros(2, 5, 6), torch.tensor([-100, 0, 3, 1])
OPS = {
    "linear": Op(grouped_linear, x_TD=X, w_GFD=W, row_R=ROW, offset_G1=OFFSET),
    "swiglu": Op(
        grouped_swiglu, x_TD=X, w1_GFD=W, w3_GFD=W, w2_GDF=W.mT, row_R=ROW, offset_G1=OFFSET
    ),
    "gather": Op(gather_rows, x_TD=X, row_R=ROW),
    "scatter": Op(scatter_add_rows, y_RD=X[:3], row_R=ROW, tokens=4),
    "top-k": Op(select_top_k, scores_GT=X, k=1),
    "scan": Op(
        lambda backend="auto", **inputs: selective_scan(*inputs.values(), backend=backend),
        **dict(zip(NAMES, scan_inputs(2, 5, 3, 4), strict=True)),
    ),
    "convolution": Op(
        causal_conv1d,
        x_BLD=torch.zeros(2, 6, 3),
        weight_DW=torch.zeros(3, 4),
        bias_D=torch.zeros(3),
    ),
    "loss": Op(
        linear_cross_entropy, x_TD=X, w_VD=X, labels_T=LABELS, modality_T=LABELS * 0, modalities=2
    ),
}
WRONG = {
    "linear": {
        r"x_TD \(2, 4, 6\).*\(T, D\)": {"x_TD": X.repeat(2, 1, 1)},
        "x_TD.*int64": {"x_TD": X.long()},
        "row_R.*float32.*int64 or torch.int32; cast": {"row_R": ROW.float()},
        r"row_R \(meta\).*device": {"row_R": ROW.to("meta")},
        r"offset_G1 \(1, 3\).*\(3\)": {"offset_G1": OFFSET[None]},
        r"offset_G1 \(4,\).*\(3\), \(G1\)": {"offset_G1": torch.tensor([0, 1, 3, 3])},
        r"offset_G1 \(\[0, 1, 2\]\).*routed rows \(3\)": {"offset_G1": torch.tensor([0, 1, 2])},
        r"offset_G1 \(\[1, 1, 3\]\)": {"offset_G1": torch.tensor([1, 1, 3])},
        r"offset_G1 \(\[0, 4, 3\]\)": {"offset_G1": torch.tensor([0, 4, 3])},
        r"w_GFD \(2, 5, 7\).*\(2, 5, 6\)": {"w_GFD": torch.zeros(2, 5, 7)},
        "w_GFD.*float64.*must be torch.float32": {"w_GFD": W.double()},
        r"weight_R \(2,\).*\(3\)": {"weight_R": torch.ones(2)},
        "weight_R.*bfloat16.*float32": {"weight_R": torch.ones(3).bfloat16()},
    },
    "swiglu": {
        r"w3_GFD \(2, 4, 6\).*\(2, 5, 6\)": {"w3_GFD": W[:, :4]},
        r"w2_GDF \(2, 5, 6\).*\(2, 6, 5\)": {"w2_GDF": W},
    },
    "gather": {r"x_TD \(6,\).*\(T, D\)": {"x_TD": X[0]}},
    "scatter": {
        r"row_R \(3,\).*\(4\)": {"y_RD": X},
        r"tokens \(-1\) must not be negative": {"tokens": -1},
        r"weight_R \(2,\).*\(3\)": {"weight_R": torch.ones(2)},
    },
    "top-k": {
        r"k \(7\) must lie in \[0, 6\]": {"k": 7},
        r"scores_GT.*bfloat16.*float32": {"scores_GT": X.bfloat16()},
    },
    "scan": {
        r"u_BLD \(5, 3\).*\(B, L, D\)": {"u": torch.zeros(5, 3)},
        r"delta_BLD \(2, 5, 4\).*\(2, 5, 3\)": {"delta": torch.zeros(2, 5, 4)},
        r"A_DN \(3, 0\).*at least one state": {"A": torch.zeros(3, 0)},
        r"A_DN \(torch.bfloat16\).*torch.float32": {"A": torch.zeros(3, 4).bfloat16()},
        r"C_BLN \(1, 5, 4\).*\(2, 5, 4\)": {"C": torch.zeros(1, 5, 4)},
        r"bias_GD \(2, 3\).*\(1, 3\)": {"group": None},
        r"group_BL needs bias_GD": {"bias": None},
        r"group_BL \(0 … 2\).*0 … 1": {"group": torch.arange(10).view(2, 5) % 3},
        r"group_BL \(-1 … 1\)": {"group": torch.arange(10).view(2, 5) % 3 - 1},
        r"reset_BL \(torch.uint8\).*torch.bool": {"reset": torch.zeros(2, 5).byte()},
        r"state_BDN \(2, 4, 3\).*\(2, 3, 4\)": {"state": torch.zeros(2, 4, 3)},
        r"A_DN \(3, 4\).*16, 32, 64 for backend 'triton'; choose 'torch'": {"backend": "triton"},
    },
    "convolution": {
        r"x_BLD .*stride 1": {"x_BLD": torch.empty(2, 3, 6).mT},
        r"weight_DW .*width": {"weight_DW": torch.ones(3, 5)},
        r"bias_D \(torch.float32\) must have the type of weight_DW": {
            "x_BLD": torch.zeros(2, 6, 3).bfloat16(),
            "weight_DW": torch.ones(3, 4).bfloat16(),
        },
        r"initial_state_BVD \(2, 2, 3\).*\(2, 3, 3\)": {"initial_state_BVD": torch.ones(2, 2, 3)},
        r"positions_BL .*float32": {"positions_BL": torch.zeros(2, 6)},
    },
    "loss": {
        r"w_VD .*must have rows": {"w_VD": X[:0]},
        r"labels_T .*int64": {"labels_T": LABELS.int()},
        r"labels_T \(4\) must lie in \[0, 4\)": {"labels_T": LABELS + 4 * (LABELS == 0)},
        r"labels_T \(-5\) must lie": {"labels_T": LABELS * 0 - 5, "backend": "reference"},
        r"modality_T \(2 … 2\) must lie in 0 … 1": {"modality_T": torch.full((4,), 2)},
        r"modalities \(0\)": {"modalities": 0},
        r"z_weight \(-1": {"z_weight": -1.0},
        r"z_weight \(nan": {"z_weight": float("nan")},
    },
}


@pytest.mark.parametrize(("name", "message"), [(n, m) for n, rules in WRONG.items() for m in rules])
def test_a_wrong_argument_is_named_with_its_value_and_rule(name, message):
    with pytest.raises(ValueError, match=message):
        OPS[name](**WRONG[name][message])


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("rows", [(0, 1, 4), (2, 3, 4), (-1, 0, 1), (-3, -2, -1)])
def test_missing_rows_are_refused_by_name(rows, name):
    """Runs of them too, which a slice would cut short without an error."""
    row_R = torch.tensor(rows)
    for call in (
        lambda: OPS["linear"](row_R=row_R, unique_tokens=True, backend=name),
        lambda: OPS["swiglu"](row_R=row_R.int(), backend=name),
        lambda: OPS["gather"](row_R=row_R, backend=name),
        lambda: OPS["scatter"](row_R=row_R, backend=name),
    ):
        with pytest.raises(ValueError, match=rf"row_R \({rows[0]} … {rows[2]}\).*0 … 3"):
            call()


def test_a_row_beyond_the_tokens_is_refused_by_a_compiled_scatter():
    for row_R in (torch.tensor([0, 9]), -torch.arange(2)):
        with pytest.raises(ValueError):
            torch.ops.earlyfuse.scatter_add_rows(torch.ones(2, 3), row_R, 9, None, "torch")


# ---------------------------------------------------------------- backends


@pytest.mark.parametrize("name", OPS)
def test_a_backend_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"backend \('cuda'\).*torch, reference; choose one"):
        OPS[name](backend="cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name in OPS if name != "scan"])
def test_triton_is_not_replaced_where_it_cannot_run(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"'triton'.*cannot run on cpu.*need a CUDA device"):
        OPS[name](backend="triton")


def test_triton_is_neither_taken_nor_accepted_for_float64(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype, chosen in ((torch.float64, "torch"), (torch.bfloat16, "triton")):
        like = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        assert backend.resolve("op", "auto", ("triton", "torch"), like) == chosen
    for name in ("linear", "gather", "scatter", "convolution", "loss"):
        right = OPS[name].right
        wide = {
            of: value.double()
            for of, value in right.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        with pytest.raises(ValueError, match=r"backend \('triton'\).*not torch.float64"):
            OPS[name](**wide, backend="triton")


def test_auto_logs_its_choice_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        OPS["linear"]()
        OPS["linear"]()
        OPS["linear"](backend="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "grouped_linear: backend torch on cpu"
    ]


def test_states_that_triton_does_not_take_run_by_the_fast_path():
    inputs = scan_inputs(1, 3, 3, 5)
    assert torch.equal(results(inputs, "auto")[0], results(inputs, "torch")[0])
