"""COCO, Karpathy's splits: Up-Down at the paper's sizes, on bottom-up regions (Anderson et al. 2018).

    imgcap data prepare coco
    imgcap train coco_up_down --encoder.folder FOLDER
    imgcap evaluate runs/coco_up_down --split test --beam 5

FOLDER has one .npz file per image, with 10 to 100 regions of 2048 numbers (see docs/experiments.md). The feature store
of the training images takes 46.4 GB, because each image takes the space of 100 regions. For files with 36 regions, add
`--encoder.max-regions 36` (16.7 GB).

The settings of the optimizer and of the loss are those of configs/updown/updown.yml of Luo's code
(https://github.com/ruotianluo/ImageCaptioning.pytorch). Different here: regions are not projected, as in the paper;
batches have 16 images instead of 10, which 8 devices can share; scheduled sampling rises evenly instead of in steps.

Paper (test, beam 5): BLEU-1 77.2, BLEU-4 36.2, METEOR 27.0, ROUGE-L 56.4, CIDEr-D 113.5, SPICE 20.3
(https://arxiv.org/abs/1707.07998).
Luo's code (MODEL_ZOO.md, test, beam 5): CIDEr-D 109.9, SPICE 20.0.
Ours: not yet run.
"""

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.up_down import UpDown
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    # Words that occur at most five times are unknown, and captions are cut after 16 words, as in Luo's code.
    data=CaptionData(dataset="coco_captions", batch_size=16, captions_per_image=5, max_words=16, min_count=6),
    encoder=RegionFiles(region_size=2048, max_regions=100),
    decoder=UpDown(hidden_size=1000, embedding_size=1000, attention_size=512, dropout=0.5),
    optimizer=Optimizer("adam", 5e-4, schedule="step", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    objective=CrossEntropy(label_smoothing=0.0, sampling=0.25, sampling_ramp_epochs=25.0),
    training=Training(epochs=30, validation_images=1000),
    decoding=Decoding(beam=5, length_norm=0.0),
)
