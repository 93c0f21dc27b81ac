"""Names and layouts of public checkpoints and of ours, both ways; ``load_model`` loads any of them.

``recipes``: what a conversion is. ``folders``: what is in a folder. ``huggingface``, ``meta``:
names, layouts and configs of the two. ``*_files``: the files themselves, tensor by tensor.
"""

from earlyfuse.models.state_dicts.folders import Opened, load_model, open_model

__all__ = ["Opened", "load_model", "open_model"]
