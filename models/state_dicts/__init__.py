"""Names and layouts of public checkpoints and of ours, both ways; ``load_model`` loads any of them.

``recipes``: what a conversion is. ``folders``: what is in a folder. ``huggingface``, ``meta``,
``mamba_ssm`` …: names, layouts and configs of others. ``mixture_of_mamba``: single mixers of the
public code. ``*_files``: the files themselves, tensor by tensor.
"""

from earlyfuse.models.state_dicts.folders import Opened, load_model, open_model
from earlyfuse.models.state_dicts.mixture_of_mamba import load_mixture_of_mamba

__all__ = ["Opened", "load_mixture_of_mamba", "load_model", "open_model"]
