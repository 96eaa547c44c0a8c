"""COCO, Karpathy's splits: Att2in (Rennie et al. 2017) on bottom-up regions.

    imgcap data prepare coco
    imgcap train coco_att2in --encoder.folder FOLDER
    imgcap evaluate runs/coco_att2in --split test --beam 5

FOLDER has one .npz file per image, with 10 to 100 regions of 2048 numbers (see docs/experiments.md). The feature store
of the training images takes 46.4 GB, because each image takes the space of 100 regions.

The settings are those of configs/a2i2.yml of Luo's code (https://github.com/ruotianluo/ImageCaptioning.pytorch).
Different here: batches have 16 images instead of 10, which 8 devices can share; scheduled sampling rises evenly instead
of in steps.

Luo's code (MODEL_ZOO.md, the same regions, test, beam 5): CIDEr-D 108.9, SPICE 19.8. The paper
(https://arxiv.org/abs/1612.00563), with the last map of ResNet-101: BLEU-4 31.3, METEOR 26.0, ROUGE-L 54.3, CIDEr-D
101.3.
Ours: not yet run.
"""

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.att2in import Att2in
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    # Words that occur at most five times are unknown, and captions are cut after 16 words, as in Luo's code.
    data=CaptionData(dataset="coco_captions", batch_size=16, captions_per_image=5, max_words=16, min_count=6),
    encoder=RegionFiles(region_size=2048, max_regions=100),
    decoder=Att2in(hidden_size=512, embedding_size=512, attention_size=512, region_size=512, dropout=0.5),
    optimizer=Optimizer("adam", 5e-4, schedule="step", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    objective=CrossEntropy(label_smoothing=0.0, sampling=0.25, sampling_ramp_epochs=25.0),
    training=Training(epochs=30, validation_images=1000),
    decoding=Decoding(beam=5, length_norm=0.0),
)
