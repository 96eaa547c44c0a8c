"""A run as a compiled program (StableHLO, ONNX): the loader, alone, writes the captions of the run."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from imgcap_jax.captioner import Captioner
from imgcap_jax.cli.main import main
from imgcap_jax.data.sources import open_source
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.programs.common import LOADER

# Stands for an environment without imgcap_jax and everything that it needs, except what the loader needs.
_ALONE = """
import sys

BLOCKED = sys.argv.pop(1).split(",")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("imgcap_jax", "flax", "optax", "orbax", "safetensors", "simplejpeg", *BLOCKED):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def photos(folder: Path, data: Path) -> list[Path]:
    """Drawings as PNG, a large JPEG, one that lies on its side, and one with transparency."""
    files = []
    for number, example in enumerate(open_source("scenes", "test", data)):
        path = folder / f"{number}.png"
        path.write_bytes(example.image)
        picture = Image.open(path).convert("RGB").resize((300, 200))
        exif = Image.Exif()
        if number == 1:
            picture.save(path := path.with_suffix(".jpg"), quality=95)
        elif number == 2:
            exif[0x0112] = 6
            picture.save(path := path.with_suffix(".jpg"), exif=exif)
        elif number == 3:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(path)
        files.append(path)
    return files


@pytest.mark.parametrize("kind", ["imgcap", "onnx"])
def test_the_loader_alone_writes_the_captions_of_the_run(
    trained: Path, tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("jax2onnx", reason="writes ONNX files")
        pytest.importorskip("onnxruntime", reason="runs ONNX files")
    else:
        pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    path = tmp_path / f"model.{kind}"
    options = ["--beam", "3", "--decode.forbid-repeated-words", "true"]
    assert main(["export", str(trained), str(path), "--dtype", "float32", *options]) == 0
    files = photos(tmp_path, tiny_data)
    blocked = "jax,jaxlib,ml_dtypes" if kind == "onnx" else "onnxruntime"
    command = [sys.executable, "-c", _ALONE, blocked, str(LOADER), str(path), *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    captions = Captioner.load(trained, decoding=Decoding(beam=3, forbid_repeated_words=True))(files)
    assert found == [f"{file}: {caption.text}" for file, caption in zip(files, captions, strict=True)]
    assert len({caption.text for caption in captions}) > 1


def test_a_file_can_be_written_again_by_a_newer_version(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    old, new = tmp_path / "old.imgcap", tmp_path / "new.imgcap"
    assert main(["export", str(trained), str(old), "--dtype", "float32"]) == 0
    assert main(["export", str(old), str(new), "--dtype", "float32"]) == 0
    with zipfile.ZipFile(old) as before, zipfile.ZipFile(new) as after:
        assert before.namelist() == after.namelist()
        for name in ("model.safetensors", "frozen.safetensors", "vocabulary.json", "program.json"):
            assert before.read(name) == after.read(name)
    assert main(["export", str(old), str(tmp_path / "folder")]) == 0
    assert Captioner.load(tmp_path / "folder").runs[0].vocabulary.words


def test_what_a_program_cannot_do_is_refused(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = str(tmp_path / "model.imgcap")
    assert "rerank needs files of the training data" in refused(
        ["export", str(trained), path, "--beam", "3", "--decode.rerank", "mbr"]
    )
    assert "decoding options are for a program" in refused(["export", str(trained), str(tmp_path / "x"), "--beam", "5"])
    (tmp_path / "bad.imgcap").write_bytes(b"no zip")
    assert "give a file that imgcap export wrote" in refused(["export", str(tmp_path / "bad.imgcap"), path])
    assert not Path(path).exists()
