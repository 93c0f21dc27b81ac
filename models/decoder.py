"""The decoder: embeddings → blocks → head, over one sequence of text, image and speech tokens.

Chameleon's transformer (arXiv 2405.09818): RMSNorm, SwiGLU, RoPE, qk-norm, untied head. Variants
differ only in what their blocks are composed of (``models/blocks/block.py``).

B rows, S positions, T = B·S tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module, ModuleDict

from earlyfuse.models.batch import MixedBatch, with_shared_positions
from earlyfuse.models.blocks.block import Block
from earlyfuse.models.blocks.branch import Branch, Regrouping, Use
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.blocks.indexed_parameters import embedding
from earlyfuse.models.blocks.linear import RMSNorm, to_local
from earlyfuse.models.blocks.vector_adapters import VectorAdapters, VectorInput, VectorOutput
from earlyfuse.models.context import ForwardContext, ForwardSettings
from earlyfuse.models.depth.depth_router import DepthRouter, Projection
from earlyfuse.models.field_checks import check_positive
from earlyfuse.models.init_weights import Draw, init_weights, normal
from earlyfuse.models.precision import refuse_autocast
from earlyfuse.models.routing.gumbel_noise import name_noises, noise_of_step
from earlyfuse.models.routing.router_stats import OutputNorm
from earlyfuse.models.vocabulary import Modality

# called as loss(hidden_TD, weight_VD) in the head; with ``shard`` under tensor parallelism
Loss = Callable[..., Any]


class Decoder(BaseModel):
    """Tokens of one vocabulary in, logits over the same vocabulary out."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """``modalities``: ids (``models/vocabulary.py``) in the order of the modality groups that
        untied parameters and expert pools refer to. ``seed``: of the initial parameters.
        ``vectors``: adapters of continuous media; without them the model reads none."""

        dim: int
        vocab_size: int
        layers: list[Block.Config]
        modalities: tuple[int, ...] = (0, 1)
        rope_theta: float = 10_000.0
        init_std: float = 0.02
        seed: int = 0
        vectors: VectorAdapters.Config | None = None

        def __post_init__(self) -> None:
            check_positive(self, "rope_theta", "init_std")
            if not self.layers:
                raise ValueError("layers must hold at least one block")
            for index, layer in enumerate(self.layers):
                if layer.dim != self.dim:
                    raise ValueError(
                        f"dim ({layer.dim}) of layers[{index}] must equal dim ({self.dim})"
                    )
            for name, branch in self.named_branches():
                try:
                    branch.check(len(self.modalities))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            if self.vectors is not None:
                self.vectors.check(self.modalities)
                if self.vectors.later_see == "clean" and any(x.mamba for x in self.layers):
                    raise ValueError(
                        'vectors.later_see ("clean") must be "noised" in a model with Mamba: its '
                        "state cannot leave out the noised vectors"
                    )
            shapes = {(r.outputs, r.bias, r.init) for r in self.shared_depth_routers()}
            if len(shapes) > 1:
                raise ValueError(
                    "outputs, bias and init must be equal in all depth routers that are shared, "
                    f"not {sorted(shapes)}"
                )
            if len({layer.attention.head_dim for layer in self.layers if layer.attention}) > 1:
                raise ValueError("head_dim must be equal in all layers: they share rotary angles")

        def for_modalities(self, modalities: Sequence[int]) -> Self:
            """The same model for these ``modalities``; of parameters by modality, those of absent
            ones are left out, and new ones have as many.

            ``ValueError`` if a part does not say how.
            """
            if set(modalities) == set(self.modalities):
                return self
            present = {modality: group for group, modality in enumerate(self.modalities)}
            old = tuple(map(present.get, modalities))
            to = Regrouping(old, tuple(Modality(modality).label for modality in modalities))
            layers = [layer.regrouped(to) for layer in self.layers]
            return replace(self, modalities=tuple(map(int, modalities)), layers=layers)

        def named_branches(self) -> Iterator[tuple[str, Branch.Config]]:
            """All branches in order, named ``layers[3].attention``."""
            for index, layer in enumerate(self.layers):
                for name, branch in layer.branches.items():
                    yield f"layers[{index}].{name}", branch

        @property
        def branch_count(self) -> int:
            """Number of branches, each of which writes into the residual."""
            return len(list(self.named_branches()))

        def even_sizes(self, axis: Literal["tensor", "expert"]) -> dict[str, int]:
            """``Branch.Config.even_sizes`` of all branches, by place and name."""
            return {
                f"{name}.{size}": value
                for name, branch in self.named_branches()
                for size, value in branch.even_sizes(axis).items()
            }

        def check_use(self, use: Use, refused: str) -> None:
            """``ValueError`` beginning with ``refused``, with the reason of the first part that
            refuses ``use``.
            """
            if self.vectors is not None and use == "context_parallel":
                raise ValueError(
                    f"{refused}: vectors: an image may be on two ranks, and its vectors see one "
                    "another both ways; use data_parallel_shard_degree and activation checkpointing"
                )
            for index, layer in enumerate(self.layers):
                if reason := layer.refusal(use):
                    raise ValueError(f"{refused}: layers[{index}].{reason}")

        def shared_depth_routers(self) -> list[DepthRouter.Config]:
            """Depth routers of the layers that share one projection."""
            routers = (layer.depth.router for layer in self.layers if layer.depth is not None)
            return [router for router in routers if router.shared]

        @property
        def head_dim(self) -> int:
            """Width of an attention head, equal in all layers; 0 without attention."""
            return next((layer.attention.head_dim for layer in self.layers if layer.attention), 0)

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Does nothing: the model does not depend on the run's sequence length."""

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, float]:
            """Parameters, and training FLOPs of a token, the mean over modality groups."""
            from earlyfuse.models.flops import mean_training_flops

            return sum(p.numel() for p in model.parameters()), mean_training_flops(self, seq_len)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.default_settings = ForwardSettings()
        self.tok_embeddings: Embedding | None = Embedding(config.vocab_size, config.dim)
        # by index: a block keeps its name on any pipeline stage
        vectors, dim = config.vectors, config.dim
        self.vector_input = None if vectors is None else VectorInput(vectors, dim)
        self.layers = ModuleDict({str(i): layer.build() for i, layer in enumerate(config.layers)})
        shared = config.shared_depth_routers()
        self.depth_projection = Projection(shared[0], config.dim) if shared else None
        self.norm: RMSNorm | None = RMSNorm(config.dim)
        self.lm_head: Head | None = Head(config.vocab_size, config.dim)
        self.vector_output = None if vectors is None else VectorOutput(vectors, dim)
        self.noises = name_noises(self)
        self.output_norm = OutputNorm()

    def keep(self, blocks: range) -> None:
        """Keeps only these blocks, in place, as a pipeline stage: the embedding with the first,
        norm and head with the last. A stage takes ``x_TD`` of the one before and returns its own.
        """
        for index in range(len(self.config.layers)):
            if index not in blocks:
                del self.layers[str(index)]
        if blocks.start > 0:
            self.tok_embeddings = self.vector_input = None
        if blocks.stop < len(self.config.layers):
            self.norm = self.lm_head = self.vector_output = None

    def forward(
        self,
        batch: MixedBatch,
        settings: ForwardSettings | None = None,
        *,
        loss: Loss | None = None,
        cache: DecodeCache | None = None,
        x_TD: torch.Tensor | None = None,
    ) -> Any:
        """Returns logits (B, S, V), or with ``loss`` its result, never materialising logits.

        ``loss`` is called with hidden states (T, D), the head's weight (V, D), and by a model with
        vectors also with ``predicted_TP`` (T, P), its predictions of vectors.

        ``settings``: of the step or call, by default ``default_settings``. With ``cache``, appends
        the tokens to it and returns logits after each row's last token only, (B, 1, V). ``x_TD``:
        activations of the previous pipeline stage. ``ValueError`` under ``torch.autocast``.
        """
        settings, config = settings or self.default_settings, self.config
        device, vectors, skips = batch.modality_BS.device, config.vectors, None
        refuse_autocast(device.type)
        if vectors is not None and vectors.rotary == "shared" and cache is None:
            batch = with_shared_positions(batch)
        context = ForwardContext.build(
            batch,
            settings,
            modalities=config.modalities,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            cache=cache,
            bidirectional=vectors is not None and vectors.bidirectional,
            noised_hidden=vectors is not None and vectors.later_see == "clean",
            noise_2N=noise_of_step(self.noises, settings.step, device) if self.training else None,
            depth_weights=None if self.depth_projection is None else self.depth_projection(),
        )
        if self.tok_embeddings is not None:
            x_TD = self.tok_embeddings(batch.tokens_BS.reshape(-1))
        if self.vector_input is not None:
            assert x_TD is not None, "it is in the stage of the embedding"
            x_TD, skips = self.vector_input(x_TD, batch)
        assert x_TD is not None, "a stage without the embedding takes activations"
        for layer in self.layers.values():
            x_TD = layer(x_TD, context)
        if self.norm is None or self.lm_head is None:
            return x_TD
        if settings.recording:
            self.output_norm.record(x_TD)
        x_BSD = self.norm(x_TD, context).unflatten(0, batch.modality_BS.shape)
        if self.vector_output is not None:
            predicted_TP = self.vector_output(x_BSD.flatten(0, 1), skips)
            loss = None if loss is None else partial(loss, predicted_TP=predicted_TP)
        return self.lm_head(x_BSD if cache is None else cache.last(x_BSD), loss)

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Initial values of all parameters (``models/init_weights.py``); statistics at zero."""
        config = self.config
        init_weights(self, std=config.init_std, branches=config.branch_count, seed=config.seed)
        for module in self.modules():
            if isinstance(module, Module):
                module._init_self_buffers(buffer_device=buffer_device)


class Embedding(Module):
    """Rows of a (V, D) table."""

    tensor_split: ClassVar = {"weight": -1}

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def draws(self) -> dict[str, Draw]:
        """Unit scale: Adam's steps are as large as small rows, and learning is slow."""
        return {"weight": normal(std=1.0)}

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """(T,) ids → (T, D)."""
        return embedding(tokens_T, to_local(self.weight))


class Head(Module):
    """Logits over the vocabulary, or a loss; weight (V, D), not tied to the embedding."""

    tensor_split: ClassVar = {"weight": -2}

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def draws(self) -> dict[str, Draw]:
        return {"weight": normal()}

    def forward(self, x_BSD: torch.Tensor, loss: Loss | None) -> Any:
        """(B, S, D) → logits (B, S, V), or ``loss`` of (B·S, D) and the weight.

        The loss is computed in this module because FSDP has gathered its weight here.
        """
        weight_VD = to_local(self.weight)
        return F.linear(x_BSD, weight_VD) if loss is None else loss(x_BSD.flatten(0, 1), weight_VD)
