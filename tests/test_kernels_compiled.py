"""Triton kernels compiled ahead of time, without a GPU: nothing spills, all fits, and products that
are meant for tensor cores run there."""

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json
from dataclasses import asdict
from earlyfuse.kernels import ahead_of_time
if __name__ == "__main__":
    found = ahead_of_time.compile_all(2)
    tensor_cores = {v.name: v.tensor_cores for v in ahead_of_time.variants()}
    print(json.dumps([asdict(r) | {"meant": tensor_cores[r.variant]} for r in found]))
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
