"""Flickr8k with adaptive attention (Lu et al. 2017), for the comparison of decoders in BENCHMARKS.md.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k_adaptive --training.epochs 6.0
imgcap evaluate runs/flickr8k_adaptive --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.adaptive import Adaptive

experiment = replace(
    flickr8k,
    decoder=Adaptive(hidden_size=512, embedding_size=256, attention_size=256),
)
