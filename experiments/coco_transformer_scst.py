"""COCO, Karpathy's splits: self-critical training of the run of `coco_transformer`, on CIDEr-D.

    imgcap data prepare coco
    imgcap train coco_transformer --encoder.folder FOLDER
    imgcap train coco_transformer_scst --encoder.folder FOLDER --init-from runs/coco_transformer
    imgcap evaluate runs/coco_transformer_scst --split test --beam 5

The settings are those of configs/transformer/transformer_nscl.yml of Luo's code
(https://github.com/ruotianluo/ImageCaptioning.pytorch), with the differences that `coco_transformer` lists. The
baseline is the mean reward of the other samples (Luo 2020).

No single paper: scores of two published implementations, both with six encoder and six decoder layers.
Luo's code (MODEL_ZOO.md, test, beam 5): CIDEr-D 130.3, SPICE 22.9; with the greedy baseline 127.7 and 22.5.
X-modaler (https://github.com/YehLi/xmodaler, docs/notes/benchmarks.md): BLEU-1 80.3, BLEU-4 39.1, METEOR 29.0,
ROUGE-L 58.7, CIDEr-D 129.3, SPICE 22.7.
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.coco_transformer import experiment as coco_transformer
from imgcap_jax.training.optimizer import Optimizer
from imgcap_jax.training.self_critical import SelfCritical

experiment = replace(
    coco_transformer,
    objective=SelfCritical(),
    optimizer=Optimizer("adam", 5e-6, schedule="constant", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    training=replace(coco_transformer.training, epochs=25, validation_beam=5, validation_images=None),
)
