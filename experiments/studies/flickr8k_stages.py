"""Flickr8k: how many stages of EfficientNet-Lite0 are fine-tuned, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k_lite0
    imgcap ablate flickr8k_stages --init-from runs/flickr8k_lite0

All runs start from the same run, so the intervals do not include the variation between initial runs. Without
fine-tuned stages, the decoder is trained further for as many epochs.

Results: not yet run.
"""

from imgcap_jax.experiments.flickr8k_finetune import experiment
from imgcap_jax.study import Factor, Study

study = Study(
    base=experiment,
    factors=(
        Factor("fine-tuned stages", {str(stages): {"encoder.trainable_stages": stages} for stages in (0, 1, 2, 3)}),
    ),
    seeds=(0, 1, 2),
    from_run=True,
)
