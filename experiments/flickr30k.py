"""Flickr30k: frozen EfficientNet-Lite2 and soft attention (Xu et al. 2015), with the settings of `flickr8k`.

    imgcap data prepare flickr30k --images flickr30k-images.zip --split-file dataset_flickr30k.json
    imgcap train flickr30k
    imgcap evaluate runs/flickr30k --split test --beam 3

Different from `flickr8k`: batches of 32 photos, two views per photo, captions of up to 20 words, 12 epochs. The feature
store of the training photos takes 9.5 GB.

Paper (VGG-19, 14 x 14 regions, test): BLEU-1 66.7, BLEU-4 19.1, METEOR 18.5
(https://arxiv.org/abs/1502.03044, table 1).
Ours: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment as flickr8k

experiment = replace(
    flickr8k,
    data=replace(flickr8k.data, dataset="flickr30k", batch_size=32, max_words=20, views=2),
    training=replace(flickr8k.training, epochs=12),
)
