"""COCO, Karpathy's splits: Up-Down at the paper's sizes, on bottom-up regions (Anderson et al. 2018).

    imgcap data prepare coco
    imgcap train coco_up_down --encoder.folder FOLDER

FOLDER has one .npz file per image, with 36 regions of 2048 numbers (see `imgcap_jax.data.regions.RegionFiles`).
Scores: not measured.
"""

from dataclasses import replace

from imgcap_jax.data.regions import RegionFiles
from imgcap_jax.experiments.coco import experiment as coco
from imgcap_jax.models.decoders.up_down import UpDown

experiment = replace(coco, encoder=RegionFiles(region_size=2048, max_regions=36), decoder=UpDown())
