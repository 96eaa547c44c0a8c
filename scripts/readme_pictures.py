"""Draws the pictures of the README into docs/images from the run of scripts/demo.sh.

    scripts/demo.sh
    .venv/bin/python scripts/readme_pictures.py runs/scenes_demo

The scenes are spread evenly over the test split; none is selected by hand.
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from imgcap_jax.captioner import Captioner
from imgcap_jax.data.images import view
from imgcap_jax.data.scenes.language import is_true, parse_caption
from imgcap_jax.data.scenes.world import Scene
from imgcap_jax.data.sources import open_source
from imgcap_jax.report.attention import attention_picture
from imgcap_jax.report.contact_sheet import contact_sheet

COUNT = 8  # scenes on the first picture
ATTENTION = COUNT - 1  # the last of them is on the second


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "docs" / "images"
    folder.mkdir(exist_ok=True)
    source = open_source("scenes", "test", Path(os.environ.get("TFDS_DATA_DIR", "runs/datasets")))
    examples = [source[int(i)] for i in np.linspace(0, len(source) - 1, COUNT)]
    images = [view(example.image, 256) for example in examples]
    captions = Captioner.load(sys.argv[1], attention=True)(images)
    texts = []
    for example, caption in zip(examples, captions, strict=True):
        true = is_true(parse_caption(caption.text), Scene.from_json(example.scene))
        texts.append([caption.text, "(entirely true)" if true else "(not entirely true)"])
    contact_sheet(images, texts, folder / "scenes.png")
    chosen = captions[ATTENTION]
    assert chosen.attention is not None
    path = folder / "attention.png"
    enlarged = np.asarray(Image.fromarray(images[ATTENTION]).resize((256, 256), Image.Resampling.NEAREST))
    attention_picture(enlarged, chosen.words, chosen.log_probs, chosen.attention, path)


if __name__ == "__main__":
    main()
