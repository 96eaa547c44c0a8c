"""COCO, Karpathy's splits: Show-and-Tell (Vinyals et al. 2015) on the mean features of a frozen ResNet-101.

    imgcap data prepare coco
    imgcap train coco_show_tell
    imgcap evaluate runs/coco_show_tell --split test --beam 5

The settings are those of the model FC of Luo's code (https://github.com/ruotianluo/ImageCaptioning.pytorch,
configs/fc.yml): the mean of ResNet-101's last map is the first input of an LSTM of 512 units. Different here: photos
are squashed to 448 x 448 pixels instead of their own size; batches have 16 images instead of 10, which 8 devices can
share; scheduled sampling rises evenly instead of in steps. The weights of ResNet-101 are downloaded. The feature store
of the training images takes 0.5 GB.

Paper (GoogLeNet, its own split): BLEU-4 27.7, METEOR 23.7, CIDEr 85.5 (https://arxiv.org/abs/1411.4555).
Luo's code (MODEL_ZOO.md, test, beam 5): CIDEr-D 95.3, SPICE 17.9.
Ours: not yet run.
"""

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.show_tell import ShowTell
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    # Words that occur at most five times are unknown, and captions are cut after 16 words, as in Luo's code.
    data=CaptionData(
        dataset="coco_captions", image_size=448, batch_size=16, captions_per_image=5, max_words=16, min_count=6
    ),
    encoder=ResNet(depth=101, grid=1),  # one region: the mean
    decoder=ShowTell(hidden_size=512, embedding_size=512, dropout=0.5),
    optimizer=Optimizer("adam", 5e-4, schedule="step", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    objective=CrossEntropy(label_smoothing=0.0, sampling=0.25, sampling_ramp_epochs=25.0),
    training=Training(epochs=30, validation_images=1000),
    decoding=Decoding(beam=5, length_norm=0.0),
)
