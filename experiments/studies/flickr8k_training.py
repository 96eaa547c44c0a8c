"""Flickr8k: label smoothing and scheduled sampling, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_training

The probability of a drawn word rises linearly over the first ten of the 15 epochs.

Results: not yet run.
"""

from imgcap_jax.experiments.flickr8k import experiment
from imgcap_jax.study import Factor, Study

study = Study(
    base=experiment,
    factors=(
        Factor(
            "label smoothing",
            {"0": {"objective.label_smoothing": 0.0}, "0.2": {"objective.label_smoothing": 0.2}},
        ),
        Factor(
            "scheduled sampling",
            {
                "0.25": {"objective.sampling": 0.25, "objective.sampling_ramp_epochs": 10.0},
                "0.5": {"objective.sampling": 0.5, "objective.sampling_ramp_epochs": 10.0},
            },
            base="0",
        ),
    ),
    seeds=(0, 1, 2),
)
