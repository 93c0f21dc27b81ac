"""Dropout masks and routing decisions of two ranks: started by ``test_choices.py``.

    ranks.py 2 choice_ranks FOLDER

``FOLDER`` holds toy data in ``data``; rank N writes ``FOLDER/choices-N.pt``: by layout what
``dropped`` returns, by model what ``chosen`` does.
"""

from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from layouts import whole
from tiny_runs import MODELS, changed, tiny_config
from torch.nn import functional

from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.parallel.trainer import Trainer

LAYOUTS = {
    "rows": {},
    "tensors": {"tensor_parallel_degree": 2},
    "positions": {"context_parallel_degree": 2},
}
ROUTED = ("moma_causal", "token_choice")


def trainer_of(folder, name, model, dtype="float32", **parallelism):
    fields = {f"parallelism.{field}": value for field, value in parallelism.items()}
    fields |= {"training.mixed_precision_param": dtype, "training.global_batch_size": 8}
    fields |= {"metrics.log_freq": 100, "checkpoint.enable": False, "validator.enable": False}
    fields |= {"metrics.enable_tensorboard": False, "validator.batch_rows": 8}
    return Trainer(changed(tiny_config(folder / name, folder / "data", model), fields))


def step(trainer):
    trainer.step = 2  # step 1 would log
    trainer.train_step(trainer.batch_generator(trainer.dataloader))
    trainer.close()


def dropped(folder, name):
    """Dropout masks of each branch of each block, over all micro-batches."""
    model, places = MODELS["dense"](), []
    for layer in model.layers:
        layer.dropout = 0.5
    dropout = functional.dropout

    def noted(x, *others):
        places.append(dropout(torch.ones_like(x), *others) == 0)
        return x * ~places[-1]

    trainer = trainer_of(folder, name, model, **LAYOUTS[name])
    with mock.patch.object(functional, "dropout", noted):
        step(trainer)
    return torch.stack(places)


def chosen(folder, name):
    """For each router of a step in bf16: its name, its routes, those in fp32, the logits of its
    causal router, those in fp32, and the types of its parameters."""
    trainer = trainer_of(folder, name, MODELS[name](), "bfloat16")
    plain = MODELS[name]().build()
    plain.load_state_dict({n: whole(t) for n, t in trainer.model.state_dict().items()})
    found = []

    def note(router, inputs, routes, name, fp32):
        x_TD, *others = inputs
        if hasattr(router, "noise"):
            fp32.noise = router.noise  # of this step
        with torch.no_grad():
            logits = [one.causal(x_TD) for one in (router, fp32) if hasattr(one, "causal")]
            expected = fp32(x_TD, *others)
        types = {parameter.dtype for parameter in router.parameters()}
        routes, expected = (tuple(t.detach() for t in made) for made in (routes, expected))
        found.append((name, routes, expected, logits, types))

    for place, pool in trainer.model.named_modules():
        if isinstance(pool, ExpertPool):
            fp32 = plain.get_submodule(place).router
            # before FSDP takes its parameters away again
            pool.router.register_forward_hook(partial(note, name=place, fp32=fp32), prepend=True)
    step(trainer)
    return found


def main(root):
    torch.set_num_threads(1)
    folder = Path(root)
    results = {
        "dropped": {name: dropped(folder, name) for name in LAYOUTS},
        "chosen": {name: chosen(folder, name) for name in ROUTED},
    }
    torch.save(results, folder / f"choices-{dist.get_rank()}.pt")
    dist.destroy_process_group()
