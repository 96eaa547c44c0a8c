"""Flickr8k with a Transformer decoder of three layers, for the comparison of decoders in BENCHMARKS.md.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k_transformer --training.epochs 2.2
imgcap evaluate runs/flickr8k_transformer --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.transformer import Transformer

experiment = replace(
    flickr8k,
    decoder=Transformer(hidden_size=512, embedding_size=512, layers=3, heads=8, dropout=0.3),
    optimizer=replace(flickr8k.optimizer, learning_rate=4e-4),
)
