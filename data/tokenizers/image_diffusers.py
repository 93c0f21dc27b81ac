"""Image tokenizer by a public KL-VAE: the ``AutoencoderKL`` of diffusers (Stable Diffusion, Flux).

A folder as ``save_pretrained`` writes it, ``config.json`` and
``diffusion_pytorch_model.safetensors``, becomes our tokenizer file, in float32. The network is that
of the package diffusers, an optional dependency. Latents are standardised as published models
expect them, ``(z - shift_factor) · scaling_factor``, or by ``latents_mean`` and ``latents_std``.

B images, C latent channels, H pixels and h latents a side.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from earlyfuse.data.json_files import JsonObject, read_json
from earlyfuse.data.tokenizers.image_tokenizer import check_tiling
from earlyfuse.data.tokenizers.image_vectors import LatentTokenizer
from earlyfuse.data.tokenizers.tokenizer_file import LARGEST_SIDE, TokenizerFile, check_tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_REMEDY = "give the vae folder of a Stable Diffusion or Flux model, or copy it again"
_HEADER = 1 << 20  # bytes of names and shapes of tensors
_ACTIVATION = 1 << 25  # values of one activation
_MOST_LEVELS = 8
_CLASS = "AutoencoderKL"
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_FLAGS = ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
# arguments of the network
_NETWORK = (
    "in_channels", "out_channels", "act_fn", "block_out_channels", "layers_per_block",
    "latent_channels", "norm_num_groups", *_BLOCKS, *_FLAGS,
)  # fmt: skip
_LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_UNUSED = ("sample_size", "force_upcast")  # sizes are ours, and all is float32
# of fields that older configs lack
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(_FLAGS, True), "scaling_factor": 0.18215, "shift_factor": None,
    "latents_mean": None, "latents_std": None,
}  # fmt: skip
# tensors of attention in files of before diffusers 0.12
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class DiffusersTokenizer(LatentTokenizer):
    """``settings``: ``image_size``, ``patch`` and ``config``, the fields of config.json."""

    kind = "diffusers"

    def __init__(self, net: Any, settings: dict[str, Any]) -> None:
        config = settings["config"]
        mean_C, std_C = _statistics(config)
        activation = settings["image_size"] ** 2 * config["block_out_channels"][0]
        batch = max(1, _ACTIVATION // activation)
        super().__init__(settings, _factor(config), mean_C, std_C, batch)
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int, patch: int) -> Self:
        """Import ``folder``. ``ValueError`` names a file, field or tensor that does not fit."""
        config = _checked(read_json(folder / CONFIG, _REMEDY))
        check_sizes(config, image_size, patch)
        path, net = folder / WEIGHTS, _network(config)
        expected = net.state_dict()
        most = _HEADER + sum(8 * tensor.numel() for tensor in expected.values())  # of any dtype
        try:
            if (size := path.stat().st_size) > most:
                raise ValueError(
                    f"{path} ({size:,} bytes) is larger than a model of its {CONFIG} can be "
                    f"({most:,}); {_REMEDY}"
                )
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_REMEDY}") from error
        # fp16 and bf16 files exist
        floats = {
            _new_name(name): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        check_tensors(str(path), floats, expected)
        net.load_state_dict(floats, assign=True)
        return cls(net, {"image_size": image_size, "patch": patch, "config": config})

    @classmethod
    def from_file(cls, file: TokenizerFile) -> Self:
        """See ``FileTokenizer``."""
        image_size, patch = (
            file.settings.field(name, int, least=1, most=LARGEST_SIDE)
            for name in ("image_size", "patch")
        )
        config = _checked(file.settings.object("config"))
        check_sizes(config, image_size, patch)
        net = _network(config)
        net.load_state_dict(file.tensors(net.state_dict()), assign=True)
        return cls(net, file.settings.values)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See ``FileTokenizer``."""
        return {name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}

    def latents(self, x_BCHH: torch.Tensor) -> torch.Tensor:
        """See ``LatentTokenizer``."""
        return self.net.encode(x_BCHH).latent_dist.mean

    def pixels(self, z_BChh: torch.Tensor) -> torch.Tensor:
        """See ``LatentTokenizer``."""
        return self.net.decode(z_BChh).sample


def check_folder(folder: Path, image_size: int, patch: int) -> None:
    """``ValueError`` unless ``folder`` can be imported for these sizes; reads no weights."""
    check_sizes(_checked(read_json(folder / CONFIG, _REMEDY)), image_size, patch)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; {_REMEDY}")
    check_installed()


def check_sizes(config: dict[str, Any], image_size: int, patch: int) -> None:
    """``ValueError`` unless latents tile patches, and patches images."""
    check_tiling(image_size, patch)
    check_tiling(patch, _factor(config), ("patch", "pixels of a latent"))


def _checked(config: JsonObject) -> dict[str, Any]:
    """The fields of config.json that decide network and latents, within bounds; others of
    ``AutoencoderKL`` are left out, unknown ones refused.
    """
    if config.field("_class_name", str, default=_CLASS) != _CLASS:
        raise config.wrong("_class_name", f"must be {_CLASS}")
    named = {name: v for name, v in config.values.items() if not name.startswith("_")}
    fields = JsonObject(_DEFAULTS | named, config.where, config.remedy)
    fields.check_names((*_NETWORK, *_LATENTS, *_UNUSED))
    for name in ("layers_per_block", "latent_channels", "norm_num_groups"):
        fields.field(name, int, least=1, most=16 if name == "layers_per_block" else 1 << 10)
    for name in ("in_channels", "out_channels"):
        fields.field(name, int, choices=(3,))
    for name in _FLAGS:
        fields.field(name, bool)
    fields.field("act_fn", str, choices=("silu", "swish"))
    widths, groups = fields.items("block_out_channels", int), fields.values["norm_num_groups"]
    fits = all(0 < width <= 1 << 12 and width % groups == 0 for width in widths)
    if not 1 <= len(widths) <= _MOST_LEVELS or not fits:
        rule = f"must be 1 to {_MOST_LEVELS} multiples of norm_num_groups ({groups}) up to 4096"
        raise fields.wrong("block_out_channels", rule)
    for name, kind in _BLOCKS.items():
        if fields.items(name, str) != [kind] * len(widths):
            raise fields.wrong(name, f"must be {kind} for each of block_out_channels")
    fields.field("scaling_factor", float, least=1e-4, most=1e4)
    if fields.values["shift_factor"] is not None:
        fields.field("shift_factor", float, least=-1e4, most=1e4)
    for name, least in (("latents_mean", -1e4), ("latents_std", 1e-4)):
        if fields.values[name] is not None:
            values = fields.items(name, float)
            channels = fields.values["latent_channels"]
            if len(values) != channels or not all(least <= value <= 1e4 for value in values):
                rule = f"must be {channels} numbers of at least {least}, one for each channel"
                raise fields.wrong(name, rule)
    return {name: fields.values[name] for name in (*_NETWORK, *_LATENTS)}


def _statistics(config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation by which the latents of each channel are standardised."""
    channels, scale = config["latent_channels"], config["scaling_factor"]
    mean = config["latents_mean"] or [config["shift_factor"] or 0.0] * channels
    std = [one / scale for one in config["latents_std"] or [1.0] * channels]
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)


def _factor(config: dict[str, Any]) -> int:
    """Pixels that a latent covers, a side."""
    return 1 << len(config["block_out_channels"]) - 1


def _network(config: dict[str, Any]) -> Any:
    """The network without memory for its weights."""
    check_installed()
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL(**{name: config[name] for name in _NETWORK})


def check_installed() -> None:
    """``ValueError`` without the package diffusers."""
    if find_spec("diffusers") is None:
        raise ValueError(
            "an image tokenizer of kind diffusers needs the package diffusers, which is not "
            "installed: pip install -c constraints.txt -e '.[diffusers]'"
        )


def _new_name(name: str) -> str:
    """Name of a tensor in files of before diffusers 0.12 → name of now."""
    for old, new in _OLD_NAMES.items():
        if f".attentions.0.{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name
