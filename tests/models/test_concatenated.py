"""Several encoders whose features are concatenated."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.sources import open_source
from imgcap_jax.errors import UserError
from imgcap_jax.experiment import Experiment, from_json, to_json
from imgcap_jax.models.encoders.concatenated import Concatenated
from imgcap_jax.models.encoders.contract import pretrained, with_weights
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.run.extraction import Extraction
from imgcap_jax.run.transfer import _encoder_differences


class Patches(nnx.Module):
    """The mean of each of 2 x 2 patches, times a factor, in ``size`` copies."""

    def __init__(self, size: int, factor: float) -> None:
        self.region_count, self.region_size = 4, size
        self.factor = factor

    def __call__(self, images: jnp.ndarray) -> jnp.ndarray:
        count, side = images.shape[0], images.shape[1] // 2
        means = images.astype(jnp.float32).reshape(count, 2, side, 2, side, 3).mean((2, 4, 5)).reshape(count, 4, 1)
        return jnp.tile(means * self.factor, (1, 1, self.region_size))


@dataclass(frozen=True)
class PatchesSettings:
    """Settings of ``Patches``."""

    region_size: int = 1
    factor: float = 1.0
    frozen: bool = True

    def build(self, image_size: int, **_: object) -> Patches:
        return Patches(self.region_size, self.factor)


def test_features_are_joined_region_by_region_in_the_order_of_the_encoders() -> None:
    settings = Concatenated((PatchesSettings(2, 1.0), PatchesSettings(1, -3.0)))
    assert settings.region_size == 3
    encoder = settings.build(8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert (encoder.region_count, encoder.region_size) == (4, 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    means = images.reshape(2, 2, 4, 2, 4, 3).mean((2, 4, 5)).reshape(2, 4)
    np.testing.assert_allclose(encoder(images), np.stack([means, means, -3 * means], axis=-1), rtol=1e-5)


def test_it_is_frozen_if_all_encoders_are() -> None:
    assert Concatenated((PatchesSettings(), PatchesSettings())).frozen
    assert not Concatenated((PatchesSettings(), PatchesSettings(frozen=False))).frozen


def test_pretrained_encoders_train_nothing() -> None:
    tuned = Concatenated((EfficientNetLite(variant=0, trainable_stages=3, checkpoint_stages=True), PatchesSettings()))
    assert pretrained(tuned) == Concatenated((EfficientNetLite(variant=0), PatchesSettings()))
    with pytest.raises(UserError, match="PatchesSettings has no pretrained weights"):
        pretrained(Concatenated((PatchesSettings(frozen=False), PatchesSettings())))
    with pytest.raises(UserError, match=r"encoder\.weights is random"):
        pretrained(EfficientNetLite(weights="random", trainable_stages=1))


def test_encoders_that_do_not_go_together_are_refused() -> None:
    different = Concatenated((EfficientNetLite(variant=0, weights="random"), PatchesSettings()))
    with pytest.raises(UserError, match="have 1, 4 regions at 32 pixels; they must have the same number"):
        different.build(32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"encoder\.encoders is empty"):
        Concatenated(())
    with pytest.raises(UserError, match=r"encoder\.encoders\.1 is int, which does not encode photos"):
        Concatenated((PatchesSettings(), 3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="each of the concatenated encoders reads its own weights file"):
        with_weights(Concatenated((PatchesSettings(), PatchesSettings())), Path("file"))


def test_experiment_is_stored_and_read_with_its_encoders() -> None:
    encoder = Concatenated((EfficientNetLite(variant=0), EfficientNetLite(variant=2, grid=5)))
    experiment = Experiment(encoder=encoder)
    assert from_json(to_json(experiment), "a test") == experiment


def test_stored_features_belong_to_these_encoders_in_this_order(tiny_data: Path, tmp_path: Path) -> None:
    source = open_source("scenes", "val", tiny_data)
    data = CaptionData("scenes", tiny_data, image_size=32)
    experiment = Experiment(data=data, encoder=Concatenated((PatchesSettings(1, 0.5), PatchesSettings(2, 0.25))))
    for encoders in (((1, 0.5), (2, 0.25)), ((2, 0.25), (1, 0.5)), ((1, 0.5), (2, 0.125))):
        settings = Concatenated(tuple(PatchesSettings(*given) for given in encoders))
        store = Extraction(replace(experiment, encoder=settings), tmp_path, progress=False).regions(source, views=1)
        stored = store.read(0, 0)[0][0].astype(np.float32)
        factors = np.repeat([factor for _, factor in encoders], [size for size, _ in encoders])
        np.testing.assert_allclose(stored / stored[0], factors / factors[0], rtol=1e-2)


def test_encoders_may_only_differ_in_the_stages_that_are_trained() -> None:
    """``--init-from`` accepts a frozen run as the start of a fine-tuned one, but no run with other features."""
    frozen = Concatenated((EfficientNetLite(variant=0), EfficientNetLite(variant=1)))
    tuned = Concatenated((EfficientNetLite(variant=0), EfficientNetLite(variant=1, trainable_stages=2)))
    assert _encoder_differences(frozen, tuned) == ""
    for other, message in (
        (Concatenated((EfficientNetLite(variant=0), EfficientNetLite(variant=2))), "variant: 1 -> 2"),
        (Concatenated((EfficientNetLite(variant=0),)), "encoders: "),
        (Concatenated((EfficientNetLite(variant=0), PatchesSettings())), "EfficientNetLite -> PatchesSettings"),
    ):
        assert _encoder_differences(frozen, other).startswith(message)
