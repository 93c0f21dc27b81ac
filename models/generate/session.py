"""Samples documents (text, images, speech, mixed) with a ``Decoder``: tokens from its next-token
logits, items of continuous media by denoising.

Each step reads what was just written, masks what the grammar of the vocabulary does not allow
(``models/generate/constrained.py``), and draws. Documents that have begun an item of vectors wait
until all others have, or are finished; then the items are denoised together
(``models/generate/denoising.py``), and read clean. A decode cache keeps the state of earlier tokens
(``models/generate/readers.py``). Experts are chosen by a causal rule, of causal routers or
thresholds: batch routing would need tokens that are not written yet.

Every document has its own seed and is routed token by token, so it does not depend on the others in
the batch; finished documents leave it.

B documents, R rows of the model (2 B with guidance), V vocabulary, n vectors of an item, P numbers
in a vector.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from earlyfuse.models.context import ForwardSettings, Rule
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.field_checks import check_at_least
from earlyfuse.models.generate.constrained import Draft, Mode, Prompt, allowed_ids
from earlyfuse.models.generate.denoising import Denoising, denoise, noise
from earlyfuse.models.generate.readers import Cached, Rereading
from earlyfuse.models.objectives.diffusion import Diffusion
from earlyfuse.models.routing.router import inference_rule
from earlyfuse.models.vocabulary import Modality, Vocabulary

Agree = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    ``temperature``: 0 takes the most likely token. ``top_p``: nucleus sampling (arXiv 1904.09751);
    1: off. ``top_k``: from the k most likely; 0: off. ``guidance``: classifier-free guidance (arXiv
    2207.12598) of codes and vectors, u + guidance · (c - u), with u the logits after
    begin-of-document and the block so far alone, or the prediction of vectors in a block alone; 1:
    off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, 0, "temperature", "top_k", "guidance")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be in (0, 1]; 1 is off")


def generate(
    model: Decoder, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], **options: Any
) -> list[list[int]]:
    """Returns the tokens that ``write_documents`` writes after each prompt of tokens."""
    drafts = write_documents(model, vocabulary, [Prompt(tokens) for tokens in prompts], **options)
    return [draft.written for draft in drafts]


@torch.no_grad()
def write_documents(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int | Sequence[int],
    mode: Mode = "interleaved",
    sampling: Sampling | None = None,
    denoising: Denoising | None = None,
    seeds: Sequence[int] | None = None,
    rule: Rule | None = None,
    cache: bool = True,
    unused: Sequence[int] = (),
    agree: Agree = lambda values: values,
) -> list[Draft]:
    """Continues each prompt by at most ``new_tokens`` (of each, or one for all); what is new are
    ``written`` and ``vectors`` of the returned drafts.

    ``prompts``: token ids from begin-of-document on, and the vectors of their placeholders.
    ``mode``: "text" or "interleaved" to the end of the document, "image" or "speech" one block with
    its sentinels. ``seeds``: of the documents, by default 0 … B-1. ``rule``: "causal" or
    "threshold", by default the first that the model has (``models/routing/router.py``).
    ``cache=False`` reads the whole document for each token and step of denoising. ``unused``: ids
    that are never written, such as padding rows of an embedding. ``agree``: makes the tokens (B,)
    of a step, and vectors (B, n, P), equal on all ranks that write the same documents.

    ``ValueError`` for prompts that do not begin a document, blocks that do not fit into
    ``new_tokens``, models that lack the rule, and vectors that the model does not have, or predicts
    as numbers that are not finite.
    """
    settings = ForwardSettings(rule=inference_rule(model, rule))
    if not cache and (names := _needing_cache(model)):
        raise ValueError(
            f"cache (False) must be True for this model: {names[0]} decides in another way about "
            "tokens after the prompt"
        )
    sampling, denoising = sampling or Sampling(), denoising or Denoising()
    _check_vectors(model, vocabulary, prompts, denoising)
    seeds = range(len(prompts)) if seeds is None else seeds
    rooms = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    for name, values in (("seeds", seeds), ("new_tokens", rooms)):
        if len(values) != len(prompts):
            raise ValueError(f"{name} ({len(values)}) must be as many as prompts ({len(prompts)})")
    works = [
        _Work(Draft(vocabulary, prompt, mode, room), seed, _draws(seed, room))
        for prompt, room, seed in zip(prompts, rooms, seeds, strict=True)
    ]
    guided = sampling.guidance != 1 and mode != "text" and bool(vocabulary.media)
    reader = Rereading(model, vocabulary, settings)
    if cache:
        longest = max((len(work.draft.tokens) + work.draft.room for work in works), default=0)
        # a row that waits is padded by as many as another row reads
        item = max((m.block + 1 for m in vocabulary.media if m.continuous), default=0)
        reader = Cached(model, vocabulary, settings, longest + item)
    was_training = model.training
    model.eval()
    # shapes change with each token: compiled blocks would recompile
    eager = torch.compiler.set_stance("force_eager") if cache else nullcontext()
    try:
        with eager:
            _write(works, reader, sampling, denoising, guided, unused, agree)
    finally:
        model.train(was_training)
    return [work.draft for work in works]


class NotFinite(ValueError):
    """A model predicts vectors that are not finite."""


class _Work(NamedTuple):
    """A document, its seed, and a number in [0, 1) for each token that it may get."""

    draft: Draft
    seed: int
    draws: torch.Tensor


def _write(
    works: Sequence[_Work],
    reader: Rereading,
    sampling: Sampling,
    denoising: Denoising,
    guided: bool,
    unused: Sequence[int],
    agree: Agree,
) -> None:
    """Writes all documents to their end."""
    going = [work for work in works if not work.draft.done]
    while going:
        rows = [work.draft.row for work in going]
        if guided:
            rows += [work.draft.unconditional for work in going]
        logits_RV = reader.read(rows)
        writing = [row for row, work in enumerate(going) if not work.draft.awaits_vectors]
        if writing:
            if guided:
                in_block = [work.draft.allowed().codes is not None for work in going]
                logits_RV = _guide(logits_RV, in_block, sampling.guidance)
            texts = [going[row] for row in writing]
            _write_tokens(texts, logits_RV[writing], reader.vocabulary, sampling, unused, agree)
        else:
            scale = sampling.guidance if guided else 1.0
            _write_vectors(going, reader, denoising, scale, agree)
        kept = [row for row, work in enumerate(going) if not work.draft.done]
        if len(kept) < len(going):
            reader.select(kept + [len(going) + row for row in kept if guided])
            going = [going[row] for row in kept]


def _write_tokens(
    works: Sequence[_Work],
    logits_BV: torch.Tensor,
    vocabulary: Vocabulary,
    sampling: Sampling,
    unused: Sequence[int],
    agree: Agree,
) -> None:
    """Writes a token to each document."""
    ids_BV = torch.stack([allowed_ids(vocabulary, work.draft.allowed()) for work in works])
    ids_BV[:, list(unused)] = False
    draw_B = torch.stack([work.draws[len(work.draft.written)] for work in works])
    tokens_B = choose(logits_BV, ids_BV.to(logits_BV.device), draw_B, sampling)
    for work, token in zip(works, agree(tokens_B).tolist(), strict=True):
        work.draft.write(token)


def _write_vectors(
    works: Sequence[_Work], reader: Rereading, denoising: Denoising, guidance: float, agree: Agree
) -> None:
    """Denoises an item for each document, all together."""
    drafts = [work.draft for work in works]
    media = [draft.medium for draft in drafts if draft.medium is not None]
    rows = [draft.row for draft in drafts]
    guided = guidance != 1
    if guided:
        rows += [draft.unconditional for draft in drafts]

    def predict(z_BnP: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        if not guided:
            return reader.predict(rows, media, z_BnP, time)
        both_RnP = reader.predict(rows, media * 2, z_BnP.repeat(2, 1, 1), time)
        with_prompt_BnP, without_BnP = both_RnP.chunk(2)
        if not denoising.guides(time):
            return with_prompt_BnP
        return without_BnP + guidance * (with_prompt_BnP - without_BnP)

    shape = max(medium.block for medium in media), reader.width
    seeds, numbers = [work.seed for work in works], [len(draft.items) for draft in drafts]
    z_BnP = noise(seeds, numbers, shape, reader.device)
    vectors_BnP = agree(denoise(predict, z_BnP, _diffusion(reader.model), denoising).contiguous())
    for draft, medium, vectors_MP in zip(drafts, media, vectors_BnP.cpu(), strict=True):
        vectors_nP = vectors_MP[: medium.block]
        if not vectors_nP.isfinite().all():
            raise NotFinite(
                f"the model predicts vectors of {medium.modality.label} that are not finite; use "
                "another checkpoint"
            )
        draft.write_vectors(vectors_nP)


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


def _diffusion(model: Decoder) -> Diffusion:
    assert model.config.vectors is not None, "checked"
    return model.config.vectors.diffusion.build()


def _check_vectors(
    model: Decoder, vocabulary: Vocabulary, prompts: Sequence[Prompt], denoising: Denoising
) -> None:
    """``ValueError`` unless the model has the vectors of vocabulary and prompts, and its schedule
    the steps of denoising.
    """
    continuous = {medium.modality for medium in vocabulary.media if medium.continuous}
    vectors = model.config.vectors
    if continuous != (set() if vectors is None else {Modality(m) for m in vectors.modalities}):
        ours, theirs = (
            " and ".join(sorted(Modality(m).label for m in modalities)) or "no medium"
            for modalities in (continuous, () if vectors is None else vectors.modalities)
        )
        raise ValueError(
            f"there are vectors of {ours} in the vocabulary, and of {theirs} in the model; use the "
            "vocabulary of the model's data"
        )
    if vectors is None:
        return
    _diffusion(model).check_method(denoising.method, denoising.steps)
    for number, prompt in enumerate(prompts):
        if prompt.vectors is not None and prompt.vectors.shape[1:] != (vectors.width,):
            raise ValueError(
                f"vectors {tuple(prompt.vectors.shape)} of prompt {number} must have width "
                f"{vectors.width}, as those that the model was trained on"
            )


def _needing_cache(model: Decoder) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "config", None), "needs_cache", False)
    ]
