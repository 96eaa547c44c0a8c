"""Flickr8k with Show-and-Tell (Vinyals et al. 2015), for the comparison of decoders in BENCHMARKS.md.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k_show_tell --training.epochs 10.5
imgcap evaluate runs/flickr8k_show_tell --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.show_tell import ShowTell

experiment = replace(
    flickr8k,
    decoder=ShowTell(hidden_size=512, embedding_size=256, dropout=0.5),
)
