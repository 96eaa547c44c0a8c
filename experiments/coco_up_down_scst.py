"""COCO, Karpathy's splits: self-critical training of the run of `coco_up_down`, on CIDEr-D.

    imgcap data prepare coco
    imgcap train coco_up_down --encoder.folder FOLDER
    imgcap train coco_up_down_scst --encoder.folder FOLDER --init-from runs/coco_up_down
    imgcap evaluate runs/coco_up_down_scst --split test --beam 5

The settings are those of configs/updown/updown_nsc.yml of Luo's code
(https://github.com/ruotianluo/ImageCaptioning.pytorch), with the differences that `coco_up_down` lists. The baseline is
the mean reward of the other samples (Luo 2020).

Paper (test, beam 5): BLEU-1 79.8, BLEU-4 36.3, METEOR 27.7, ROUGE-L 56.9, CIDEr-D 120.1, SPICE 21.4
(https://arxiv.org/abs/1707.07998).
Luo's code (MODEL_ZOO.md, test, beam 5): CIDEr-D 123.9, SPICE 21.5; with the greedy baseline 122.7 and 21.5.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.coco_up_down import experiment as coco_up_down
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco_up_down,
    objective=SelfCritical(),
    optimizer=Optimizer("adam", 5e-5, schedule="constant", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    training=replace(coco_up_down.training, epochs=20, validation_beam=5, validation_images=None),
)
