"""Flickr8k: baseline, temperature and end of caption in self-critical training, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k
    imgcap ablate flickr8k_self_critical --init-from runs/flickr8k

All runs start from the same run, so the intervals do not include the variation between initial runs. "eos in the
reward" is whether the end of a caption counts as a word in the reward (Hu et al. 2023,
https://arxiv.org/abs/2305.12254).

Results: not yet run.
"""

from imgcap_jax.experiments.flickr8k_scst import experiment
from imgcap_jax.study import Factor, Study

study = Study(
    base=experiment,
    factors=(
        Factor("baseline", {"greedy": {"objective.baseline": "greedy"}}, base="mean"),
        Factor("temperature", {"0.8": {"objective.temperature": 0.8}, "1": {"objective.temperature": 1.0}}),
        Factor("eos in the reward", {"no": {"objective.reward_eos": False}}, base="yes"),
    ),
    seeds=(0, 1, 2),
    from_run=True,
)
