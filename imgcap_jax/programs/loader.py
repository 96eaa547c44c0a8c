"""Captions photos with a program that ``imgcap export`` wrote, without imgcap_jax.

    python loader.py model.imgcap photo.jpg ...    # needs jax, flatbuffers, numpy and pillow
    python loader.py model.onnx photo.jpg ...      # needs onnxruntime, numpy and pillow

jax.export reads programs for at least six months after they were written. After that, ``imgcap export model.imgcap
new.imgcap`` writes the program again.
"""

import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "AVIF")  # others may start other programs
Photo = str | IO[bytes]
Function = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Program:
    """Captions photos: paths, or binary files."""

    def __init__(self, path: str) -> None:
        self.about, self.words, self.call = open_onnx(path) if path.endswith(".onnx") else open_stablehlo(path)

    def __call__(self, photos: Sequence[Photo]) -> list[list[tuple[str, float]]]:
        """The captions of photos, best first, each with its log-probability."""
        found = []
        for photo in photos:
            tokens, log_probs = self.call(self.pixels(photo)[None])
            all_beams = zip(np.asarray(tokens[0]), np.asarray(log_probs[0]), strict=True)
            captions = [(self.text(ids), float(log_prob)) for ids, log_prob in all_beams if ids.any()]
            found.append(captions[: self.about["returned"]])  # the other beams are not finished
        return found

    def pixels(self, photo: Photo) -> np.ndarray:
        """A photo at the size of the model, uint8 [size,size,3]."""
        size = self.about["image_size"]
        with Image.open(photo, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{photo}: images with more than 8 bits per channel are not read; convert it")
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

    def text(self, ids: np.ndarray) -> str:
        """The caption of token ids, which end with eos (2) or pad (0)."""
        words = []
        for number in ids:
            if number in (0, 2):
                break
            words.append(self.words[number])
        return " ".join(words)


def open_stablehlo(path: str) -> tuple[dict[str, Any], list[str], Function]:
    """The settings, the words, and the function of images uint8 [B,size,size,3], for any B."""
    import jax
    from jax import export

    with zipfile.ZipFile(path) as file:
        about = json.loads(file.read("program.json"))
        words = json.loads(file.read("vocabulary.json"))["words"]
        arrays = tensors(file.read("model.safetensors")) | tensors(file.read("frozen.safetensors"))
        program = jax.jit(export.deserialize(bytearray(file.read("program.stablehlo"))).call)
    held = [jax.device_put(arrays[name]) for name in about["inputs"]]
    return about, words, lambda images: program(held, images)


def tensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name."""
    import ml_dtypes  # comes with jax

    kinds = {"F16": np.float16, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "BOOL": np.bool_}
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        start, stop = (8 + size + place for place in one["data_offsets"])
        found[name] = np.frombuffer(data[start:stop], kinds[one["dtype"]]).reshape(one["shape"])
    return found


def open_onnx(path: str) -> tuple[dict[str, Any], list[str], Function]:
    """The settings, the words, and the function of images uint8 [1,size,size,3]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options)
    about = json.loads(session.get_modelmeta().custom_metadata_map["imgcap_jax"])
    name = session.get_inputs()[0].name
    return about, about["words"], lambda images: tuple(session.run(None, {name: images}))


def main(arguments: Sequence[str]) -> int:
    """Prints the caption of each photo; returns the exit code."""
    if len(arguments) < 2 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    program, failed = Program(arguments[0]), 0
    for photo in arguments[1:]:
        try:
            print(f"{photo}: {program([photo])[0][0][0]}")
        except (OSError, ValueError) as error:
            print(f"{photo}: {error}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
