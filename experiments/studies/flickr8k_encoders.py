"""Flickr8k: frozen encoders under the same decoder, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_encoders

The weights of EfficientNet-Lite0 to 2 are installed with imgcap_jax. Those of ResNet-50, ResNet-101 and VGG-16 are
downloaded from torchvision's server. Each encoder has a feature store of its own: 3.9 GB for 64 regions of 1280 numbers
and 4 views, 6.3 GB for ResNet, 1.6 GB for VGG.

Results: not yet run.
"""

from dataclasses import replace

from imgcap_jax.experiments.flickr8k import experiment
from imgcap_jax.models.encoders.contract import EncoderSettings
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite
from imgcap_jax.models.encoders.resnet import ResNet
from imgcap_jax.models.encoders.vgg import VGG
from imgcap_jax.study import Factor, Study

_encoders: dict[str, EncoderSettings] = {
    "EfficientNet-Lite0": EfficientNetLite(variant=0),
    "EfficientNet-Lite1": EfficientNetLite(variant=1),
    "ResNet-50": ResNet(depth=50),
    "ResNet-101": ResNet(depth=101),
    "VGG-16": VGG(depth=16),
}

study = Study(
    base=experiment,
    factors=(
        Factor(
            "encoder",
            {name: replace(experiment, encoder=encoder) for name, encoder in _encoders.items()},
            base="EfficientNet-Lite2",
        ),
    ),
    seeds=(0, 1, 2),
)
