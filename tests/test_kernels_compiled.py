"""Triton kernels compiled ahead of time, without a GPU: nothing spills, all fits, products that are
meant for tensor cores run there, and tiles that are meant for TMA are loaded by it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import json
from dataclasses import asdict
from earlyfuse.kernels import ahead_of_time
if __name__ == "__main__":
    found = ahead_of_time.compile_all(2)
    meant = {
        v.name: {"meant": v.tensor_cores, "tma": v.tma} for v in ahead_of_time.variants()
    }
    print(json.dumps([asdict(r) | meant[r.variant] for r in found]))
    print(json.dumps(ahead_of_time.table(found)))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What every variant takes, and the table; compiled in a process without the interpreter."""
    script = tmp_path_factory.mktemp("compile") / "compile_all.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(script.parent / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    resources, table = done.stdout.splitlines()[-2:]
    return json.loads(resources), json.loads(table)


def test_nothing_spills_on_any_generation(compiled):
    resources, _ = compiled
    assert {r["variant"] + " " + r["target"]: r["spilled_bytes"] for r in resources} == {
        r["variant"] + " " + r["target"]: 0 for r in resources
    }


def test_shared_memory_is_within_what_a_block_may_have(compiled):
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
    assert [r for r in compiled[0] if r["shared_bytes"] > limits[r["target"]]] == []


def test_products_meant_for_tensor_cores_run_there(compiled):
    meant = [r for r in compiled[0] if r["meant"]]
    assert len(meant) > 30
    assert [r for r in meant if r["tensor_core_instructions"] == 0] == []


def test_tiles_meant_for_tma_are_loaded_by_it_and_no_others(compiled):
    assert sum(r["tma"] for r in compiled[0]) >= 30
    assert [r for r in compiled[0] if (r["tma_loads"] > 0) != r["tma"]] == []


def test_the_table_in_the_readme_is_what_was_compiled(compiled):
    readme = Path(__file__).parent.parent / "kernels" / "README.md"
    written = readme.read_text().split("<!-- resources: begin -->\n")[1]
    assert written.split("<!-- resources: end -->")[0] == compiled[1], (
        "run: python -m earlyfuse.kernels.ahead_of_time --write"
    )
