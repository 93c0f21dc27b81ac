"""Compares models on whole rows with the same on rows sharded over ranks: started by
``test_sequence_parallel.py``.

    ranks.py 4 sequence_ranks FOLDER

Rank 0 writes ``FOLDER/compared.pt``: for
each case "model, length, parts" how far outputs and gradients are from those of whole rows,
relative to their largest; and ``FOLDER/sent.pt``: what one forward and backward sends, by length.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from collective_counter import CollectiveCounter
from tiny_runs import MAMBAS, MODELS, loud
from torch.distributed.device_mesh import init_device_mesh

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.sequence_shard import FullSequence, SequenceShard
from earlyfuse.models.context import ForwardSettings
from earlyfuse.models.decoder import Decoder
from earlyfuse.parallel.strategies.context import ContextParallelShard, positions_here

WORDS = 48
RANKS = 4
NAMES = ("dense", "mot", "token_choice", "mixture_of_mamba", "hybrid")
LENGTHS = (4, 24)  # parts of 1 to 12 positions, some below the convolution's reach of 3

# where documents begin in rows of 24 positions, which 4 parts cut at 6, 12 and 18
STARTS = (
    (0,),  # one over all parts
    (0, 6, 12, 18),  # every cut is a start
    (0, 5, 7, 11, 13, 17, 19),  # right before and right behind each cut
    (0, 2, 20),  # over parts 0 to 3, the middle ones without any start
    (0, 1, 2, 3, 4, 5, 8, 9, 10, 23),
)


def batch(length: int, rows: int = len(STARTS)) -> MixedBatch:
    """Rows of ``length``: images here, text there; in the last row each half is of one modality."""
    generator = torch.Generator().manual_seed(length)
    shape = (len(STARTS), length)
    tokens, labels = torch.randint(0, WORDS, (2, *shape), generator=generator)
    modality = torch.randint(0, 2, shape, generator=generator).to(torch.uint8)
    modality[-1] = torch.arange(length) >= length // 2
    documents = torch.zeros(shape, dtype=torch.int32)
    for row, starts in enumerate(STARTS):
        for start in {start * length // 24 for start in starts}:
            documents[row, start:] += 1
    inputs = MixedBatch.of(tokens, modality, documents, labels_BS=labels)
    return MixedBatch(**{name: tensor[:rows] for name, tensor in inputs.tensors().items()})


def outputs_and_gradients(
    model: Decoder, inputs: MixedBatch, shard: SequenceShard
) -> list[torch.Tensor]:
    """Logits, and the gradients of a loss that gives every position another weight."""
    model.zero_grad()
    logits = model(inputs, ForwardSettings(sequence_shard=shard))
    chosen = logits.log_softmax(-1).gather(2, inputs.labels_BS[..., None])
    (chosen.sum() + 0.1 * logits.square().sum()).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def difference(model: Decoder, length: int, mesh) -> float:
    """The largest error, relative to the largest value of its tensor, over this mesh's ranks."""
    expected, *expected_gradients = outputs_and_gradients(model, batch(length), FullSequence())
    expected_gradients = [gradient.clone() for gradient in expected_gradients]
    part = ContextParallelShard(mesh)
    here = positions_here(part, length)
    found, *gradients = outputs_and_gradients(model, batch(length).part(here), part)
    pairs = [(found, expected[:, here])]
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        dist.all_reduce(gradient, group=mesh.get_group())
        pairs.append((gradient, wanted))
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs)


def bytes_sent(model: Decoder, length: int, mesh) -> list[tuple[str, int, int]]:
    """Collectives of one forward and backward of one row."""
    part = ContextParallelShard(mesh)
    inputs = batch(length, rows=1).part(positions_here(part, length))
    with CollectiveCounter() as counter:
        outputs_and_gradients(model, inputs, part)
    return sorted(tuple(call) for call in counter.seen)


def main(root: str) -> None:
    torch.set_num_threads(1)
    folder = Path(root)
    dist.init_process_group("gloo")
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "cp"))
    meshes = {2: pairs["cp"], 4: init_device_mesh("cpu", (4,))}
    compared, sent = {}, {}
    for name in NAMES:
        model = (MODELS | MAMBAS)[name]().build()
        model.init_states()
        loud(model)
        model.double()  # only what is computed differs, not how it is rounded
        for length in LENGTHS:
            for parts, mesh in meshes.items():
                error = torch.tensor(difference(model, length, mesh))
                dist.all_reduce(error, op=dist.ReduceOp.MAX)
                compared[f"{name}, {length}, {parts}"] = float(error)
        model.float()
        sent[name] = {length: bytes_sent(model, length, meshes[4]) for length in (24, 96)}
    if dist.get_rank() == 0:
        torch.save(compared, folder / "compared.pt")
        torch.save(sent, folder / "sent.pt")
    dist.destroy_process_group()
