"""Flickr8k in short runs: attention, label smoothing, beam size and length norm, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_short

Runs are short: 2 epochs of ``flickr8k`` with half its hidden size and one view per photo. Results and conclusions:
docs/ablations.md.
"""

from dataclasses import replace

from imgcap_jax.data.images import Augmentation
from imgcap_jax.experiments.flickr8k import experiment
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.study import Factor, Study

_base = replace(
    experiment,
    data=replace(experiment.data, augmentation=Augmentation(), views=1),
    decoder=replace(experiment.decoder, hidden_size=256),
    training=replace(experiment.training, epochs=2),
)
_no_attention = ShowTell(hidden_size=256, embedding_size=256, dropout=0.5)

study = Study(
    base=_base,
    factors=(
        Factor("attention", {"none": replace(_base, decoder=_no_attention)}, base="soft"),
        Factor("label smoothing", {"0": {"objective.label_smoothing": 0.0}}),
        Factor("beam size", {"1": {"decoding.beam": 1}, "5": {"decoding.beam": 5}}),
        Factor("length norm", {"0": {"decoding.length_norm": 0.0}, "1": {"decoding.length_norm": 1.0}}),
    ),
    seeds=(0, 1, 2),
)
