"""Drawn scenes: attention, hidden size, label smoothing and beam size, with five seeds each.

    imgcap data prepare scenes
    imgcap ablate scenes_short

Runs are short: 1.5 epochs of ``scenes_demo``. Results and conclusions: docs/ablations.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.scenes_demo import experiment
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.study import Factor, Study

_base = replace(experiment, training=replace(experiment.training, epochs=1.5, evaluate_epochs=0.5))
_no_attention = ShowTell(hidden_size=256, embedding_size=128, dropout=0.0)

study = Study(
    base=_base,
    factors=(
        Factor("attention", {"none": replace(_base, decoder=_no_attention)}, base="soft"),
        Factor("hidden size", {"128": {"decoder.hidden_size": 128}}),
        Factor("label smoothing", {"0.1": {"objective.label_smoothing": 0.1}}),
        Factor("beam size", {"1": {"decoding.beam": 1}, "5": {"decoding.beam": 5}}),
    ),
    seeds=(0, 1, 2, 3, 4),
    scores=("CIDEr-D", "true", "BLEU-4", "METEOR", "ROUGE-L"),
)
