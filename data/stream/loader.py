"""The stream as a torchtitan data loader: what the trainer builds, checkpoints and iterates.

The state is one int64 tensor, a line for each lane of the global batch, sharded over the
data-parallel ranks like the batch itself: the checkpoint re-shards it, so a run resumes exactly on
any number of ranks that divides the global batch. The state also has the identity of the data,
which must not change on resume.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.dataloader import BaseDataLoader

from earlyfuse.data.json_files import JsonObject, load_json, shown
from earlyfuse.data.shards.source import TokenSource
from earlyfuse.data.stream.batches import Drawn, LaneStream, Prefetcher
from earlyfuse.data.stream.mixture import Mixture, check_seq_len
from earlyfuse.models.vocabulary import Vocabulary

Batch = tuple[dict[str, Any], torch.Tensor]  # (inputs, labels), as torchtitan expects

_REMEDY = {
    "seed": "use the seed of the run, or start a new run",
    "global_batch_size": "change ranks, local batch or accumulation instead, or start a new run",
    "clean_copies": "set later_see of the model's vectors as in the checkpoint",
    "tokenizers": "the model would read other ids; use the data this checkpoint was trained on",
}


def _saved(identity: str) -> JsonObject:
    where, remedy = "identity of the data in the checkpoint", "restore another checkpoint"
    return JsonObject.of(load_json(identity, where, remedy), where, remedy)


class LaneLoader(BaseDataLoader):
    """Data loader of rank r of R: rows [r·G/R, (r+1)·G/R) of every global batch of G rows.

    Yields micro-batches of ``local_batch_size`` rows, ``({"batch": MixedBatch, "first_row": int},
    labels_BS)``; ``first_row`` is the number of their first row in the global batch. A step is
    G/R/local_batch_size of them. Batches are pinned where there is a GPU. Every iterator continues
    the one stream; ``state_dict`` is the state after the last batch that was yielded, whatever is
    prefetched.

    ``mesh``: the data-parallel mesh (1-D, of ``dp_world_size``), needed by ``state_dict`` with more
    than one rank; may be set later as an attribute.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        sources: dict[str, float] = field(default_factory=dict)
        """Prepared folder → share of the tokens; shares sum to 1."""

        order: list[str] = field(default_factory=list)
        """Names of the sources in order: of sources that lag alike, the first is drawn. Empty: as
        in sources. A resumed run keeps the order of its checkpoint."""

        global_batch_size: int = 0
        """Rows of a global batch, as training.global_batch_size: the number of lanes."""

        seed: int = 0
        """Decides the order of the documents, with the epoch and the name of the source."""

        media_share: float | None = None
        """Share of media codes, all media together, among the tokens of each lane; None: as the
        sources give. How much of it is image and how much speech follows from their shares."""

        prefetch: int = 2
        """Micro-batches drawn ahead in the background; 0: drawn on demand."""

        clean_copies: bool = False
        """Give each item of a continuous medium twice: the copy that the objective noises, and the
        clean one that later tokens see. Filled in from the model."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        mesh: DeviceMesh | None = None,
        **unused: Any,  # tokenizer, snapshot_every_n_steps: torchtitan passes them to every loader
    ) -> None:
        total = config.global_batch_size
        if total < 1 or total % dp_world_size:
            raise ValueError(
                f"global_batch_size ({total}) must be a positive multiple of the data-parallel "
                f"ranks ({dp_world_size}); change one of them"
            )
        lanes = total // dp_world_size
        if local_batch_size < 1 or lanes % local_batch_size:
            raise ValueError(
                f"local_batch_size ({local_batch_size}) must divide the {lanes} rows of each rank "
                f"(global batch {total}, {dp_world_size} ranks); change one of them"
            )
        if config.prefetch < 0:
            raise ValueError(f"prefetch ({config.prefetch}) must be at least 0, which is off")
        self.config, self.mesh = config, mesh
        self.world_size, self.seq_len, self.rows = dp_world_size, seq_len, local_batch_size
        given = tuple(TokenSource(folder) for folder in config.sources)
        self._given = tuple(source.name for source in given)
        shares = tuple(config.sources.values())
        self.mixture = Mixture(given, shares, config.media_share, config.clean_copies)
        self.mixture = self.mixture.in_order(config.order or self._given)
        check_seq_len(seq_len, self.mixture)
        self._lanes = range(dp_rank * lanes, (dp_rank + 1) * lanes)
        self._state_LK = np.zeros((lanes, self.mixture.state_size()), np.int64)
        self._drawn: LaneStream | Prefetcher[Drawn] | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """The layout of the ids; the model's must be the same."""
        return self.mixture.vocabulary

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of the numbers in ``source_BS``."""
        return [source.name for source in self.mixture.sources]

    @property
    def lanes(self) -> torch.Tensor:
        """int64 (L, K): state of this rank's lanes after the last yielded batch. A copy."""
        return torch.from_numpy(self._state_LK.copy())

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch, lanes, _ = self._next()
            first_row = self._lanes.start + lanes.start
            yield {"batch": batch, "first_row": first_row}, batch.labels_BS

    def _next(self) -> Drawn:
        if self._drawn is None:
            stream = LaneStream(
                self.mixture,
                self.config.seed,
                self._lanes,
                self.config.global_batch_size,
                self.seq_len,
                self.rows,
                self._state_LK,
                pin=torch.cuda.is_available(),
            )
            self._drawn = (
                Prefetcher(stream, self.config.prefetch) if self.config.prefetch else stream
            )
        try:
            drawn = next(self._drawn)
        except BaseException:
            self.close()  # lanes may be within a batch: restart after the last whole one
            raise
        self._state_LK[drawn.lanes] = drawn.state_BK
        return drawn

    def close(self) -> None:
        """Stop prefetching; the loader continues after the last yielded batch."""
        if isinstance(self._drawn, Prefetcher):
            self._drawn.close()
        self._drawn = None

    def identity(self) -> dict[str, Any]:
        """Seed, global batch, tokenizers, data and mixture, which must equal the checkpoint's.
        ``tokens``: the counts of each source, by which the quota draws from it.
        """
        sources, shares = self.mixture.sources, self.mixture.shares
        return {
            "global_batch_size": self.config.global_batch_size,
            "seed": self.config.seed,
            "tokenizers": sources[0].tokenizers,
            "data": {source.name: source.identity for source in sources},
            "tokens": {source.name: source.tokens for source in sources},
            "shares": {s.name: share for s, share in zip(sources, shares, strict=True)},
            "media_share": self.mixture.media_share,
            **({"clean_copies": True} if self.mixture.clean_copies else {}),
        }

    def check_identity(self, saved: str) -> None:
        """``ValueError`` naming the first field in which ``saved`` (``state_dict()["identity"]``)
        differs. The order of the sources is not compared: the checkpoint's is kept.

        The identity can be loaded before the tensors, whose shapes differ with lanes or sources:
        ``state = {"dataloader": {"identity": ""}}; dcp.load(state, checkpoint_id=folder)``.
        """
        fields = _saved(saved)
        without = {"clean_copies": False}
        for name, here in (without | json.loads(json.dumps(self.identity()))).items():
            if name == "tokens" and name not in fields:
                continue  # older checkpoints have none
            there = fields.values.get(name, without.get(name))
            if there != here:
                raise ValueError(
                    f"{name} of the data ({here}) must be that of the checkpoint "
                    f"({shown(there)}); "
                    f"{_REMEDY.get(name, 'restore it, or load the weights only into a new run')}"
                )

    def state_dict(self) -> dict[str, Any]:
        """``lanes``: int64 (L, K), or a DTensor (G, K) over the mesh; ``identity``: JSON text."""
        lanes: torch.Tensor = self.lanes
        if self.world_size > 1:
            if self.mesh is None or self.mesh.size() != self.world_size:
                raise ValueError(
                    f"the loader of {self.world_size} data-parallel ranks needs their mesh to save "
                    f"its state and has {self.mesh}; set loader.mesh"
                )
            lanes = DTensor.from_local(lanes, self.mesh, [Shard(0)])
        identity = json.dumps(self.identity() | {"order": self.sources}, sort_keys=True)
        return {"lanes": lanes, "identity": identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state with the lanes of this rank, or of all ranks.

        Existing iterators continue from there as well. Raises ``ValueError`` when the
        state is of other data, seed or global batch, or was taken between the micro-batches of a
        step.
        """
        self.check_identity(state_dict["identity"])
        lanes = state_dict["lanes"]
        lanes = lanes.to_local() if isinstance(lanes, DTensor) else lanes
        if len(lanes) == self.config.global_batch_size:
            lanes = lanes[self._lanes.start : self._lanes.stop]
        if lanes.shape != self._state_LK.shape:
            raise ValueError(
                f"the loader's state {tuple(lanes.shape)} must be {self._state_LK.shape} (lanes, "
                "integers); load a state of the same global batch and sources"
            )
        rows = lanes[:, -1].tolist()
        if len(set(rows)) > 1:
            raise ValueError(
                f"lanes of the state have drawn {min(rows)} to {max(rows)} rows, not equally "
                "many; save after a whole step"
            )
        self.close()
        # the order names the columns; older checkpoints without it have the config's
        saved = _saved(state_dict["identity"])
        self.mixture = self.mixture.in_order(
            saved.items("order", str) if "order" in saved else self._given
        )
        self._state_LK = lanes.cpu().numpy().astype(np.int64, copy=True)

    def progress(self, all_K: torch.Tensor | None = None) -> dict[str, Any]:
        """Counts of this rank so far, or of all ranks, whose ``lanes`` sum to ``all_K``.

        ``tokens``: modality → count; ``source_tokens`` and ``epoch`` (fractional, of all lanes): by
        source; ``padding``: share of the positions.
        """
        sources = self.mixture.sources
        total_K = self._state_LK.sum(axis=0) if all_K is None else all_K.numpy()
        taken, _, drawn = total_K[: 3 * len(sources)].reshape(3, -1).tolist()
        *codes, padding, rows = total_K[3 * len(sources) :].tolist()
        labels = [modality.label for modality in self.vocabulary.modalities]
        per_lane = self.config.global_batch_size / len(self._state_LK) if all_K is None else 1
        return {
            "tokens": dict(zip(labels, [sum(drawn) - sum(codes), *codes], strict=True)),
            "source_tokens": {s.name: n for s, n in zip(sources, drawn, strict=True)},
            "epoch": {s.name: n * per_lane / len(s) for s, n in zip(sources, taken, strict=True)},
            "padding": padding / max(padding + sum(drawn), 1),
            "rows": rows,
        }
