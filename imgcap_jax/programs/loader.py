"""Captions photos with a program that ``imgcap export`` wrote. It needs jax, flatbuffers, numpy and pillow only.

    python loader.py model.imgcap photo.jpg ...

A copy of this file is in the program's file. jax.export reads programs for at least six months after they were written;
after that, ``imgcap export model.imgcap new.imgcap`` writes the program again.
"""

import json
import sys
import zipfile
from collections.abc import Sequence
from typing import IO

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps


def tensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"F16": np.float16, "F32": np.float32, "BF16": jax.numpy.bfloat16}
    found = {}
    for name, one in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + place for place in one["data_offsets"])
            found[name] = np.frombuffer(data[start:stop], kinds[one["dtype"]]).reshape(one["shape"])
    return found


class Program:
    """Captions photos: paths, or binary files."""

    def __init__(self, path: str) -> None:
        with zipfile.ZipFile(path) as file:
            self.about = json.loads(file.read("program.json"))
            self.words = json.loads(file.read("vocabulary.json"))["words"]
            arrays = tensors(file.read("model.safetensors")) | tensors(file.read("frozen.safetensors"))
            self.program = export.deserialize(bytearray(file.read("program.stablehlo")))
        self.arrays = [jax.device_put(arrays[name]) for name in self.about["inputs"]]
        self.call = jax.jit(self.program.call)

    def pixels(self, photo: str | IO[bytes]) -> np.ndarray:
        """A photo at the size of the model, uint8 [size,size,3]."""
        size = self.about["image_size"]
        with Image.open(photo) as image:
            if image.format in ("JPEG", "MPO"):
                image.draft("RGB", (size, size))  # as in training: decoded no larger than needed
            upright: Image.Image = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            box = None
            if self.about["resize"] == "crop":
                side = min(upright.size)
                left, top = (upright.width - side) / 2, (upright.height - side) / 2
                box = left, top, left + side, top + side
            return np.asarray(upright.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box))

    def __call__(self, photos: Sequence[str | IO[bytes]]) -> list[list[tuple[str, float]]]:
        """The captions of photos, best first, each with its log-probability."""
        tokens, log_probs = self.call(self.arrays, np.stack([self.pixels(photo) for photo in photos]))
        return [
            [(self.text(ids), float(log_prob)) for ids, log_prob in zip(captions, of_photo, strict=True) if ids.any()]
            for captions, of_photo in zip(np.asarray(tokens), np.asarray(log_probs), strict=True)
        ]

    def text(self, ids: np.ndarray) -> str:
        """The caption of token ids, which end with eos (2) or pad (0)."""
        words = []
        for number in ids:
            if number in (0, 2):
                break
            words.append(self.words[number])
        return " ".join(words)


if __name__ == "__main__":
    program = Program(sys.argv[1])
    for photo in sys.argv[2:]:
        print(f"{photo}: {program([photo])[0][0][0]}")
