"""Samples documents (text, images, speech, mixed) from the next-token logits of a ``Decoder``.

Each step reads the tokens just written, masks what the grammar of the vocabulary does not allow
(``models/generate/constrained.py``), and draws. A decode cache keeps the state of earlier tokens
(``models/blocks/cache.py``). Experts are chosen by a causal rule, of causal routers or thresholds:
batch routing would need tokens that are not written yet.

Every document has its own seed and is routed token by token, so it does not depend on the others in
the batch; finished documents leave it.

B documents, R rows of the model (2 B with guidance), S positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from earlyfuse.models.batch import MixedBatch
from earlyfuse.models.blocks.cache import DecodeCache
from earlyfuse.models.context import ForwardSettings, Rule
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.field_checks import check_at_least
from earlyfuse.models.generate.constrained import Draft, Mode, allowed_ids
from earlyfuse.models.routing.router import inference_rule
from earlyfuse.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    ``temperature``: 0 takes the most likely token. ``top_p``: nucleus sampling (arXiv 1904.09751);
    1: off. ``top_k``: from the k most likely; 0: off. ``guidance``: classifier-free guidance (arXiv
    2207.12598) of codes, u + guidance · (c - u), with u the logits after begin-of-document and the
    block so far alone; 1: off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, 0, "temperature", "top_k", "guidance")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be in (0, 1]; 1 is off")


@torch.no_grad()
def generate(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int | Sequence[int],
    mode: Mode = "interleaved",
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    rule: Rule | None = None,
    cache: bool = True,
    unused: Sequence[int] = (),
    agree: Callable[[torch.Tensor], torch.Tensor] = lambda tokens_B: tokens_B,
) -> list[list[int]]:
    """Returns the continuation of each prompt, at most ``new_tokens`` (of each, or one for all).

    ``prompts``: token ids from begin-of-document on. ``mode``: "text" or "interleaved" to the end
    of the document, "image" or "speech" one block with its sentinels. ``seeds``: of the documents,
    by default 0 … B-1. ``rule``: "causal" or "threshold", by default the first that the model has
    (``models/routing/router.py``). ``cache=False`` reads the whole document for each token.
    ``unused``: ids that are never written, such as padding rows of an embedding. ``agree``: makes
    the tokens (B,) of a step equal on all ranks that write the same documents.

    ``ValueError`` for prompts that do not begin a document, blocks that do not fit into
    ``new_tokens``, and models that lack the rule.
    """
    settings = ForwardSettings(rule=inference_rule(model, rule))
    if not cache and (names := _needing_cache(model)):
        raise ValueError(
            f"cache (False) must be True for this model: {names[0]} decides in another way about "
            "tokens after the prompt"
        )
    sampling = sampling or Sampling()
    seeds = range(len(prompts)) if seeds is None else seeds
    rooms = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    for name, values in (("seeds", seeds), ("new_tokens", rooms)):
        if len(values) != len(prompts):
            raise ValueError(f"{name} ({len(values)}) must be as many as prompts ({len(prompts)})")
    drafts = [
        Draft(vocabulary, prompt, mode, room) for prompt, room in zip(prompts, rooms, strict=True)
    ]
    draws = [_draws(seed, room) for seed, room in zip(seeds, rooms, strict=True)]
    guided = sampling.guidance != 1 and mode != "text" and bool(vocabulary.media)
    longest = max((len(draft.tokens) + draft.room for draft in drafts), default=0)
    reader = _Rereading(model, vocabulary, settings)
    if cache:
        reader = _Cached(model, vocabulary, settings, longest)
    was_training = model.training
    model.eval()
    # shapes change with each token: compiled blocks would recompile
    eager = torch.compiler.set_stance("force_eager") if cache else nullcontext()
    try:
        with eager:
            _write(drafts, draws, reader, sampling, guided, unused, agree)
    finally:
        model.train(was_training)
    return [draft.written for draft in drafts]


def _write(
    drafts: Sequence[Draft],
    draws: Sequence[torch.Tensor],
    reader: "_Rereading",
    sampling: Sampling,
    guided: bool,
    unused: Sequence[int],
    agree: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Writes all drafts to their end."""
    going = [(draft, draw) for draft, draw in zip(drafts, draws, strict=True) if not draft.done]
    while going:
        rows = [draft.tokens for draft, _ in going]
        if guided:
            rows += [draft.unconditional for draft, _ in going]
        logits_BV = reader.read(rows)
        allowed = [draft.allowed() for draft, _ in going]
        if guided:
            in_block = [next_is.codes is not None for next_is in allowed]
            logits_BV = _guide(logits_BV, in_block, sampling.guidance)
        ids_BV = torch.stack([allowed_ids(reader.vocabulary, next_is) for next_is in allowed])
        ids_BV[:, list(unused)] = False
        draw_B = torch.stack([draw[len(draft.written)] for draft, draw in going])
        tokens_B = choose(logits_BV, ids_BV.to(logits_BV.device), draw_B, sampling)
        for (draft, _), token in zip(going, agree(tokens_B).tolist(), strict=True):
            draft.write(token)
        kept = [row for row, (draft, _) in enumerate(going) if not draft.done]
        if len(kept) < len(going):
            reader.select(kept + [len(going) + row for row in kept if guided])
            going = [going[row] for row in kept]


def choose(
    logits_BV: torch.Tensor, allowed_BV: torch.Tensor, draw_B: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """One allowed token for each row, (B,) int64.

    ``logits_BV`` any float, finite or not; ``allowed_BV`` bool, some in each row; ``draw_B``
    float64 in [0, 1): the point of the row's cumulative distribution.
    """
    # float64: cumulative sums over a large vocabulary
    scores_BV = logits_BV.float().nan_to_num(nan=torch.finfo(torch.float32).min).double()
    scores_BV = scores_BV.masked_fill(~allowed_BV, -torch.inf)
    if sampling.temperature == 0:
        return scores_BV.argmax(-1)
    scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / sampling.temperature
    share_BV = scores_BV.softmax(-1)
    order_BV = None
    if sampling.top_p < 1 or sampling.top_k:
        share_BV, order_BV = share_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = share_BV.cumsum(-1) - share_BV
        kept_BV = before_BV < sampling.top_p
        if sampling.top_k:
            kept_BV[:, sampling.top_k :] = False
        share_BV = share_BV * kept_BV
    up_to_BV = share_BV.cumsum(-1)
    total_B1 = up_to_BV[:, -1:]
    # below the total: rounding up would take a token of probability 0 at the end
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(draw_B.to(total_B1.device).unsqueeze(1) * total_B1, below_B1)
    place_B1 = torch.searchsorted(up_to_BV, target_B1, right=True)
    chosen_B1 = place_B1 if order_BV is None else order_BV.gather(1, place_B1)
    return chosen_B1.squeeze(1)


def _draws(seed: int, count: int) -> torch.Tensor:
    """Numbers in [0, 1), float64 on the host; a larger ``count`` only appends."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _guide(logits_RV: torch.Tensor, in_block: Sequence[bool], guidance: float) -> torch.Tensor:
    """Logits with prompts, then without → (B, V), guided where a code is next."""
    with_prompt_BV, without_BV = logits_RV.float().chunk(2)
    guided_BV = without_BV + guidance * (with_prompt_BV - without_BV)
    in_block_B1 = torch.tensor(in_block, device=guided_BV.device).unsqueeze(1)
    return torch.where(in_block_B1, guided_BV, with_prompt_BV)


def _needing_cache(model: Decoder) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "config", None), "needs_cache", False)
    ]


class _Rereading:
    """Next-token logits by a full forward over all rows."""

    def __init__(self, model: Decoder, vocabulary: Vocabulary, settings: ForwardSettings):
        self.model, self.vocabulary, self.settings = model, vocabulary, settings
        self.device = next(model.parameters()).device

    def read(self, rows: list[list[int]]) -> torch.Tensor:
        """Next-token logits (R, V) of each row."""
        tokens_RS, real_R = self._padded(rows)
        batch = MixedBatch.of(tokens_RS, self.vocabulary.modality_of(tokens_RS))
        logits_RSV = self.model(batch, self.settings)
        return logits_RSV[torch.arange(len(rows), device=self.device), real_R - 1]

    def select(self, kept: list[int]) -> None:
        """Keeps these rows; nothing is cached."""

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, S), filled from the left, and the length of each row, (R,)."""
        longest = max(map(len, rows))
        padded = [row + [self.vocabulary.pad] * (longest - len(row)) for row in rows]
        lengths = [len(row) for row in rows]
        return torch.tensor(padded, device=self.device), torch.tensor(lengths, device=self.device)


class _Cached(_Rereading):
    """Reads with a decode cache: takes the last token of each row, after the first call.

    A row may also begin another document, with its first token.
    """

    def __init__(
        self, model: Decoder, vocabulary: Vocabulary, settings: ForwardSettings, slots: int
    ):
        super().__init__(model, vocabulary, settings)
        model.config.check_use("decoding", "the model cannot generate with a cache (cache=True)")
        self.slots = slots
        self.cache: DecodeCache | None = None

    def read(self, rows: list[list[int]]) -> torch.Tensor:
        """Next-token logits (R, V) of each row."""
        if self.cache is None:
            self.cache = DecodeCache(len(rows), self.slots)
            new = rows
        else:
            new = [row[-1:] for row in rows]
        tokens_RS, real_R = self._padded(new)
        before = [len(row) - len(tokens) for row, tokens in zip(rows, new, strict=True)]
        before_R = torch.tensor(before, device=self.device)
        positions_RS = before_R[:, None] + torch.arange(tokens_RS.shape[1], device=self.device)
        self.cache.start_step(real_R, max(map(len, rows)), before_R == 0)
        batch = MixedBatch.of(
            tokens_RS, self.vocabulary.modality_of(tokens_RS), positions_BS=positions_RS
        )
        return self.model(batch, self.settings, cache=self.cache).squeeze(1)

    def select(self, kept: list[int]) -> None:
        """Keeps the cache of these rows."""
        if self.cache is not None and kept:
            self.cache.select(torch.tensor(kept, device=self.device))
