"""COCO, Karpathy's splits: self-critical training of the run of `coco_aoa`, on CIDEr-D.

    imgcap data prepare coco
    imgcap train coco_aoa --encoder.folder FOLDER
    imgcap train coco_aoa_scst --encoder.folder FOLDER --init-from runs/coco_aoa
    imgcap evaluate runs/coco_aoa_scst --split test --beam 2

The settings are those of train.sh of the authors' code (https://github.com/husthuaan/AoANet), with the differences that
`coco_aoa` lists. Also different: the learning rate is constant, and not halved when validation scores stop rising.

Paper (test): BLEU-1 80.2, BLEU-4 38.9, METEOR 29.2, ROUGE-L 58.8, CIDEr-D 129.8, SPICE 22.4
(https://arxiv.org/abs/1908.06954).
Authors' code (README.md, another run, beam 2): BLEU-1 80.5, BLEU-4 39.1, METEOR 29.0, ROUGE-L 58.9, CIDEr-D 128.9,
SPICE 22.7.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.coco_aoa import experiment as coco_aoa
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco_aoa,
    objective=SelfCritical(baseline="greedy"),
    optimizer=Optimizer("adam", 2e-5, schedule="constant", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    training=replace(coco_aoa.training, epochs=15, validation_beam=2, validation_images=None),
)
