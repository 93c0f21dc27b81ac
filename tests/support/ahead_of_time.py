"""Compiles every Triton kernel for three GPU generations, without a GPU, and reports its resources.

    python tests/support/ahead_of_time.py            checks all and prints the table
    python tests/support/ahead_of_time.py --write    and writes it into tests/kernels/compiled.md

Registers, stack and local memory (spills), shared memory, tensor-core instructions and loads by the
tensor memory accelerator are read from the machine code of each variant (``kernel_variants.py``).

The table carries a fingerprint of the kernels it was made from. With it the tests know that all
variants passed on all targets since a kernel last changed, and compile only a sample again.
"""

import argparse
import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from kernel_variants import Variant, variants
from places import ROOT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = ROOT / "kernels"
TABLE = ROOT / "tests" / "kernels" / "compiled.md"
INTRODUCTION = """\
# Compiled Triton kernels

Registers of a thread / KiB of shared memory of a block, with the pinned Triton. Written by
`python tests/support/ahead_of_time.py --write`, which first checks every variant on every target.
"""


@dataclass(frozen=True)
class Target:
    """A GPU generation: compute capability, shared memory a block may have, tensor-core opcode."""

    capability: int
    shared_bytes: int
    tensor_core: str

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"


# CUDA C++ Programming Guide, table of technical specifications per compute capability
TARGETS = (
    Target(80, 163 * 1024, "HMMA"),
    Target(90, 227 * 1024, "HGMMA"),
    Target(100, 227 * 1024, "UTC[A-Z]*MMA"),
)


@dataclass(frozen=True)
class Resources:
    """Resources of one variant on one target; instructions are counted only where the variant
    must use tensor cores or TMA, else 0.
    """

    variant: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    tma_loads: int


def compiled(variant: Variant, target: Target) -> Resources:
    """Compile one variant for one target."""
    kernel = variant.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # under autotune and heuristics
    names = [p.name for p in kernel.params]
    pointers = [name for name, kind in variant.types.items() if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={name: variant.types.get(name, "constexpr") for name in names},
        constexprs={name: variant.constants[name] for name in names if name not in variant.types},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in (*pointers, *variant.aligned)
        },
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", target.capability, 32),
        options={
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            "maxnreg": variant.registers,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = _cuobjdump("-res-usage", file.name)
        # slow to print: only where it is checked
        checked = variant.tensor_cores or variant.tma
        code = _cuobjdump("-sass", file.name) if checked else ""
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        variant=variant.name,
        target=target.name,
        registers=counts["REG"],
        spilled_bytes=counts["STACK"] + counts["LOCAL"],
        shared_bytes=binary.metadata.shared,
        tensor_core_instructions=len(re.findall(rf"\s{target.tensor_core}[.\s]", code)),
        tma_loads=len(re.findall(r"\sUTMALDG[.\s]", code)),
    )


def _cuobjdump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def all_jobs() -> list[tuple[int, Target]]:
    """Every variant, by number, on every target that supports it."""
    return [
        (number, target)
        for number, variant in enumerate(variants())
        for target in TARGETS
        if target.capability >= variant.oldest
    ]


def sample_jobs() -> list[tuple[int, Target]]:
    """The first variant of each kernel, with and without TMA, on every target; bf16 before fp32."""
    first: dict[tuple[Any, bool], int] = {}
    by_type = sorted(enumerate(variants()), key=lambda item: "*fp32" in item[1].types.values())
    for number, variant in by_type:
        first.setdefault((variant.kernel, variant.tma), number)
    chosen = set(first.values())
    return [(number, target) for number, target in all_jobs() if number in chosen]


def compile_all(jobs: Sequence[tuple[int, Target]], workers: int | None = None) -> list[Resources]:
    """Resources of the ``jobs``, in order."""
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_compile_numbered, *zip(*jobs, strict=True)))


def _compile_numbered(number: int, target: Target) -> Resources:
    return compiled(variants()[number], target)  # kernels do not travel between processes


def faults(found: Sequence[Resources]) -> list[str]:
    """Broken rules: spills, too much shared memory, tensor cores or TMA missing or unexpected."""
    expected = {variant.name: variant for variant in variants()}
    limits = {target.name: target.shared_bytes for target in TARGETS}
    wrong = []
    for r in found:
        at, variant = f"{r.variant} on {r.target}", expected[r.variant]
        if r.spilled_bytes:
            wrong.append(f"{at}: {r.spilled_bytes} bytes spilled")
        if r.shared_bytes > limits[r.target]:
            wrong.append(f"{at}: {r.shared_bytes} bytes of shared memory")
        if variant.tensor_cores and not r.tensor_core_instructions:
            wrong.append(f"{at}: no tensor-core instruction")
        if variant.tma != (r.tma_loads > 0):
            wrong.append(f"{at}: {r.tma_loads} loads by TMA")
    return wrong


def fingerprint() -> str:
    """Sixteen hex digits over the variants and the code of all kernels, without comments."""
    parts = [
        repr({name: value for name, value in vars(variant).items() if name != "kernel"})
        for variant in variants()
    ]
    for path in sorted(KERNELS.glob("**/triton*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and _is_kernel(node):
                node.body = node.body[ast.get_docstring(node) is not None :]
                parts.append(ast.dump(node))
            elif isinstance(node, ast.Assign | ast.AnnAssign):  # constants that kernels read
                parts.append(ast.dump(node))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_kernel(node: ast.FunctionDef) -> bool:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    return bool(decorators - {"launcher", "on_its_device"})


def table(resources: list[Resources]) -> str:
    """Markdown: a row per variant; registers / shared KiB on each target."""
    targets = [target.name for target in TARGETS]
    rows: dict[str, dict[str, str]] = {}
    for found in resources:
        kib = found.shared_bytes / 1024
        rows.setdefault(found.variant, {})[found.target] = f"{found.registers} / {kib:.4g}"
    return "\n".join(_table_lines(rows, targets)) + "\n"


def _table_lines(rows: dict[str, dict[str, str]], targets: list[str]) -> Iterator[str]:
    yield f"| kernel | {' | '.join(targets)} |"
    yield "|---" * (len(targets) + 1) + "|"
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells.get(target, '–') for target in targets)} |"


def main() -> None:
    """Check everything; print the table, or write it into ``TABLE``."""
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel for sm_80, sm_90 and sm_100; no GPU is needed.",
    )
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    found = compile_all(all_jobs())
    if wrong := faults(found):
        sys.exit("\n".join(wrong))
    text = f"Kernels {fingerprint()}.\n\n{table(found)}"
    if arguments.write:
        TABLE.write_text(f"{INTRODUCTION}\n{text}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
