"""Random models of ours as exported folders: for tests of conversion."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load

from earlyfuse.models.decoder import Decoder
from earlyfuse.models.state_dicts import config_json
from earlyfuse.models.state_dicts.tensor_map import StateDict
from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary
from earlyfuse.parallel.checkpoint.files.safetensors import assign_files, write_folder

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
    description = config_json.describe(config, vocabulary, {"step": 7})
    (folder / "config.json").write_text(json.dumps(description))
    return model.eval()


def write(folder: Path, tensors: dict[str, torch.Tensor], max_bytes: int = 10**9) -> None:
    source = StateDict(tensors)
    write_folder(folder, source, assign_files(source.entries, max_bytes))


def saved(model: torch.nn.Module, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def assert_same_files(left: Path, right: Path, *except_for: str) -> None:
    found, expected = files_of(left), files_of(right)
    assert found.keys() == expected.keys()
    different = [name for name in found if found[name] != expected[name]]
    assert sorted(different) == sorted(except_for)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [load(path.read_bytes()) for path in folder.glob("model*.safetensors")]
    return {name: tensor for held in files for name, tensor in held.items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    wrong = [name for name in left if not torch.equal(left[name], right[name])]
    assert wrong == []
