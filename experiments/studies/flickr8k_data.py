"""Flickr8k: vocabulary threshold and number of stored views per photo, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_data

Words that occur less often than the vocabulary threshold in the training captions are unknown to the model. One view is
the photo itself; two views add its mirror image; the others are random crops.

Results: not yet run.
"""

from imgcap_jax.data.images import Augmentation
from imgcap_jax.experiments.flickr8k import experiment
from imgcap_jax.study import Factor, Study

study = Study(
    base=experiment,
    factors=(
        Factor(
            "vocabulary threshold",
            {"1": {"data.min_count": 1}, "3": {"data.min_count": 3}, "10": {"data.min_count": 10}},
        ),
        Factor(
            "views",
            {
                "1": {"data.views": 1, "data.augmentation": Augmentation()},
                "2": {"data.views": 2},
                "8": {"data.views": 8},
            },
            base="4",
        ),
    ),
    seeds=(0, 1, 2),
)
