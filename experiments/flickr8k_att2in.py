"""Flickr8k with Att2in (Rennie et al. 2017), for the comparison of decoders in BENCHMARKS.md.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k_att2in --training.epochs 6.5
imgcap evaluate runs/flickr8k_att2in --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.att2in import Att2in

experiment = replace(
    flickr8k,
    decoder=Att2in(hidden_size=512, embedding_size=256, attention_size=256, region_size=512),
)
