"""Flickr8k with Up-Down (Anderson et al. 2018), for the comparison of decoders in BENCHMARKS.md.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k_up_down --training.epochs 4.2
imgcap evaluate runs/flickr8k_up_down --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.up_down import UpDown

experiment = replace(
    flickr8k,
    decoder=UpDown(hidden_size=512, embedding_size=256, attention_size=256, region_size=512),
)
