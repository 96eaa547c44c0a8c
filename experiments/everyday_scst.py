"""Photos of Flickr8k and a part of COCO: self-critical training of the run of `flickr8k_coco` on both.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap data prepare PATH/TO/coco_subset --name coco_subset
    imgcap train flickr8k_three
    imgcap train flickr8k_coco --init-from runs/flickr8k_three
    imgcap train everyday_scst --init-from runs/flickr8k_coco
    imgcap evaluate runs/everyday_scst --split val --beam 3
    imgcap evaluate runs/everyday_scst --split val --dataset coco_subset --beam 3

The model that comes with the package is the mean of this run and of one of `flickr8k_coco_scst`
(imgcap_jax/shipped_model/README.md).

Scores on validation, beam 3, seeds 0 and 1: CIDEr-D 62.5, 61.2 on 1,000 photos of Flickr8k, 81.8, 77.9 on 300 photos of
`coco_subset`. Time and hardware: docs/flickr8k.md.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k_coco_scst import experiment as scst

experiment = replace(
    scst,
    data=replace(scst.data, dataset="flickr8k+coco_subset"),
    training=replace(scst.training, epochs=3, evaluate_epochs=0.5),
)
