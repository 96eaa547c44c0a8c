"""Opening and reading prepared datasets."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.scenes.builder import SceneSplits
from imgcap_jax.data.sources import CaptionExample, describe, open_source, parse_mixture, split_names
from imgcap_jax.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("data")
    prepare("scenes", data_dir=data_dir, scenes=SceneSplits(40, 3, 3, 3, image_size=32), progress=False)
    return data_dir


def test_many_threads_read_the_same_as_one(data_dir: Path) -> None:
    source = open_source("scenes", "train", data_dir)
    expected = list(source)
    fresh = open_source("scenes", "train", data_dir)  # its readers are opened in the threads
    order = list(range(len(fresh))) * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.__getitem__, order)) == expected * 20


def test_captions_and_ids_agree_with_the_examples(data_dir: Path) -> None:
    source = open_source("scenes", "train", data_dir)
    examples = list(source)
    assert [source.captions(i) for i in range(len(source))] == [example.captions for example in examples]
    assert source.image_ids() == [example.image_id for example in examples]
    assert source.filenames() == [example.filename for example in examples]
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source[outside]


@pytest.mark.parametrize("damage", ["absent", "broken", "short"])
def test_a_damaged_caption_index_is_rebuilt(damage: str, data_dir: Path) -> None:
    folder = describe("scenes", data_dir).folder
    index = folder / "captions_val.json"
    before = index.read_text()
    if damage == "absent":
        index.unlink()
    elif damage == "broken":
        index.write_text(before[:-20])
    else:
        index.write_text(json.dumps({key: values[:-1] for key, values in json.loads(before).items()}))
    source = open_source("scenes", "val", data_dir)
    assert [source.captions(i) for i in range(3)] == [example.captions for example in source]
    assert index.read_text() == before


def test_errors_say_what_to_do(data_dir: Path) -> None:
    assert split_names("scenes", data_dir) == ["train", "val", "test", "test_compositional"]
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, val, test, test_compositional"):
        open_source("scenes", "dev", data_dir)
    with pytest.raises(UserError, match=r"prepared datasets: scenes.*imgcap data prepare FOLDER --name flickr8k"):
        open_source("flickr8k", "train", data_dir)
    with pytest.raises(UserError, match=r"imgcap data prepare coco$"):
        open_source("coco", "train", data_dir)
    with pytest.raises(UserError, match="not prepared"):
        open_source("../scenes", "train", data_dir / "scenes")


def test_the_default_folder_is_that_of_tfds(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(data_dir))
    assert isinstance(open_source("scenes", "val")[0], CaptionExample)


def test_mixtures() -> None:
    assert parse_mixture("flickr8k") == [("flickr8k", 1.0)]
    assert parse_mixture("flickr8k*2 + coco") == [("flickr8k", 2.0), ("coco_captions", 1.0)]
    for wrong in ("", "a+", "a*0", "a*x", "a*-1", "a*inf", "a+a", "A b", "a*nan"):
        with pytest.raises(UserError):
            parse_mixture(wrong)
