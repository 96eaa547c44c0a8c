"""Flickr8k: self-critical training (Rennie et al. 2017; baseline of Luo 2020) of the run of `flickr8k`.

imgcap data prepare PATH/TO/flickr8k --name flickr8k
imgcap train flickr8k
imgcap train flickr8k_scst --init-from runs/flickr8k
imgcap evaluate runs/flickr8k_scst --split val --beam 3
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    flickr8k,
    objective=SelfCritical(samples=5),
    optimizer=Optimizer("adam", 5e-5, schedule="cosine", warmup_epochs=0.1),
    training=replace(flickr8k.training, epochs=10, ema_decay=0.99, validation_beam=3, evaluate_epochs=0.5, patience=6),
)
