"""Flickr8k: attention and hidden size, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_capacity

Without attention, the decoder is Show-and-Tell, which reads the mean of the regions once.

Results: not yet run.
"""

from imgcap_jax.experiments.flickr8k import experiment
from imgcap_jax.experiments.flickr8k_show_tell import experiment as without_attention
from imgcap_jax.study import Factor, Study

study = Study(
    base=experiment,
    factors=(
        Factor("attention", {"none": without_attention}, base="soft"),
        Factor("hidden size", {"256": {"decoder.hidden_size": 256}, "1024": {"decoder.hidden_size": 1024}}),
    ),
    seeds=(0, 1, 2),
)
