"""Flickr8k with attention on attention (Huang et al. 2019), for the comparison of decoders in BENCHMARKS.md.

Two refining layers; the paper uses six, on a training set twenty times as large.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k_aoa --training.epochs 3.4
    imgcap evaluate runs/flickr8k_aoa --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.models.decoders.aoa import AttentionOnAttention

experiment = replace(
    flickr8k,
    decoder=AttentionOnAttention(hidden_size=512, embedding_size=256, heads=8, refining=2, dropout=0.5),
)
