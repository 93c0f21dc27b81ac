"""Seeds dropout from the step and from the rows, positions and blocks that a rank holds.

Ranks with other rows, positions or blocks draw other masks; the ranks of a tensor-parallel group
compute the same activations and draw the same. No step depends on earlier ones, so a resumed run
draws the masks of the unbroken run.
"""

import hashlib

import torch
from torchtitan.distributed import ParallelDims

AXES = ("batch", "cp", "pp")  # of the mesh: rows, positions, blocks


def seed_dropout(seed: int, step: int, parallel_dims: ParallelDims) -> None:
    """Seed torch's generators for all micro-batches of ``step`` on this rank."""
    meshes = (parallel_dims.get_optional_mesh(axis) for axis in AXES)
    place = [0 if mesh is None else mesh.get_local_rank() for mesh in meshes]
    digest = hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
