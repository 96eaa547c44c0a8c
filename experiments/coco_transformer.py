"""COCO, Karpathy's splits: a Transformer decoder (Vaswani et al. 2017) on bottom-up regions.

    imgcap data prepare coco
    imgcap train coco_transformer --encoder.folder FOLDER
    imgcap evaluate runs/coco_transformer --split test --beam 5

FOLDER has one .npz file per image, with 10 to 100 regions of 2048 numbers (see docs/experiments.md). The feature store
of the training images takes 46.4 GB, because each image takes the space of 100 regions.

The settings are those of configs/transformer/transformer.yml of Luo's code
(https://github.com/ruotianluo/ImageCaptioning.pytorch). Different here: the regions do not pass through a Transformer
encoder (Luo's has six layers); after the warm-up, which ends at 3.1e-4 after as many images, the learning rate falls
as a cosine instead of the inverse root of the step; batches have 16 images instead of 10, which 8 devices can share.

No single paper: scores of two published implementations, both with six encoder and six decoder layers.
Luo's code (MODEL_ZOO.md, test, beam 5): CIDEr-D 112.6, SPICE 20.6; with another schedule 115.0 and 20.9.
X-modaler (https://github.com/YehLi/xmodaler, docs/notes/benchmarks.md): BLEU-1 76.4, BLEU-4 36.0, METEOR 28.1,
ROUGE-L 56.7, CIDEr-D 116.5, SPICE 21.0.
Ours: not yet run.
"""

from imgcap_jax.data.pipeline import CaptionData
from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.experiment import Experiment, Training
from imgcap_jax.models.decoders.transformer import Transformer
from imgcap_jax.training.cross_entropy import CrossEntropy
from imgcap_jax.training.optimizer import Optimizer

experiment = Experiment(
    # Words that occur at most five times are unknown, and captions are cut after 16 words, as in Luo's code.
    data=CaptionData(dataset="coco_captions", batch_size=16, captions_per_image=5, max_words=16, min_count=6),
    encoder=RegionFiles(region_size=2048, max_regions=100),
    decoder=Transformer(hidden_size=512, embedding_size=512, layers=6, heads=8, feedforward_size=2048, dropout=0.1),
    # 1.8 epochs of 113,287 images in batches of 10: 20,000 steps.
    optimizer=Optimizer("adam", 3.1e-4, warmup_epochs=1.8, clip_norm=None, clip_value=0.1, b2=0.98),
    objective=CrossEntropy(label_smoothing=0.0),
    training=Training(epochs=15, validation_images=1000),
    decoding=Decoding(beam=5, length_norm=0.0),
)
