"""Constrained decoding: which tokens may follow in a document, by the grammar of the vocabulary.

    document = bos (text piece | media block)* eos
    media block = begin, codes (separator, codes)*, end

bos and eos may be one id, as GPT-2's and GPT-NeoX's ``<|endoftext|>``: the first token begins the
document, the next such token ends it. An item has exactly ``MediaCodes.block`` codes, or any number
from 1 where that is 0. A block of several is a video, whose frames a separator divides; a prompt
may hold one, and in mode "interleaved" a model may write one of codes if the vocabulary has a
separator. Whatever a model prefers, the result is a document or the beginning of one.

An item of a continuous medium is its placeholder ``block`` times, with a vector for each. It is
written as a whole, with the end of its block: no model learns what follows a vector.

V vocabulary, n vectors of an item, P numbers in a vector.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from earlyfuse.models.vocabulary import MediaCodes, Modality, Vocabulary

Mode = str  # "text", "interleaved", or the label of a medium for one block of it
DOCUMENT_MODES = ("text", "interleaved")  # to the end of the document


class Allowed(NamedTuple):
    """Choices for the next token.

    ``text``: a text piece or eos; ``begin``: begin of one of these media; ``codes``: a code of this
    medium; ``end``: the end of its block; ``separator``: before the next frame of this medium.
    """

    text: bool = False
    begin: tuple[MediaCodes, ...] = ()
    codes: MediaCodes | None = None
    end: MediaCodes | None = None
    separator: MediaCodes | None = None


@lru_cache(maxsize=64)
def allowed_ids(vocabulary: Vocabulary, allowed: Allowed) -> torch.Tensor:
    """(V,) bool, cached: do not write to it."""
    allowed_V = torch.zeros(vocabulary.size, dtype=torch.bool)
    if allowed.text:
        allowed_V |= vocabulary.modality_of(torch.arange(vocabulary.size)) == Modality.TEXT
        sentinels = [s for medium in vocabulary.media for s in medium.sentinels]
        allowed_V[[vocabulary.bos, vocabulary.pad, *sentinels]] = False
        allowed_V[vocabulary.eos] = True
    allowed_V[[medium.begin for medium in allowed.begin]] = True
    if allowed.codes is not None:
        allowed_V[allowed.codes.start : allowed.codes.start + allowed.codes.count] = True
    if allowed.end is not None:
        allowed_V[allowed.end.end] = True
    if allowed.separator is not None:
        allowed_V[allowed.separator.separator] = True
    return allowed_V


class Item(NamedTuple):
    """Vectors (n, P) of an item of a continuous medium, and the place of the first of them."""

    start: int
    vectors: torch.Tensor


class Row(NamedTuple):
    """Tokens that a model reads, and the vectors of their continuous items, in order."""

    tokens: list[int]
    items: list[Item]

    def part(self, start: int) -> "Row":
        """The tokens and items after the first ``start`` tokens."""
        later = [Item(at - start, vectors) for at, vectors in self.items if at >= start]
        return Row(self.tokens[start:], later)


class Prompt(NamedTuple):
    """Tokens from begin-of-document on; a vector for each placeholder among them, (…, P)."""

    tokens: Sequence[int]
    vectors: torch.Tensor | None = None


class Draft:
    """A document being written: its tokens and vectors, its state in the grammar, and whether it is
    ``done``.

    ``mode``: "text" writes text to the end of the document, "interleaved" anything, the label of a
    medium ("image", "speech") one block of it. ``room``: tokens that may be added; no block is
    begun that would not fit.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt: Prompt | Sequence[int], mode: Mode, room: int
    ):
        self.vocabulary = vocabulary
        self.tokens: list[int] = []
        self.items: list[Item] = []
        self.medium: MediaCodes | None = None
        self.begun = self.item = 0  # where the open block and its last item begin
        self.done = False
        tokens, vectors = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        _check_request(vocabulary, tokens, mode, room)
        # prompts may have any content, whatever the mode
        self.mode: Mode = "interleaved"
        self.room = sys.maxsize
        self.reading = True
        for token in tokens:
            if not self._fits(token):
                raise ValueError(
                    f"token {len(self.tokens)} of the prompt ({token}) is not allowed there: "
                    f"{self._expected()}"
                )
            self.write(token)
        if self.done:
            raise ValueError("a prompt that has ended with eos cannot be continued")
        self.items = _items(vocabulary, tokens, vectors)
        self.prompt, self.mode, self.room = len(tokens), mode, room
        self.done, self.reading = room == 0, False
        if self.medium is not None:
            # a block of any length may end after its first code
            missing = self.medium.block - self._codes() if self.medium.block else not self._codes()
            _check_room(room, missing + 1)
            if self.medium.continuous and missing not in (0, max(self.medium.block, 1)):
                raise ValueError(
                    f"the prompt ends inside an item of {self.medium.modality.label} with "
                    f"{self._codes()} of {self.medium.block} vectors; give whole items"
                )
        elif mode not in DOCUMENT_MODES:
            medium = vocabulary.medium(Modality[mode])
            _check_room(room, max(medium.block, 1) + 2)
            self.write(medium.begin)
        if self.awaits_vectors and self.medium is not None and not self.medium.block:
            raise ValueError(
                f"{self.medium.modality.label} cannot be written: its items are of any number of "
                'vectors, and a model does not learn when one ends; write "text"'
            )

    @property
    def written(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt :]

    @property
    def vectors(self) -> torch.Tensor | None:
        """Vectors of the tokens after the prompt, (…, P), in order; None if there are none."""
        written = [item.vectors for item in self.items if item.start >= self.prompt]
        return torch.cat(written) if written else None

    @property
    def row(self) -> Row:
        """The whole document so far."""
        return Row(self.tokens, self.items)

    @property
    def unconditional(self) -> Row:
        """The document without its prompt, for guidance: bos and the open block so far. Of a block
        of vectors there is no bos, as in training, where a document begins anew with the block.
        """
        if self.medium is None:
            return Row([self.tokens[0]], [])
        block = self.row.part(self.begun)
        return block if self.medium.continuous else Row([self.tokens[0], *block.tokens], [])

    @property
    def awaits_vectors(self) -> bool:
        """True if an item of a continuous medium is next."""
        return (
            self.medium is not None
            and self.medium.continuous
            and not self._codes()
            and not self.done
        )

    def allowed(self) -> Allowed:
        """Choices for the next token."""
        medium = self.medium
        if medium is None:
            return Allowed(text=True, begin=self._openable())
        if medium.block:
            end = self._codes() == medium.block
            codes = not end
        else:
            codes, end = self.room > 1, self._codes() > 0
        # a separator, codes (one at least) and end
        another = end and self.mode == "interleaved" and self.room >= max(medium.block, 1) + 2
        if medium.continuous and not self.reading:
            codes, another = codes and not self._codes(), False
        return Allowed(
            codes=medium if codes else None,
            end=medium if end else None,
            separator=medium if another and medium.separator is not None else None,
        )

    def write(self, token: int) -> None:
        """Add a token that is allowed."""
        self.tokens.append(token)
        self.room -= 1
        if self.medium is None:
            opened = [medium for medium in self.vocabulary.media if medium.begin == token]
            if opened:
                (self.medium,) = opened
                self.begun = self.item = len(self.tokens) - 1
            self.done = token == self.vocabulary.eos and len(self.tokens) > 1
        elif token == self.medium.end:
            self.medium = None
            self.done = self.mode not in DOCUMENT_MODES
        elif token == self.medium.separator:
            self.item = len(self.tokens) - 1
        self.done = self.done or self.room <= 0

    def write_vectors(self, vectors_nP: torch.Tensor) -> None:
        """Add the item that ``awaits_vectors``, and the end of its block."""
        assert self.awaits_vectors and self.medium is not None, "no item of vectors is next"
        medium = self.medium
        self.items.append(Item(len(self.tokens), vectors_nP))
        for token in [medium.start] * len(vectors_nP) + [medium.end]:
            self.write(token)

    def _codes(self) -> int:
        """Codes of the open item so far."""
        return len(self.tokens) - self.item - 1

    def _openable(self) -> tuple[MediaCodes, ...]:
        if self.mode != "interleaved":
            return ()
        # begin, codes (one at least) and end
        return tuple(
            m
            for m in self.vocabulary.media
            if self.room >= max(m.block, 1) + 2 and (m.block or self.reading or not m.continuous)
        )

    def _fits(self, token: int) -> bool:
        """True if the prompt may continue with ``token``."""
        if not self.tokens:
            return True  # bos, already checked
        if self.done or not 0 <= token < self.vocabulary.size:
            return False
        return bool(allowed_ids(self.vocabulary, self.allowed())[token])

    def _expected(self) -> str:
        if self.done:
            return "the document has ended"
        if self.medium is None:
            return "text or the beginning of a block is expected"
        label, codes = self.medium.modality.label, self._codes()
        whole = f" of {self.medium.block}" if self.medium.block else ""
        return f"it is in a block of {label} with {codes} codes{whole} so far"


def _items(
    vocabulary: Vocabulary, tokens: Sequence[int], vectors: torch.Tensor | None
) -> list[Item]:
    """The continuous items of a prompt; ``ValueError`` unless each placeholder has a vector."""
    places = [n for n, token in enumerate(tokens) if token in vocabulary.placeholders]
    given = 0 if vectors is None else len(vectors)
    if given != len(places):
        raise ValueError(
            f"vectors ({given}) of a prompt must be as many as its placeholders ({len(places)})"
        )
    if vectors is None:
        return []
    if vectors.ndim != 2 or not vectors.isfinite().all():
        raise ValueError("vectors of a prompt must be a finite array with a row for each of them")
    inside = set(places)
    firsts = [n for n, place in enumerate(places) if place - 1 not in inside]
    return [
        Item(places[first], vectors[first:stop].float())
        for first, stop in pairwise([*firsts, len(places)])
    ]


def _check_request(vocabulary: Vocabulary, prompt: Sequence[int], mode: str, room: int) -> None:
    modes = (*DOCUMENT_MODES, *(m.label for m in Modality if m != Modality.TEXT))
    if mode not in modes:
        raise ValueError(f"mode ({mode!r}) must be one of {', '.join(modes)}")
    if room < 0:
        raise ValueError(f"new_tokens ({room}) must not be negative")
    if not prompt or prompt[0] != vocabulary.bos:
        raise ValueError(
            f"a prompt must begin with begin-of-document ({vocabulary.bos}), not with "
            f"{prompt[0] if prompt else 'nothing'}"
        )
    if mode not in DOCUMENT_MODES and Modality[mode] not in vocabulary.modalities:
        raise ValueError(
            f"mode ({mode!r}) needs a vocabulary with {mode} codes; this one has "
            f"{[m.label for m in vocabulary.modalities]} only"
        )


def _check_room(room: int, needed: int) -> None:
    if room < needed:
        raise ValueError(f"new_tokens ({room}) must be at least {needed} to complete the block")
