"""Models that exist, trained further or upcycled, on data of your own (``--start.model FOLDER``)

Sizes come from the model (``configs/start_model.py``). ``pretrained`` keeps its form, and
``--start.upcycle FORM`` gives it another; any other config gives it that config's form and recipe.
The recipe here is one for short runs, not a paper's: AdamW, 1e-4 to a tenth along a cosine.
"""

from earlyfuse.configs.base import base_config
from earlyfuse.configs.decoders import Shape, dense
from earlyfuse.parallel.trainer import Trainer
from earlyfuse.parallel.training.lr_schedule import LearningRate
from earlyfuse.parallel.training.warm_start import WarmStart


def pretrained() -> Trainer.Config:
    """the model of --start.model as it is, trained further; its default"""
    placeholder = Shape(dim=64, layers=1, heads=1, hidden_dim=64, vocab_size=320)
    config = base_config("pretrained", dense(placeholder), lr=1e-4)
    config.start = WarmStart.Config(upcycle="none")
    config.lr_scheduler = LearningRate.Config(
        warmup_steps=100, decay_type="cosine", min_lr_factor=0.1
    )
    training = config.training
    training.local_batch_size, training.seq_len, training.steps = 4, 1024, 1000
    config.checkpoint.interval = config.validator.freq = 500
    return config
