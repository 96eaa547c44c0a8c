"""Flickr8k: three frozen encoders, EfficientNet-Lite0, 1 and 2, whose features are concatenated.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k_three
    imgcap evaluate runs/flickr8k_three --split val --beam 3

The three networks have 12.2 million weights together, and the decoder has 7.3 million. The features take 15 GB on the
disk. The checkpoint is chosen on the first 500 validation photos.

Scores on validation, 1,000 photos, beam 3, seeds 0 and 1: CIDEr-D 59.6, 58.6, BLEU-4 23.5, 22.8. Time, hardware
and what the next steps add: docs/flickr8k.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.encoders.concatenated import Concatenated
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite

experiment = replace(
    flickr8k,
    data=replace(flickr8k.data, views=5, max_words=20),
    encoder=Concatenated((EfficientNetLite(variant=0), EfficientNetLite(variant=1), EfficientNetLite(variant=2))),
    training=replace(flickr8k.training, validation_images=500),
    decoding=replace(flickr8k.decoding, forbid_repeated_words=True),
)
