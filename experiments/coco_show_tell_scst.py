"""COCO, Karpathy's splits: self-critical training of the run of `coco_show_tell`, on CIDEr-D.

    imgcap data prepare coco
    imgcap train coco_show_tell
    imgcap train coco_show_tell_scst --init-from runs/coco_show_tell
    imgcap evaluate runs/coco_show_tell_scst --split test --beam 5

The settings are those of configs/fc_nsc.yml of Luo's code (https://github.com/ruotianluo/ImageCaptioning.pytorch), with
the differences that `coco_show_tell` lists. The baseline is the mean reward of the other samples (Luo 2020).

Paper: none. Vinyals et al. (2015) trained with cross-entropy only.
Luo's code (MODEL_ZOO.md, test, beam 5): CIDEr-D 105.3, SPICE 18.6; with the greedy baseline 104.5 and 18.4.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.coco_show_tell import experiment as coco_show_tell
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco_show_tell,
    objective=SelfCritical(),
    optimizer=Optimizer("adam", 5e-5, schedule="constant", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    training=replace(coco_show_tell.training, epochs=20, validation_beam=5, validation_images=None),
)
