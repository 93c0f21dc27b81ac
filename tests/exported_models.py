"""Random models of ours as exported folders: for tests of conversion."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.modality import MediaCodes, Modality, Vocabulary
from earlyfuse.models.state_dicts import exported
from earlyfuse.models.state_dicts.recipes import Entry
from earlyfuse.models.state_dicts.safetensors_files import assign_files, write_folder

VOCABULARY = Vocabulary(
    size=48, bos=0, eos=1, pad=2, media=(MediaCodes(Modality.IMAGE, 32, 16, 3, 4, 4),)
)


def export(config: Decoder.Config, folder: Path) -> torch.nn.Module:
    """A random model of ours as an exported folder."""
    model = config.build()
    model.init_states()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.3)
    folder.mkdir()
    write(folder, model.state_dict())
    vocabulary = replace(VOCABULARY, size=config.vocab_size)
    description = exported.describe(config, vocabulary, {"step": 7})
    (folder / "config.json").write_text(json.dumps(description))
    return model.eval()


class InMemory:
    """A dict as tensors by name."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name):
        return self.tensors[name].detach()


def write(folder: Path, tensors: dict[str, torch.Tensor], max_bytes: int = 10**9) -> None:
    source = InMemory(tensors)
    write_folder(folder, source, assign_files(source.entries, max_bytes))
