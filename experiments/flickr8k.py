"""Flickr8k: frozen EfficientNet-Lite2 and soft attention (Xu et al. 2015).

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k
    imgcap evaluate runs/flickr8k --split val --beam 3

Photos are resized to 256 pixels, which gives an 8 x 8 grid of regions. Soft attention was the best of seven decoders in
equal time (experiments/flickr8k_*.py).

Paper (VGG-19, 14 x 14 regions, test): BLEU-1 67.0, BLEU-4 19.5, METEOR 18.9
(https://arxiv.org/abs/1502.03044, table 1).
Scores on validation, 1,000 photos, seed 0: greedy CIDEr-D 51.9; beam 3 CIDEr-D 55.9, BLEU-4 22.2,
METEOR 21.1, ROUGE-L 47.4. Time and hardware: BENCHMARKS.md. The length norm of 0.5 was chosen on the same photos.
"""

from imgcap_jax.data.images import Augmentation
from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.attend import ShowAttendTell
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    data=CaptionData(
        dataset="flickr8k",
        image_size=256,
        batch_size=16,
        captions_per_image=5,
        max_words=16,
        augmentation=Augmentation(crop_scale_min=0.6, flip=True),
        views=4,
    ),
    encoder=EfficientNetLite(variant=2),
    decoder=ShowAttendTell(hidden_size=512, embedding_size=256, attention_size=256, region_size=512, dropout=0.5),
    optimizer=Optimizer(learning_rate=8e-4, warmup_epochs=0.5, weight_decay=0.05),
    objective=CrossEntropy(label_smoothing=0.1),
    training=Training(epochs=15, ema_decay=0.999, evaluate_epochs=1.0),
    decoding=Decoding(beam=3, length_norm=0.5, max_words=20),
)
