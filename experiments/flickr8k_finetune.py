"""Flickr8k: the last two stages of EfficientNet-Lite0 are fine-tuned on augmented photos, from `flickr8k_lite0`.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k_lite0
    imgcap train flickr8k_finetune --init-from runs/flickr8k_lite0
    imgcap evaluate runs/flickr8k_finetune --split val --beam 3

Scores on validation, 1,000 photos, seed 0, beam 3: CIDEr-D 53.4 (52.7 before). Details and hardware: BENCHMARKS.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k_lite0 import experiment as frozen
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite

experiment = replace(
    frozen,
    data=replace(frozen.data, views=1),
    encoder=EfficientNetLite(variant=0, trainable_stages=2),
    optimizer=replace(frozen.optimizer, learning_rate=2e-4, encoder_factor=0.2),
    training=replace(frozen.training, epochs=15),
)
