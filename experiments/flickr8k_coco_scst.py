"""Flickr8k and a part of COCO: self-critical training of the run of `flickr8k_coco`, with four seeds that are averaged.

    imgcap train flickr8k_three
    imgcap train flickr8k_coco --init-from runs/flickr8k_three
    for seed in 0 1 2 3; do
      imgcap train flickr8k_coco_scst --init-from runs/flickr8k_coco \
        --training.seed $seed --run runs/flickr8k_coco_scst_$seed
    done
    imgcap average runs/flickr8k_coco_scst_? --run runs/flickr8k_soup
    imgcap evaluate runs/flickr8k_soup --split val --beam 3

The reward of a caption is half its CIDEr-D with the references of the photo, and half that with the captions of the ten
training photos that look most like it. Without these, the policy learns the references of single photos by heart: the
reward in training rises, and the score on other photos falls.

Scores, time and hardware: docs/flickr8k.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k_coco import experiment as coco
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco,
    objective=SelfCritical(temperature=0.6, neighbours=10),
    optimizer=Optimizer("adam", 5e-5, warmup_epochs=0.1),
    training=replace(coco.training, epochs=3, ema_decay=0.99, validation_beam=3, evaluate_epochs=0.5),
)
