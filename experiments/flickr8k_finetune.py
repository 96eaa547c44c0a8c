"""Flickr8k: the last two stages of EfficientNet-Lite0 are trained, from the converged decoder, on augmented photos.

imgcap train flickr8k_lite0
imgcap train flickr8k_finetune --init-from runs/flickr8k_lite0
imgcap evaluate runs/flickr8k_finetune --split val --beam 3
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
