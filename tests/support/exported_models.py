"""Random models of ours as exported folders, and changes to files of models: for conversion."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save_file

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


def described(folder: Path) -> dict:
    """``config.json`` of a folder."""
    return json.loads((folder / "config.json").read_text())


def change_json(path: Path, **changes) -> None:
    """Set fields of a JSON file; a field set to None goes."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in fields.items() if v is not None}))


def change_tensors(path: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load(path.read_bytes())
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def change_state(path: Path, change: Callable[[dict], object]) -> None:
    """Change the values in a file of ``torch.save`` in place."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


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
