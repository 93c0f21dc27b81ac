"""Dropout's random numbers: of a step, and of the rows, positions and blocks that a rank has.

Ranks that hold different rows, other positions of the same rows, or other blocks drop different
places; those of a tensor-parallel group compute the same activations and must drop the same. A step
does not depend on the steps before it, so that a resumed run draws what the unbroken one would.
"""

import hashlib

import torch
from torchtitan.distributed import ParallelDims

APART = ("batch", "cp", "pp")  # mesh axes: rows, positions, blocks


def seed_dropout(seed: int, step: int, parallel_dims: ParallelDims) -> None:
    """Seed torch's generators for all micro-batches of ``step`` on this rank."""
    meshes = (parallel_dims.get_optional_mesh(axis) for axis in APART)
    place = [0 if mesh is None else mesh.get_local_rank() for mesh in meshes]
    digest = hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
