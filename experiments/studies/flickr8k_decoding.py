"""Flickr8k: beam size and length norm, with three seeds.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_decoding

All settings share the same three runs, because they differ in decoding only. The base chooses their checkpoints.

Results: not yet run.
"""

from imgcap_jax.experiments.flickr8k import experiment
from imgcap_jax.study import Factor, Study

study = Study(
    base=experiment,
    factors=(
        Factor("beam size", {str(beam): {"decoding.beam": beam} for beam in (1, 2, 5, 10)}),
        Factor("length norm", {"0": {"decoding.length_norm": 0.0}, "1": {"decoding.length_norm": 1.0}}),
    ),
    seeds=(0, 1, 2),
)
