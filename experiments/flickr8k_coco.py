"""Flickr8k and a part of COCO: the run of `flickr8k_three` is trained further on the photos of both.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap data prepare PATH/TO/coco_subset --name coco_subset
    imgcap train flickr8k_three
    imgcap train flickr8k_coco --init-from runs/flickr8k_three
    imgcap evaluate runs/flickr8k_coco --split val --beam 3
    imgcap evaluate runs/flickr8k_coco --split val --dataset coco_subset --beam 3

`coco_subset` has 5,758 photos with 10,800 captions. Any other captioned photos can take its place.

Scores on validation, 1,000 photos of Flickr8k, beam 3, seeds 0 and 1: CIDEr-D 60.2, 60.0, BLEU-4 23.6, 23.7. On the 300
validation photos of `coco_subset`, CIDEr-D is 74.6 and 41.5: of seed 1, the checkpoint after the first epoch was best
on Flickr8k. Time and hardware: docs/flickr8k.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k_three import experiment as three

experiment = replace(
    three,
    data=replace(three.data, dataset="flickr8k+coco_subset"),
    optimizer=replace(three.optimizer, learning_rate=6e-4),
    training=replace(three.training, epochs=6),
)
