"""Flickr8k: frozen EfficientNet-Lite0, the smallest encoder; the start of `flickr8k_finetune`.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k_lite0
    imgcap evaluate runs/flickr8k_lite0 --split val --beam 3

Scores on validation, 1,000 photos, seed 0, beam 3: CIDEr-D 52.7. Details and hardware: BENCHMARKS.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite

experiment = replace(
    flickr8k,
    data=replace(flickr8k.data, image_size=224),
    encoder=EfficientNetLite(variant=0),
    training=replace(flickr8k.training, epochs=9),
)
