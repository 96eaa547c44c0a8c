"""The rows that training batches consist of.

This module needs neither Grain nor TensorFlow Datasets.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgcap_jax.data.caption_table import CaptionTable
from imgcap_jax.data.mixtures import rows_per_epoch
from imgcap_jax.data.order import VERSION, Order
from imgcap_jax.data.regions import RegionSource, read_regions
from imgcap_jax.errors import UserError

if TYPE_CHECKING:
    from imgcap_jax.data.pipeline import CaptionData
    from imgcap_jax.data.sources import CaptionSource
    from imgcap_jax.data.vocabulary import Vocabulary

Batch = dict[str, npt.NDArray[Any]]


class TrainingRows:
    """What a run trains on: the order, the captions and the regions or images of a mixture.

    Attributes:
        order: which rows each batch has.
        captions: the captions as the model reads them.
        references: the references that batches contain; None if they contain none.
        stores: the regions of each source; None if batches contain images.
    """

    def __init__(
        self,
        config: "CaptionData",
        mixture: "Sequence[tuple[CaptionSource, float]]",
        vocabulary: "Vocabulary",
        *,
        seed: int,
        features: Sequence[RegionSource] | None = None,
        references: CaptionTable | None = None,
    ) -> None:
        """Encodes the captions. See `train_batches` for the arguments.

        Raises:
            UserError: a store does not belong to its source.
        """
        sources = [source for source, _ in mixture]
        for source, store in zip(sources, features or (), strict=features is not None):
            check_store(source, store)
        self.config, self.sources, self.stores, self.references = config, sources, features, references
        self.captions = CaptionTable.for_training(sources, vocabulary, config.max_words + 2)
        self.image_ids = np.concatenate([np.asarray(source.image_ids(), np.int64) for source in sources])
        counts = rows_per_epoch(mixture)
        views = 1 if features is None else _same_views(features)
        self.order = Order(
            [len(source) for source in sources],
            counts,
            self.captions,
            seed=seed,
            batch_size=config.batch_size,
            captions_per_image=config.captions_per_image,
            views=views,
        )
        self._identity: dict[str, Any] = {
            "order": VERSION,
            "seed": seed,
            "batch_size": config.batch_size,
            "captions": self.captions.fingerprint,
            "sources": [[source.name, source.split, len(source), float(weight)] for source, weight in mixture],
        }
        if counts != [len(source) for source in sources] or len(mixture) > 1:
            self._identity["rows_per_epoch"] = counts
        if references is not None:
            self._identity["references"] = references.fingerprint

    def position(self, batches: int) -> dict[str, Any]:
        """The position after this number of batches, as JSON values."""
        return {"batches": batches, **self._identity}

    def batches_before(self, position: Mapping[str, Any]) -> int:
        """The number of batches before a saved position.

        Raises:
            UserError: the position belongs to other data, another batch size or another seed.
        """
        saved = {name: value for name, value in position.items() if name != "batches"}
        if saved.get("order") != VERSION:
            raise UserError(
                "the saved position belongs to another version of imgcap_jax, which draws batches in another order: "
                "start a new run"
            )
        if saved != self._identity or "batches" not in position:
            changed = ", ".join(
                f"{name} {saved.get(name)} -> {self._identity.get(name)}"
                for name in sorted({*saved, *self._identity})
                if saved.get(name) != self._identity.get(name)
            )
            raise UserError(
                f"the saved position does not belong to this data ({changed or 'no batches'}): resume with the "
                "settings and the prepared dataset of the saved run, or start a new run"
            )
        return int(position["batches"])

    def text(self, images: npt.NDArray[np.int64], captions: npt.NDArray[np.int32]) -> Batch:
        """Everything of a batch except images and regions, of these images [B] and rows of captions [B, M]."""
        batch: Batch = {"tokens": self.captions.read(captions)}
        if self.references is not None:
            rows = self.references.first_rows(images, self.references.most)
            batch["references"] = self.references.read(rows)
            if self.references.norms is not None:
                batch["reference_norms"] = self.references.read_norms(rows)
            batch["reference_count"] = self.references.counts(images).astype(np.float32)
        batch["number"] = images.astype(np.int32)
        batch["image_id"] = self.image_ids[images]
        batch["weight"] = np.ones(len(images), np.float32)
        return batch

    def region_batch(self, batch: int, part: slice = slice(None)) -> Batch:
        """These rows of the batch with this number, with regions.

        Raises:
            UserError: regions are damaged.
        """
        images, views, captions = self.order[batch].of(part)
        found = self.text(images, captions)
        found["regions"], mask = self._regions(images, views)
        if mask is not None:
            found["region_mask"] = mask
        return found

    def _regions(
        self, images: npt.NDArray[np.int64], views: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        assert self.stores is not None
        if len(self.stores) == 1:
            return read_regions(self.stores[0], images, views)
        first = self.order.first
        of = np.searchsorted(first, images, side="right") - 1
        parts = {}
        for source in np.unique(of).tolist():
            (places,) = np.nonzero(of == source)
            parts[source] = places, *read_regions(self.stores[source], images[places] - first[source], views[places])
        _, example, _ = next(iter(parts.values()))
        regions = np.empty((len(images), *example.shape[1:]), example.dtype)
        masks = np.ones(regions.shape[:2], np.bool_)
        for places, found, mask in parts.values():
            regions[places] = found
            if mask is not None:
                masks[places] = mask
        return regions, None if all(mask is None for _, _, mask in parts.values()) else masks


def _same_views(stores: Sequence[RegionSource]) -> int:
    views = {store.views for store in stores}
    if len(views) > 1:
        raise UserError(f"the regions of the datasets have {sorted(views)} views; all must have the same number")
    return views.pop()


def check_store(source: "CaptionSource", store: RegionSource) -> None:
    """Raises UserError unless a store has the regions of as many images as the source."""
    if len(store) != len(source):
        raise UserError(
            f"the regions are of {len(store)} images, but {source.name} split {source.split} has {len(source)}; give "
            f"those of this split"
        )
