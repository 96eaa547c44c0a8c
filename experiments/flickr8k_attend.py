"""Flickr8k with soft attention (Xu et al. 2015), for the comparison of decoders in BENCHMARKS.md.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k_attend --training.epochs 6.5
imgcap evaluate runs/flickr8k_attend --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.attend import ShowAttendTell

experiment = replace(
    flickr8k,
    decoder=ShowAttendTell(hidden_size=512, embedding_size=256, attention_size=256, region_size=512),
)
