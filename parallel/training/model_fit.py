"""Fits the model of a run to its data, whatever numbers its config has: the size of the vocabulary,
modalities, the shape of vectors, the budgets of experts by modality.

``ValueError`` where a model cannot read the data, with the remedy.
"""

from collections.abc import Iterator
from dataclasses import replace

from earlyfuse.data.media import Vectors
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.mixture import Mixture
from earlyfuse.models.blocks.experts import ExpertPool
from earlyfuse.models.blocks.vector_adapters import VectorAdapters
from earlyfuse.models.decoder import Decoder
from earlyfuse.models.vocabulary import Modality, Vocabulary


def fit_vocabulary(model: Decoder.Config, vocabulary: Vocabulary) -> Decoder.Config:
    """``model`` with the ids and modalities of the data's ``vocabulary``."""
    continuous = () if model.vectors is None else model.vectors.modalities  # ``fit_vectors`` checks
    modalities = sorted({*map(int, vocabulary.modalities), *continuous})
    try:
        model = model.for_modalities(modalities)
    except ValueError as error:
        labels = ", ".join(m.label for m in vocabulary.modalities)
        raise ValueError(f"the data have {labels}, and the model cannot: {error}") from error
    return replace(model, vocab_size=vocabulary.size)


def fit_vectors(model: Decoder.Config, source: TokenSource) -> Decoder.Config:
    """``model`` with adapters for the shape of the vectors of ``source``."""
    adapters, found = model.vectors, source.vectors
    if adapters is None and found is None:
        return model
    if adapters is None:
        assert found is not None
        raise ValueError(
            f"source {source.folder} has continuous vectors ({', '.join(found.media)}), "
            "which a model without vectors does not read; train one with vectors, or prepare with "
            "a tokenizer of codes"
        )
    if found is None:
        raise ValueError(
            f"model vectors (of width {adapters.width}) need data with continuous vectors, and "
            f"source {source.folder} has none; prepare with --image-tokenizer pixels or vae, "
            "or train a model without"
        )
    return replace(model, vectors=_of_shape(adapters, found, source))


def _of_shape(
    adapters: VectorAdapters.Config, found: Vectors, source: TokenSource
) -> VectorAdapters.Config:
    """``adapters`` of the width, channels and vectors of an item that ``source`` has."""
    labels = {Modality(modality).label for modality in adapters.modalities}
    if labels != set(found.media):
        raise ValueError(
            f"model vectors.modalities ({', '.join(sorted(labels))}) must be the continuous media "
            f"of source {source.folder} ({', '.join(found.media)}); train a config for these"
        )
    blocks = {source.vocabulary.medium(Modality[label]).block for label in found.media}
    if adapters.block and blocks == {0} | blocks:
        raise ValueError(
            f"model vectors.block ({adapters.block}) needs items of one size, and those of source "
            f"{source.folder} have any number of vectors; train a config without block"
        )
    if adapters.block and len(blocks) > 1:
        raise ValueError(
            f"model vectors.block ({adapters.block}) needs media of one size, and those of source "
            f"{source.folder} have {sorted(blocks)} vectors; train a config without block"
        )
    try:
        return replace(
            adapters,
            width=found.width,
            channels=found.channels if adapters.channels else 0,
            block=blocks.pop() if adapters.block else 0,
        )
    except ValueError as error:
        raise ValueError(f"vectors of source {source.folder} do not fit the model: {error}") from (
            error
        )


def fit_shares(model: Decoder.Config, mixture: Mixture) -> Decoder.Config:
    """``model`` whose experts by modality have budgets for the tokens that ``mixture`` gives."""
    by_label = mixture.modality_shares()
    # rounded: a resume compares them
    shares = [round(by_label.get(Modality(m).label, 0.0), 4) for m in model.modalities]
    return replace(model, layers=[layer.with_shares(shares) for layer in model.layers])


def differences(before: Decoder.Config, after: Decoder.Config) -> Iterator[str]:
    """The changes of a model by the data, in words."""
    if before.vocab_size != after.vocab_size:
        yield f"{after.vocab_size:,} ids (config: {before.vocab_size:,})"
    else:
        yield f"{after.vocab_size:,} ids"
    had, has = _labels(before), _labels(after)
    yield has if set(before.modalities) == set(after.modalities) else f"{has} (config: {had})"
    if before.vectors is not None and after.vectors is not None and before.vectors != after.vectors:
        shape = f"{after.vectors.width} numbers (config: {before.vectors.width})"
        yield f"vectors of {shape}"
    if (now := _pool_shares(after)) != (then := _pool_shares(before)):
        yield f"experts for {now}" + (f" (config: {then})" if then else "")


def _labels(model: Decoder.Config) -> str:
    return ", ".join(Modality(modality).label for modality in model.modalities)


def _pool_shares(model: Decoder.Config) -> str:
    """Budgets of the experts by modality in the first layer that has such."""
    for layer in model.layers:
        pools = [pool for _, pool, _, _ in layer.traverse(ExpertPool.Config) if pool.groups]
        if pools:
            return ", ".join(f"{pool.share:.0%} {pool.name}" for pool in pools)
    return ""
