"""Flickr8k: the seven decoders at the same sizes and for the same number of epochs, with three seeds each.

    imgcap data prepare PATH/TO/flickr8k --name flickr8k
    imgcap ablate flickr8k_decoders

The settings of each decoder are those of its experiment (experiments/flickr8k_*.py), which also gives the Transformer
half the learning rate. BENCHMARKS.md compares the same decoders in equal time.

Results: not yet run.
"""

from imgcap_jax.experiments import (
    flickr8k,
    flickr8k_adaptive,
    flickr8k_aoa,
    flickr8k_att2in,
    flickr8k_show_tell,
    flickr8k_transformer,
    flickr8k_up_down,
)
from imgcap_jax.study import Factor, Study

study = Study(
    base=flickr8k.experiment,
    factors=(
        Factor(
            "decoder",
            {
                "Show-and-Tell": flickr8k_show_tell.experiment,
                "Att2in": flickr8k_att2in.experiment,
                "adaptive attention": flickr8k_adaptive.experiment,
                "Up-Down": flickr8k_up_down.experiment,
                "attention on attention": flickr8k_aoa.experiment,
                "Transformer": flickr8k_transformer.experiment,
            },
            base="soft attention",
        ),
    ),
    seeds=(0, 1, 2),
)
