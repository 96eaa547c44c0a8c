"""Flickr8k with a frozen EfficientNet-Lite2 and soft attention (Xu et al. 2015).

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap train flickr8k
    imgcap evaluate runs/flickr8k --split val --beam 3

Soft attention is the best of seven decoders in equal time (experiments/flickr8k_*.py, the table in BENCHMARKS.md).
What follows was measured before training steps became faster and drew other dropout masks.

Measured on 2 cores of an AMD EPYC, float32, Karpathy's split, photos of 224 x 224 pixels (aspect ratio not kept)
brought to 256 for an 8 x 8 grid of regions: features of 6,000 images x 4 views in 3.9 minutes (104 images/s, 3.9 GB),
then 15 epochs in 27 minutes (about 370 captions/s, 80 s an epoch; other jobs shared the cores for the second half).

Validation, 1,000 images, beam 3, seed 0 (one run), the checkpoint after epoch 10, selected by greedy CIDEr-D (53.4,
BLEU-4 20.1): BLEU-4 22.1, ROUGE-L 47.2, CIDEr-D 55.3. With --length-norm 0.7: 21.8, 47.4 and 55.4; with 0.9: 21.3, 47.3
and 55.2. The length norm was chosen on these same images; the test split was not seen.

Trained again after that change, seed 0, at about 570 captions/s: greedy CIDEr-D 51.9; beam 3 BLEU-4 22.2, METEOR 21.1,
ROUGE-L 47.4, CIDEr-D 55.9. It is where `flickr8k_scst` starts.
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
