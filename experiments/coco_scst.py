"""COCO, Karpathy's splits: self-critical training of the run of `coco`, on CIDEr-D.

    imgcap data prepare coco
    imgcap train coco
    imgcap train coco_scst --init-from runs/coco
    imgcap evaluate runs/coco_scst --split test --beam 3

Paper: none. Xu et al. (2015) trained soft attention with cross-entropy only. `coco_att2in_scst` is the closest model
with published scores.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.coco import experiment as coco
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco,
    objective=SelfCritical(temperature=0.6),
    optimizer=Optimizer("adam", 5e-5, warmup_epochs=0.1),
    training=replace(coco.training, epochs=15, ema_decay=0.99, validation_beam=3, validation_images=None, patience=0),
)
