"""Damages every kind of file that imgcap reads, reads the damaged files, and reports what should not happen.

    python scripts/fuzz.py --inputs 200              200 inputs of each kind
    python scripts/fuzz.py --minutes 60              as many as fit into an hour
    python scripts/fuzz.py --kind torch_zip --seed 0 --only 17    repeats one input

Each kind is made by this script: small valid files, and the function of imgcap that reads them. An input is the files
with one to three mutations. It depends on kind, seed and number only, except for checkpoints and datasets, whose
writers choose names and times. ``--keep FOLDER`` saves the files of each input that failed, as they were before they
were read.

Allowed outcomes:
    fine        the same value as from the intact files
    clear       a UserError or ImageError of one line, which names a file of the input (see ``Kind.naming``)
    changed     another value, without a digest that promises detection

Failures, for which the script exits with 1:
    SILENT      another value, although a digest promises detection
    UNCLEAR     an error of several lines, or one that names no file
    TRACEBACK   any other exception
    CRASH       the process died
    MEMORY      more than 1 GB above the process's memory before the input
    TIME        more than 10 seconds
"""

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

READING = "reading"  # folder of the input that a worker reads
SECONDS = 10.0
MEMORY = 1 << 30
ALLOWED = ("fine", "clear", "changed")
FAILURES = ("SILENT", "UNCLEAR", "TRACEBACK", "CRASH", "MEMORY", "TIME")


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    make: writes valid files into an empty folder. read: reads them as imgcap does and returns a digest of the value.
    checked: whether a digest in the files promises that another value is reported. files: glob patterns of the files to
    damage. naming: texts that an error can have instead of the name of a file; "" for kinds whose errors name none.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], str]
    checked: bool = False
    files: tuple[str, ...] = ("**/*",)
    naming: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What became of an input: its number, one of ``ALLOWED`` or ``FAILURES``, and the error's line."""

    number: int
    result: str
    line: str = ""


# --- Values ---------------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A digest of arrays, texts, numbers, None, lists and dicts."""
    if isinstance(value, np.ndarray):
        value = f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, dict):
        value = {str(key): digest(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [digest(item) for item in value]
    elif isinstance(value, bytes):
        value = hashlib.sha256(value).hexdigest()
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def encoded(seed: int = 0, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(seed=seed).save(stream, form)
    return stream.getvalue()


# --- Kinds ----------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "plain.jpg", exif=exif)
    image.save(folder / "progressive.jpg", progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "plain.png")
    image.convert("RGBA").save(folder / "transparent.png")
    image.quantize(16).save(folder / "palette.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "deep.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[picture(seed=1)])
    image.save(folder / "plain.bmp")
    image.save(folder / "plain.tif", compression="tiff_lzw")
    Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)).save(folder / "float.tif")
    image.save(folder / "plain.ppm")
    for name in ("WEBP", "AVIF"):
        with contextlib.suppress(OSError, KeyError, ValueError):  # not in every build of PIL
            image.save(folder / f"plain.{name.lower()}")


def read_images(folder: Path) -> str:
    from imgcap_jax.data.image_files import read_file, storable
    from imgcap_jax.data.images import decode

    values = []
    for path in sorted(folder.iterdir()):
        data = read_file(path)
        values += [decode(data, 24), decode(storable(data), 24, "crop")]
    return digest(values)


PHOTOS = 6


def photo_names() -> list[str]:
    return [f"{number}.jpg" for number in range(1, PHOTOS + 1)]


def make_photos(folder: Path) -> None:
    for number, name in enumerate(photo_names()):
        (folder / name).write_bytes(encoded(number, "JPEG"))


def split_of(number: int) -> str:
    return "val" if number == PHOTOS - 1 else "train"


def make_karpathy(folder: Path) -> None:
    make_photos(folder)
    images = [
        {
            "filename": name,
            "imgid": number,
            "split": split_of(number),
            "sentences": [
                {"raw": f"A dog number {k} in picture {number}.", "sentid": 2 * number + k} for k in range(2)
            ],
        }
        for number, name in enumerate(photo_names())
    ]
    (folder / "dataset_fuzz.json").write_text(json.dumps({"dataset": "fuzz", "images": images}))


def make_coco(folder: Path) -> None:
    make_photos(folder)
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        of = [(number, name) for number, name in enumerate(photo_names()) if split_of(number) == split]
        document = {
            "images": [{"id": number, "file_name": name} for number, name in of],
            "annotations": [{"id": number, "image_id": number, "caption": "A cat."} for number, _ in of],
        }
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(document))


def make_jsonl(folder: Path) -> None:
    make_photos(folder)
    lines = [
        {"image": name, "image_id": number, "captions": ["a dog", "a cat"], "split": split_of(number)}
        for number, name in enumerate(photo_names())
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_csv(folder: Path) -> None:
    make_photos(folder)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="|")
        writer.writerow(["image_name", " comment_number", " comment"])
        writer.writerows([name, f" {k}", f" a dog, number {k} ."] for name in photo_names() for k in range(3))


def make_captions_txt(folder: Path) -> None:
    make_photos(folder)
    lines = [f'{name},"a dog, and {k}"\n' for name in photo_names() for k in range(3)]
    (folder / "captions.txt").write_text("image,caption\n" + "".join(lines))


def make_metadata(folder: Path) -> None:
    for split, names in (("train", photo_names()[:-1]), ("validation", photo_names()[-1:])):
        (folder / split).mkdir()
        for number, name in enumerate(names):
            (folder / split / name).write_bytes(encoded(number, "JPEG"))
        lines = [json.dumps({"file_name": name, "text": "a dog"}) + "\n" for name in names]
        (folder / split / "metadata.jsonl").write_text("".join(lines))


def make_blip(folder: Path) -> None:
    make_photos(folder)
    for split in ("train", "val"):
        entries = [
            {"image": name, "caption": f"a dog, number {k}", "image_id": f"coco_{number}"}
            for number, name in enumerate(photo_names())
            for k in range(2)
            if split_of(number) == split
        ]
        (folder / f"mine_{split}.json").write_text(json.dumps(entries))


def read_list(folder: Path) -> str:
    from imgcap_jax.data.builders.folder import scan_folder

    contents = scan_folder(folder)
    images = [(image.filename, image.image_id, image.split, list(image.captions)) for image in contents.images]
    return digest([images, [asdict(entry) for entry in (*contents.absent, *contents.skipped, *contents.repeated)]])


def make_dataset(folder: Path) -> None:
    from imgcap_jax.data.prepare import prepare

    with tempfile.TemporaryDirectory() as photos:
        make_jsonl(Path(photos))
        prepare(photos, name="fuzzed", data_dir=folder, progress=False)


def read_dataset(folder: Path) -> str:
    from imgcap_jax.data.sources import describe, open_source

    described = describe("fuzzed", folder)
    value: list[Any] = [described.splits, described.fingerprint, [asdict(entry) for entry in described.skipped]]
    for split in described.splits:
        source = open_source("fuzzed", split, folder)
        for i, example in enumerate(source):
            value += [asdict(example), source.captions(i)]
        value += [source.image_ids(), source.filenames()]
    return digest(value)


class FeatureImages:
    """Stands for the source of a feature store: 9 images."""

    name, split = "fuzz", "train"

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> Any:
        from imgcap_jax.data.sources import CaptionExample

        return CaptionExample(encoded(i), f"{i}.png", i, self.captions(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return ("a dog",)

    def image_ids(self) -> list[int]:
        return list(range(9))


def build_features(folder: Path, fail_at: int = -1) -> Any:
    from imgcap_jax.data import features
    from imgcap_jax.data.features import FeatureStore

    features._BLOCK_BATCHES = 1
    calls = iter(range(100))

    def encode(images: np.ndarray) -> np.ndarray:
        if next(calls) == fail_at:
            raise RuntimeError
        return images.reshape(2, 8, 24).astype(np.float32)

    source: Any = FeatureImages()
    return FeatureStore.build(
        source, encode, regions=(8, 24), key={}, root=folder, image_size=8, batch_size=2, progress=False
    )


def make_half_features(folder: Path) -> None:
    with contextlib.suppress(RuntimeError):
        build_features(folder, fail_at=3)


def read_features(folder: Path) -> str:
    store = build_features(folder)
    return digest([store.read(i, 0)[0] for i in range(len(store))])


class RegionImages:
    """Stands for a source of images with region files: 4 images."""

    name, split = "fuzz", "train"

    def __len__(self) -> int:
        return 4

    def filenames(self) -> list[str]:
        return [f"photo{i}.jpg" for i in range(4)]

    def image_ids(self) -> list[int]:
        return list(range(4))


def make_regions(folder: Path) -> None:
    rng = np.random.default_rng(0)
    regions = [rng.random((3 + i, 6)).astype(np.float32) for i in range(4)]
    np.savez_compressed(folder / "0.npz", feat=regions[0])
    np.savez(folder / "1.npz", feat=regions[1], boxes=np.zeros((4, 4)))
    np.save(folder / "2.npy", regions[2])
    np.savez(folder / "3.npz", feat=regions[3].reshape(1, 6, 6))


def read_regions(folder: Path) -> str:
    from imgcap_jax.data.regions import ReadyRegions, RegionFiles

    source: Any = RegionImages()
    ready = ReadyRegions(RegionFiles(folder, region_size=6, max_regions=5), source)
    return digest([list(ready.read(i, 0)) for i in range(4)])


SHAPES = {"conv1.weight": (4, 3, 7, 7), "bn1.weight": (4,), "fc.weight": (5, 8), "fc.bias": (5,)}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.random(shape).astype("<f4") for name, shape in SHAPES.items()}


def torch_pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """The pickle of an OrderedDict of tensors, as torch.save writes it in protocol 2."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def numbers(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little") for value in values) + b"t"

    parts = [b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01("]
    for key, (name, values) in enumerate(tensors.items()):
        strides = [stride // values.itemsize for stride in values.strides]
        storage = text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + numbers([values.size])
        parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", storage[:-1].replace(b"(J", b"J"), b"tQK\x00"]
        parts += [numbers(values.shape), numbers(strides), b"\x89h\x00)RtR"]
    return b"".join([*parts, b"u."])


def make_torch_zip(folder: Path) -> None:
    tensors = weights()
    with zipfile.ZipFile(folder / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", torch_pickle(tensors))
        archive.writestr("w/byteorder", "little")
        for key, values in enumerate(tensors.values()):
            archive.writestr(f"w/data/{key}", values.tobytes())
        archive.writestr("w/version", "3\n")


def make_torch_old(folder: Path) -> None:
    import pickle

    tensors = weights()
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    keys = pickle.dumps([str(key) for key in range(len(tensors))], 2)
    numbers = [values.size.to_bytes(8, "little") + values.tobytes() for values in tensors.values()]
    (folder / "w.pth").write_bytes(b"".join([*head, torch_pickle(tensors), keys, *numbers]))


def make_safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(weights(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}))


def read_weights(folder: Path, name: str) -> str:
    from imgcap_jax.models.encoders.pretrained.sources import load_tensors, weights_digest

    path = str(folder / name)
    loaded = load_tensors(path, family="resnet", network="resnet50", shapes=SHAPES)
    weights_digest(path, family="resnet", network="resnet50", shapes=SHAPES)
    return digest([loaded.tensors, loaded.mean, loaded.std])


def make_download(folder: Path) -> None:
    (folder / "w.pth.part").write_bytes(DOWNLOAD[:3000])
    record = {"url": URL, "version": '"v1"', "size": len(DOWNLOAD), "sha256": hashlib.sha256(DOWNLOAD).hexdigest()}
    (folder / "w.pth.part.json").write_text(json.dumps(record))


def read_download(folder: Path) -> str:
    from imgcap_jax import downloads

    with (
        mock.patch.object(downloads, "_open", open_download),
        mock.patch.object(downloads, "_PAUSE_SECONDS", 0.0),
    ):
        sha256 = hashlib.sha256(DOWNLOAD).hexdigest()
        path = downloads.fetch(URL, folder / "w.pth", by_hand="", elsewhere="", sha256=sha256, shown=False)
        return digest(path.read_bytes())


URL = "https://hub.example/w.pth"
DOWNLOAD = bytes(range(256)) * 20


class Response(io.BytesIO):
    """The answer of a server that honours ranges."""

    def __init__(self, start: int) -> None:
        super().__init__(DOWNLOAD[start:])
        self.status = 206 if start else 200
        self.headers = {"ETag": '"v1"', "Content-Length": str(len(DOWNLOAD) - start)}
        if start:
            self.headers["Content-Range"] = f"bytes {start}-{len(DOWNLOAD) - 1}/{len(DOWNLOAD)}"


def open_download(request: Any, redirects: Any) -> Response:
    from imgcap_jax import downloads

    asked = re.fullmatch(r"bytes=(\d+)-", request.get_header("Range", ""))
    start = int(asked[1]) if asked and request.get_header("If-range") == '"v1"' else 0
    if start >= len(DOWNLOAD):
        raise downloads._Unreachable("the server answers 416", 416)
    return Response(start)


def make_run(folder: Path) -> None:
    from imgcap_jax.data.vocabulary import Vocabulary
    from imgcap_jax.experiment import Experiment
    from imgcap_jax.files import write_digests
    from imgcap_jax.run.folder import Run

    captions = ["a dog runs on grass", "two dogs play", "a café 犬"] * 3
    Run(folder, Experiment(), Vocabulary.build(captions, 1), Path("/runs/other"), "0" * 64).save()
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "my_parts.py").write_text("class Mine: ...\n")
    write_digests(folder / "code", ["my_parts.py"])


def read_run(folder: Path) -> str:
    from imgcap_jax.experiment import to_json
    from imgcap_jax.run.folder import Run

    run = Run.load(folder)
    run.code_changes()
    words = [run.vocabulary.decode([n]) for n in range(len(run.vocabulary))]
    ids = run.vocabulary.encode("a dog runs", 6)
    return digest([to_json(run.experiment), words, run.vocabulary.counts, ids, str(run.init_from), run.weights])


def make_metrics(folder: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(folder: Path) -> str:
    from imgcap_jax.training.log import MetricsLog

    log = MetricsLog(folder, 3, steps_per_epoch=5)
    log.close()
    return digest((folder / "metrics.jsonl").read_text(encoding="utf-8"))


def make_sweep(folder: Path) -> None:
    results = [{"step": 7, "runs": ["a"], "decoding": {"beam": beam}, "metrics": {"CIDEr-D": 0.5}} for beam in (1, 3)]
    (folder / "sweep_val.json").write_text(json.dumps(results, indent=2))


def read_sweep(folder: Path) -> str:
    from imgcap_jax.run.evaluation import _read_sweep

    return digest(_read_sweep(folder / "sweep_val.json"))


def parameters() -> dict[str, Any]:
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.random((20, 30)), jnp.float32), "b": jnp.arange(30, dtype=jnp.int32)}


def make_checkpoints(folder: Path) -> None:
    from imgcap_jax.training.checkpoints import Checkpoints, Progress

    checkpoints = Checkpoints(folder, writing=True)
    checkpoints.save(parameters(), Progress(7, {"batches": 7}, 0.5, 6))
    checkpoints.save_best(6, parameters())
    checkpoints.close()


def read_newest(folder: Path) -> str:
    import jax

    from imgcap_jax.errors import UserError
    from imgcap_jax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(folder)
    try:
        if checkpoints.step is None:
            raise UserError(f"{folder}: no checkpoint")
        state, progress = checkpoints.restore(jax.tree.map(lambda leaf: leaf * 0, parameters()))
        return digest([jax.tree.map(np.asarray, state), asdict(progress)])
    finally:
        checkpoints.close()


def read_best(folder: Path) -> str:
    import jax

    from imgcap_jax.training.checkpoints import restore_best

    params, step = restore_best(folder, jax.tree.map(lambda leaf: leaf * 0, parameters()))
    return digest([jax.tree.map(np.asarray, params), step])


def make_frequencies(folder: Path) -> None:
    from imgcap_jax.metrics.cider_device import document_frequencies

    document_frequencies([[[4, 5, 6, 7], [4, 5]], [[8, 9]]], 10).save(folder / "document_frequencies.npz", "these")


def read_frequencies(folder: Path) -> str:
    import jax

    from imgcap_jax.metrics.cider_device import DocumentFrequencies

    found = DocumentFrequencies.load(folder / "document_frequencies.npz", "these")
    return digest([np.asarray(leaf) for leaf in jax.tree.leaves(found)])


def make_scores(folder: Path) -> None:
    captions = {number: f"a dog runs on the grass in picture {number}" for number in range(1, 6)}
    results = [{"image_id": number, "caption": text, "file_name": f"{number}.jpg"} for number, text in captions.items()]
    annotations = [{"id": n, "image_id": n, "caption": text + " today"} for n, text in captions.items()]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in captions]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "references.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def read_scores(folder: Path) -> str:
    from imgcap_jax.metrics.meteor import tables
    from imgcap_jax.metrics.score_files import score_files

    tables.official_folder = lambda part: None  # its tables take 10 s to compile
    report = score_files(folder / "results.json", folder / "references.json")
    return digest({name: repr(metric) for name, metric in report.scores.metrics.items()})


def make_idf(folder: Path) -> None:
    make_scores(folder)
    shutil.copyfile(folder / "references.json", folder / "idf.json")


def read_idf(folder: Path) -> str:
    from imgcap_jax.metrics.meteor import tables
    from imgcap_jax.metrics.score_files import score_files

    tables.official_folder = lambda part: None
    report = score_files(folder / "results.json", folder / "references.json", idf=folder / "idf.json")
    return digest({name: repr(metric) for name, metric in report.scores.metrics.items()})


def make_meteor(folder: Path) -> None:
    (folder / "package" / "data").mkdir(parents=True)
    with zipfile.ZipFile(folder / "package" / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\na\nis\n")
        jar.writestr("synonym/english.synsets", "dog\n1 2\nhound\n1\nman\n6\nguy\n6\n")
        jar.writestr("synonym/english.exceptions", "grind\nground\nbe\nis am\n")
    with gzip.GzipFile(folder / "package" / "data" / "paraphrase-en.gz", "wb", mtime=0) as file:
        file.write(b"0.5\na dog\nthe hound\n0.4\nhound\nbig animal\n")
    read_meteor(folder)


def read_meteor(folder: Path) -> str:
    from imgcap_jax.metrics.meteor import tables

    os.environ["IMGCAP_CACHE"] = str(folder / "cache")
    tables.official_folder = lambda part: folder / "package"
    found = tables.Tables.load()
    arrays = [found.function, found.synset, found.base, found.paraphrase, *found.prefix]
    return digest([found.number, *map(np.asarray, arrays)])


# The only file of annotations is gone.
_LIST = functools.partial(Kind, read=read_list, naming=("no annotation file",))
KINDS: dict[str, Kind] = {
    "image": Kind(make_images, read_images, naming=("",)),  # callers add the name
    "karpathy": _LIST(make_karpathy, files=("*.json",)),
    "coco": _LIST(make_coco, files=("annotations/*",)),
    "jsonl": _LIST(make_jsonl, files=("*.jsonl",)),
    "csv": _LIST(make_csv, files=("*.csv",)),
    "captions_txt": _LIST(make_captions_txt, files=("*.txt",)),
    "metadata": _LIST(make_metadata, files=("*/metadata.jsonl",)),
    "blip": _LIST(make_blip, files=("*.json",)),
    "dataset": Kind(make_dataset, read_dataset, checked=True, naming=("is not prepared in", "fuzzed/1.0.0 is damaged")),
    "features": Kind(build_features, read_features, checked=True),
    "half_features": Kind(make_half_features, read_features, checked=True),
    "regions": Kind(make_regions, read_regions, naming=("have no region file",)),
    "torch_zip": Kind(make_torch_zip, functools.partial(read_weights, name="w.pth")),
    "torch_old": Kind(make_torch_old, functools.partial(read_weights, name="w.pth")),
    "safetensors": Kind(make_safetensors, functools.partial(read_weights, name="model.safetensors")),
    "download": Kind(make_download, read_download, checked=True),
    "run": Kind(make_run, read_run),
    "metrics": Kind(make_metrics, read_metrics),
    "sweep": Kind(make_sweep, read_sweep),
    "newest": Kind(
        make_checkpoints, read_newest, checked=True, files=("checkpoints/newest/**/*",), naming=("checkpoints/newest",)
    ),
    "best": Kind(
        make_checkpoints, read_best, checked=True, files=("checkpoints/best/**/*",), naming=("checkpoints/best",)
    ),
    "frequencies": Kind(make_frequencies, read_frequencies, checked=True),
    "scores": Kind(make_scores, read_scores),
    "idf": Kind(make_idf, read_idf, files=("idf.json",)),
    "meteor_cache": Kind(make_meteor, read_meteor, checked=True, files=("cache/**/*",)),
    "meteor_package": Kind(make_meteor, read_meteor, files=("package/**/*",), naming=("",)),  # not installed
}


# --- Mutations ------------------------------------------------------------------------------------------------------

NASTY_JSON: tuple[str, ...] = (
    *("null", "true", "-1", "0", "1.5", "1e999", "-1e999", "NaN", "Infinity", '""', "[]", "{}", "[[]]", '"x"'),
    *(str(2**31), str(2**63), str(10**30), "1" + "0" * 5000, '"\\ud800"', '"\\u0000"', '"\\u2028"', '"../../../x"'),
    *('"/etc/passwd"', json.dumps("y" * 100_000), "[" * 100_000, '{"a":' * 50_000, "[" * 400 + "]" * 400),
)
NASTY_BYTES: tuple[bytes, ...] = (
    *(b"\xff", b"\x00", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\r", b"\x1a", b"\xef\xbb\xbf", b"\xff\xff\xff\xff"),
    *(b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", b"PK\x05\x06", b"[" * 5000, b"," * 5000),
)
NASTY_FILES: tuple[bytes, ...] = (b"", b"\x00" * 4096, b"\xff" * 100, b"{}", b"[]", b"null", b"<html>", b"[" * 200_000)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """One mutation of the bytes of a file."""

    def place() -> int:
        return int(rng.integers(len(data) + 1))

    start = place()
    stop = min(len(data), start + int(rng.choice([1, 2, 4, 16, 256, 4096])))
    match int(rng.integers(10)):
        case 0 | 1 | 2 if data:
            at = start % len(data)
            return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        case 3:
            return data[:start]
        case 4:
            return data[:start] + data[stop:]
        case 5:
            return data[:stop] + data[start:stop] * int(rng.choice([1, 2, 1000])) + data[stop:]
        case 6:
            return data[:start] + rng.bytes(stop - start) + data[stop:]
        case 7:
            other = place()
            return data[:start] + data[other : other + stop - start] + data[stop:]
        case 8:
            nasty = NASTY_BYTES[int(rng.integers(len(NASTY_BYTES)))]
            return data[:start] + nasty + data[start + (len(nasty) if rng.random() < 0.5 else 0) :]
        case _:
            return NASTY_FILES[int(rng.integers(len(NASTY_FILES)))] if rng.random() < 0.3 else data[: start // 2]


def mutate_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """Damages a member of a zip archive; the checksums of the archive are right."""
    stream = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(stream, "w") as changed,
    ):
        warnings.simplefilter("ignore")  # two members of a name
        members = archive.infolist()
        at = int(rng.integers(len(members)))
        for number, member in enumerate(members):
            content = archive.read(member)
            if number == at:
                content = mutate_bytes(content, rng)
                if rng.random() < 0.1:
                    member.filename = members[int(rng.integers(len(members)))].filename
            changed.writestr(member, content)
    return stream.getvalue()


def mutate_png(data: bytes, rng: np.random.Generator) -> bytes:
    """Damages a chunk of a PNG image; the checksums of the image are right."""
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += size + 12
    at = int(rng.integers(len(chunks)))
    chunks[at] = (chunks[at][0], mutate_bytes(chunks[at][1], rng))
    return data[:8] + b"".join(
        len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        for kind, content in chunks
    )


def mutate_text(text: str, rng: np.random.Generator) -> str:
    """One mutation of a text of JSON, lines or a table: a value, a word or a line becomes another one."""
    if rng.random() < 0.25:
        lines = text.split("\n")
        a, b = (int(rng.integers(len(lines))) for _ in range(2))
        lines[a] = lines[b] if rng.random() < 0.5 else lines[a] + "\n" + lines[a]
        return "\n".join(lines)
    found = list(re.finditer(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|true|false|null|\w+', text))
    if not found:
        return text
    token = found[int(rng.integers(len(found)))]
    if rng.random() < 0.2:
        other = found[int(rng.integers(len(found)))]
        return text[: token.start()] + other[0] + text[token.end() :]
    return text[: token.start()] + NASTY_JSON[int(rng.integers(len(NASTY_JSON)))] + text[token.end() :]


def mutate(folder: Path, files: Sequence[str], rng: np.random.Generator) -> str:
    """Damages a file of a folder; returns its path in the folder."""
    present = sorted({path for pattern in files for path in folder.glob(pattern) if path.is_file()})
    if not present:
        return ""
    path = present[int(rng.integers(len(present)))]
    what = rng.random()
    if what < 0.03:
        path.unlink()
    elif what < 0.05:
        path.unlink()
        path.mkdir()
    elif what < 0.07 and len(present) > 1:
        shutil.copyfile(present[int(rng.integers(len(present)))], path.with_name(path.name + ".new"))
        path.with_name(path.name + ".new").replace(path)
    else:
        data = path.read_bytes()
        with contextlib.suppress(UnicodeDecodeError):
            if rng.random() < 0.6 and b"\x00" not in data:
                path.write_bytes(mutate_text(data.decode(), rng).encode("utf-8", "surrogatepass"))
                return str(path.relative_to(folder))
        repaired = {b"PK": mutate_zip, b"\x89P": mutate_png}.get(data[:2], mutate_bytes)
        try:
            changed = (repaired if rng.random() < 0.6 else mutate_bytes)(data, rng)
        except Exception:  # already damaged by the mutation before this one
            changed = mutate_bytes(data, rng)
        path.write_bytes(changed)
    return str(path.relative_to(folder))


# --- Reading one input ----------------------------------------------------------------------------------------------


class Input:
    """The valid files of a kind, from which damaged ones are made in a folder next to them."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.kind = name, KINDS[name]
        self._intact, self.folder = home / "intact", home / "fuzzed_files"
        self._intact.mkdir(parents=True)
        self.kind.make(self._intact)
        self._restore()
        self.value = self.kind.read(self.folder)

    def _restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._intact, self.folder)

    def damage(self, seed: int, number: int) -> list[str]:
        """Makes input ``number`` of a seed; returns the files that were damaged."""
        self._restore()
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), number])
        return [mutate(self.folder, self.kind.files, rng) for _ in range(int(rng.choice([1, 1, 1, 2, 3])))]

    def read(self, number: int) -> Outcome:
        """Reads the damaged files."""
        from imgcap_jax.data.image_files import ImageError
        from imgcap_jax.errors import UserError

        files = [path.relative_to(self._intact) for path in self._intact.rglob("*") if path.is_file()]
        names = [*self.kind.naming, *map(str, files), *(path.name for path in files if path.suffix)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = self.kind.read(self.folder)
        except (UserError, ImageError) as error:
            line = str(error)
            clear = "\n" not in line and any(name in line for name in names)
            return Outcome(number, "clear" if clear else "UNCLEAR", line.replace(str(self.folder), "...")[:300])
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "imgcap_jax" in frame.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "fuzz.py"
            text = " ".join(str(error).split()).replace(str(self.folder), "...")[:200]
            return Outcome(number, "TRACEBACK", f"{where} {type(error).__name__}: {text}")
        if value == self.value:
            return Outcome(number, "fine")
        return Outcome(number, "SILENT" if self.kind.checked else "changed")


def work(name: str, seed: int, numbers: Sequence[int], keep: Path | None) -> None:
    """Reads inputs in this process. Prints a line when it begins with an input, and a line of JSON for its outcome.

    If ``keep`` is given, the files of the present input are in ``keep/READING``, from before they are read until the
    outcome is allowed.
    """
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="imgcap_fuzz_") as home:
        source = Input(name, Path(home))
        # A stop for what would fill the machine's memory. MEMORY is measured below.
        limit = _status("VmSize") + 4 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in numbers:
            source.damage(seed, number)
            if keep is not None:
                shutil.rmtree(keep / READING, ignore_errors=True)
                shutil.copytree(source.folder, keep / READING)
            print(f"begin {number}", flush=True)
            before = _reset_peak()
            outcome = source.read(number)
            used = _status("VmHWM") - before
            if used > MEMORY:
                outcome = Outcome(number, "MEMORY", f"{used / 1e6:,.0f} MB; {outcome.result} {outcome.line}")
            if keep is not None and outcome.result in FAILURES:
                _keep(keep, number)
            print(json.dumps(outcome), flush=True)


def _keep(folder: Path, number: int) -> None:
    """Keeps the files of the present input of a worker, which failed."""
    shutil.rmtree(folder / str(number), ignore_errors=True)
    (folder / READING).replace(folder / str(number))


def _status(name: str) -> int:
    """A number of bytes in /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _reset_peak() -> int:
    """Resets VmHWM, the peak of this process's memory, to its present memory, which is returned."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


# --- Running workers ------------------------------------------------------------------------------------------------


def run(name: str, seed: int, numbers: Sequence[int], until: float, keep: Path | None = None) -> Iterator[Outcome]:
    """Reads inputs in worker processes, which are replaced when they die or take too long.

    ``keep`` gets a folder for each input that failed, named by its number.
    """
    left = list(numbers)
    while left and time.monotonic() < until:
        command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), "--only", *map(str, left)]
        command += [] if keep is None else ["--keep", str(keep)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            lines: Queue[str | None] = Queue()
            Thread(target=_forward, args=(process, lines), daemon=True).start()
            begun: int | None = None
            try:
                while True:
                    # The worker's start includes the imports and the valid files.
                    line = lines.get(timeout=SECONDS if begun is not None else 120)
                    if line is None:
                        break
                    if line.startswith("begin "):
                        begun = int(line.split()[1])
                    elif line.startswith("["):
                        outcome = Outcome(*json.loads(line))
                        left.remove(outcome.number)
                        begun = None
                        yield outcome
                        if time.monotonic() > until:
                            return
            except Empty:
                if begun is None:
                    raise SystemExit(f"{name}: the worker does not start") from None
                left.remove(begun)
                process.kill()
                process.wait()
                if keep is not None:
                    _keep(keep, begun)
                yield Outcome(begun, "TIME", f"more than {SECONDS:.0f} s")
                continue
            finally:
                process.kill()
                process.wait()
            if begun is not None:
                if keep is not None:
                    _keep(keep, begun)
                errors.seek(0)
                last = (errors.read().strip().splitlines() or [""])[-1]
                left.remove(begun)
                yield Outcome(begun, "CRASH", f"exit status {process.returncode}: {last[:200]}")
            elif left:
                errors.seek(0)
                raise SystemExit(f"{name}: the worker ended early\n{errors.read()[-2000:]}")


def _forward(process: subprocess.Popen[str], lines: "Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--inputs", type=int, default=100, help="inputs of each kind (default: 100)")
    parser.add_argument("--minutes", type=float, help="stop after this time, with the same time for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="read these inputs only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save the inputs that failed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.seed, options.only, options.keep)
        return 0
    inputs = 10**9 if options.minutes else options.inputs
    print(f"seed {options.seed}\n{'kind':16}{'inputs':>8}" + "".join(f"{name:>10}" for name in (*ALLOWED, *FAILURES)))
    failures: list[tuple[str, Outcome]] = []
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    for place, name in enumerate(options.kind):
        share = (end - time.monotonic()) / (len(options.kind) - place)
        outcomes: list[Outcome] = []
        first, until = 0, time.monotonic() + share
        while first < inputs and time.monotonic() < until:
            numbers = options.only or range(first, min(first + 500, inputs))
            keep = None if options.keep is None else options.keep / name
            outcomes += run(name, options.seed, numbers, until, keep)
            if keep is not None:
                shutil.rmtree(keep / READING, ignore_errors=True)
            first += 500 if not options.only else inputs
        counts = Counter(outcome.result for outcome in outcomes)
        print(f"{name:16}{len(outcomes):8}" + "".join(f"{counts[one]:10}" for one in (*ALLOWED, *FAILURES)), flush=True)
        failures += [(name, outcome) for outcome in outcomes if outcome.result in FAILURES]
        if options.only:
            print("".join(f"  {outcome}\n" for outcome in outcomes), end="")
    _report(failures, options.seed)
    return 1 if failures else 0


def _report(failures: Sequence[tuple[str, Outcome]], seed: int) -> None:
    """Prints one line per place that failed, with the number of inputs and how to repeat the first."""
    places: dict[tuple[str, str, str], list[Outcome]] = {}
    for name, outcome in failures:
        line = re.sub(r"\d+", "N", outcome.line)[:80] if outcome.result != "TRACEBACK" else outcome.line.split(":")[0:2]
        places.setdefault((name, outcome.result, str(line)), []).append(outcome)
    for (name, result, _), found in places.items():
        print(f"{len(found):6} x {result}: {found[0].line.encode(errors='backslashreplace').decode()}")
        print(f"         --kind {name} --seed {seed} --only {found[0].number}")


if __name__ == "__main__":
    sys.exit(main())
