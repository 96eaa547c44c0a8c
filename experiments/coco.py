"""COCO, Karpathy's splits: frozen EfficientNet-Lite2 and soft attention (Xu et al. 2015).

    imgcap data prepare coco
    imgcap train coco
    imgcap evaluate runs/coco --split test --beam 3

Training uses train + restval (113,287 images), validation during training the first 1,000 images of val. The feature
store of the training images takes 14.2 GB.

Paper (VGG-19, 14 x 14 regions): BLEU-1 70.7, BLEU-4 24.3, METEOR 23.9 (https://arxiv.org/abs/1502.03044, table 1).
Here the encoder is newer, the regions are 7 x 7, the optimizer is AdamW with a cosine schedule, and the loss has label
smoothing and no doubly stochastic penalty (`--objective.attention-penalty`).
Ours: not yet run.
"""

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    data=CaptionData(dataset="coco_captions", image_size=224, batch_size=128, captions_per_image=5),
    encoder=EfficientNetLite(variant=2),
    decoder=ShowAttendTell(dropout=0.5),
    optimizer=Optimizer(learning_rate=1e-3, warmup_epochs=0.5),
    objective=CrossEntropy(label_smoothing=0.1),
    training=Training(epochs=15, ema_decay=0.999, validation_images=1000, patience=4),
    decoding=Decoding(beam=3),
)
