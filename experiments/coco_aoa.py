"""COCO, Karpathy's splits: attention on attention at the paper's sizes, on bottom-up regions (Huang et al. 2019).

    imgcap data prepare coco
    imgcap train coco_aoa --encoder.folder FOLDER
    imgcap evaluate runs/coco_aoa --split test --beam 2

FOLDER has one .npz file per image, with 10 to 100 regions of 2048 numbers (see docs/experiments.md). The feature store
of the training images takes 46.4 GB, because each image takes the space of 100 regions.

The settings are those of train.sh of the authors' code (https://github.com/husthuaan/AoANet). Different here: batches
have 16 images instead of 10, which 8 devices can share; scheduled sampling rises evenly instead of in steps.

Paper (test): BLEU-4 37.2, CIDEr-D 119.8 (https://arxiv.org/abs/1908.06954), the best of five runs by CIDEr-D according
to the authors (https://github.com/husthuaan/AoANet/issues/13).
Authors' code (README.md, another run, beam 2): BLEU-1 77.3, BLEU-4 36.9, METEOR 28.5, ROUGE-L 57.3, CIDEr-D 118.4,
SPICE 21.7.
Ours: not yet run.
"""

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.aoa import AttentionOnAttention
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    # Words that occur at most four times are unknown, and captions are cut after 16 words, as in the authors' code.
    data=CaptionData(dataset="coco_captions", batch_size=16, captions_per_image=5, max_words=16, min_count=5),
    encoder=RegionFiles(region_size=2048, max_regions=100),
    decoder=AttentionOnAttention(hidden_size=1024, embedding_size=1024, heads=8, refining=6, dropout=0.3),
    optimizer=Optimizer("adam", 2e-4, schedule="step", warmup_epochs=0.0, clip_norm=None, clip_value=0.1),
    objective=CrossEntropy(label_smoothing=0.2, sampling=0.25, sampling_ramp_epochs=25.0),
    training=Training(epochs=25, validation_images=1000),
    decoding=Decoding(beam=2, length_norm=0.0),
)
