"""Triton kernels compiled ahead of time, without a GPU: nothing spills, all fits, products that
should run on tensor cores do, and tiles that should be loaded by TMA are.

The table in compiled.md can only be written when all of this holds for every variant on every
target, and carries a fingerprint of the kernels. Here one variant of each kernel, with and without
TMA, is compiled again for every target.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from places import SUPPORT

ahead_of_time = pytest.importorskip("ahead_of_time")

REMEDY = "run: python tests/support/ahead_of_time.py --write"
COMPILE = f"""
import json, sys
from dataclasses import asdict
sys.path.insert(0, {str(SUPPORT)!r})
import ahead_of_time
if __name__ == "__main__":
    jobs = ahead_of_time.sample_jobs()
    found = ahead_of_time.compile_all(jobs, 2)
    variants = ahead_of_time.variants()
    sample = [variants[number] for number in {{number for number, _ in jobs}}]
    print(json.dumps({{
        "found": [asdict(r) for r in found],
        "tensor_cores": [v.name for v in sample if v.tensor_cores],
        "tma": [v.name for v in sample if v.tma],
        "variants": [v.name for v in variants],
        "fingerprint": ahead_of_time.fingerprint(),
        "tuned_over": {{v.name: getattr(v.kernel, "keys", []) for v in variants}},
    }}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The sample's resources; compiled in a process without the interpreter."""
    script = tmp_path_factory.mktemp("compile") / "compile_sample.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(script.parent / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def written():
    """The table in compiled.md: the line before it, and cells by variant and target."""
    lines = ahead_of_time.TABLE.read_text().splitlines()
    (first,) = (line for line in lines if line.startswith("Kernels "))
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    )
    cells = {
        (name, target): cell
        for name, *row in rows
        for target, cell in zip(header[1:], row, strict=True)
    }
    return first, cells


def test_nothing_spills_and_all_fits_on_any_generation(compiled):
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
    assert {r["target"] for r in compiled["found"]} == set(limits)
    for r in compiled["found"]:
        assert r["registers"] > 0 and r["spilled_bytes"] == 0, r
        assert r["shared_bytes"] <= limits[r["target"]], r


def test_products_meant_for_tensor_cores_run_there(compiled):
    meant = [r for r in compiled["found"] if r["variant"] in compiled["tensor_cores"]]
    assert len(meant) >= 20
    assert [r for r in meant if r["tensor_core_instructions"] == 0] == []


def test_tiles_meant_for_tma_are_loaded_by_it_and_no_others(compiled):
    assert len(compiled["tma"]) == 4
    assert {r["variant"] for r in compiled["found"] if r["tma_loads"] > 0} == set(compiled["tma"])


def test_the_table_is_of_these_kernels_and_of_all_their_variants(compiled, written):
    first, cells = written
    assert first == f"Kernels {compiled['fingerprint']}.", REMEDY
    assert list(dict.fromkeys(name for name, _ in cells)) == compiled["variants"], REMEDY
    for r in compiled["found"]:
        cell = f"{r['registers']} / {r['shared_bytes'] / 1024:.4g}"
        assert cells[r["variant"], r["target"]] == cell, f"{r}; {REMEDY}"


def test_no_length_is_tuned_for_and_no_choice_of_a_clock_decides_the_order_of_sums(compiled):
    """Tuning for a new length would cost seconds; a choice by clock would change bits."""
    keys = {name.split(" ")[0]: keys for name, keys in compiled["tuned_over"].items()}
    assert keys["causal_conv1d"] == ["D"]
    assert keys["selective_scan"] == keys["linear_cross_entropy"] == []


def test_what_breaks_a_rule_keeps_the_table_from_being_written(monkeypatch):
    right = ahead_of_time.Resources("some kernel", "sm_80", 64, 0, 163 * 1024, 8, 0)
    variant = ahead_of_time.Variant("some kernel", None, {}, tensor_cores=True)
    monkeypatch.setattr(ahead_of_time, "variants", lambda: [variant])
    assert ahead_of_time.faults([right]) == []
    for change, said in (
        ({"spilled_bytes": 8}, "8 bytes spilled"),
        ({"shared_bytes": 163 * 1024 + 1}, "shared memory"),
        ({"tensor_core_instructions": 0}, "no tensor-core instruction"),
        ({"tma_loads": 2}, "2 loads by TMA"),
    ):
        (fault,) = ahead_of_time.faults([replace(right, **change)])
        assert fault.startswith("some kernel on sm_80") and said in fault


def test_the_fingerprint_follows_code_and_variants_but_not_comments(monkeypatch, tmp_path):
    kernel = "@jit\ndef kernel(x):\n    {}\n    return x + BLOCK\n"
    monkeypatch.setattr(ahead_of_time, "KERNELS", tmp_path)

    def found(text, warps=4):
        (tmp_path / "triton_impl.py").write_text(text)
        variant = ahead_of_time.Variant("some kernel", None, {}, warps=warps)
        monkeypatch.setattr(ahead_of_time, "variants", lambda: [variant])
        return ahead_of_time.fingerprint()

    first = found("BLOCK = 8\n" + kernel.format("x = x * 2"))
    assert found("# why\nBLOCK = 8\n\n" + kernel.format("x = x * 2  # twice")) == first
    assert found("BLOCK = 8\n" + kernel.format("'Says more.'\n    x = x * 2")) == first
    assert found("BLOCK = 8\n" + kernel.format("x = x * 2") + "@launcher\ndef f(): ...") == first
    assert found("BLOCK = 8\n" + kernel.format("x = x * 3")) != first
    assert found("BLOCK = 16\n" + kernel.format("x = x * 2")) != first
    assert found("BLOCK = 8\n" + kernel.format("x = x * 2"), warps=8) != first
