"""Flickr30k: self-critical training of the run of `flickr30k`, on CIDEr-D.

    imgcap data prepare flickr30k --images flickr30k-images.zip --split-file dataset_flickr30k.json
    imgcap train flickr30k
    imgcap train flickr30k_scst --init-from runs/flickr30k
    imgcap evaluate runs/flickr30k_scst --split test --beam 3

The settings are those of `flickr8k_scst`.

Paper: none. Xu et al. (2015) trained soft attention with cross-entropy only.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k_scst import experiment as flickr8k_scst
from imgcap_jax.experiments.flickr30k import experiment as flickr30k

experiment = replace(
    flickr8k_scst,
    data=flickr30k.data,
    training=replace(flickr8k_scst.training, epochs=6),
)
