"""COCO, Karpathy's splits: self-critical training of the run of `coco_att2in`, on CIDEr-D.

    imgcap data prepare coco
    imgcap train coco_att2in --encoder.folder FOLDER
    imgcap train coco_att2in_scst --encoder.folder FOLDER --init-from runs/coco_att2in
    imgcap evaluate runs/coco_att2in_scst --split test --beam 5

The settings are those of configs/a2i2_nsc.yml of Luo's code (https://github.com/ruotianluo/ImageCaptioning.pytorch),
with the differences that `coco_att2in` lists. The baseline is the mean reward of the other samples (Luo 2020).

Luo's code (MODEL_ZOO.md, the same regions, test, beam 5): CIDEr-D 119.5, SPICE 20.7; with the greedy baseline 117.3
and 20.5. The paper (https://arxiv.org/abs/1612.00563), with the last map of ResNet-101 and the greedy baseline: BLEU-4
33.3, METEOR 26.3, ROUGE-L 55.3, CIDEr-D 111.4.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.coco_att2in import experiment as coco_att2in
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco_att2in,
    objective=SelfCritical(),
    optimizer=Optimizer("adam", 5e-5, schedule="constant", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    training=replace(coco_att2in.training, epochs=20, validation_beam=5, validation_images=None),
)
