"""Opening and reading prepared datasets."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import tensorflow_datasets as tfds

from imgcap_jax.cli.main import main
from imgcap_jax.data.builders import layout
from imgcap_jax.data.builders.layout import Origin, write_origin
from imgcap_jax.data.prepare import prepare
from imgcap_jax.data.scenes.builder import SceneSplits
from imgcap_jax.data.sources import (
    CaptionExample,
    check_dataset,
    describe,
    open_source,
    parse_mixture,
    read_origin,
    split_names,
)
from imgcap_jax.errors import UserError
from imgcap_jax.files import file_digest, write_text


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


def test_incomplete_tfds_is_no_damage_of_the_dataset(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TFDS swallows the ImportError of a requirement. Its attributes are missing then."""
    monkeypatch.delattr(tfds, "builder_from_directory")
    with pytest.raises(UserError, match="TensorFlow Datasets is not installed with all its requirements: pip"):
        open_source("scenes", "train", data_dir)


def opened(data_dir: Path) -> list[tuple[CaptionExample, tuple[str, ...]]]:
    """Everything that the package reads of two splits."""
    sources = [open_source("scenes", split, data_dir) for split in ("train", "val")]
    return [(example, source.captions(i)) for source in sources for i, example in enumerate(source)]


@pytest.fixture
def copy(data_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(data_dir, tmp_path / "copy")
    return tmp_path / "copy"


def dataset_folder(data_dir: Path) -> Path:
    (info,) = data_dir.glob("scenes/*/dataset_info.json")
    return info.parent


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("damage", ["absent", "broken", "short", "deep", "other types"])
def test_a_damaged_caption_index_is_made_again(damage: str, digests: bool, copy: Path) -> None:
    folder = dataset_folder(copy)
    index = folder / "captions_val.json"
    if not digests:  # as in datasets of older versions
        (folder / "SHA256SUMS").unlink()
    before = index.read_text()
    parsed = json.loads(before)
    index.write_text(
        {
            "absent": "",
            "broken": before[:-20],
            "short": json.dumps({key: values[:-1] for key, values in parsed.items()}),
            "deep": "[" * 100_000,
            "other types": json.dumps({**parsed, "captions": [[7]] * 3}),
        }[damage]
    )
    if damage == "absent":
        index.unlink()
    source = open_source("scenes", "val", copy)
    assert [source.captions(i) for i in range(3)] == [example.captions for example in source]
    assert index.read_text() == before


def test_another_word_in_the_caption_index_is_found(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = dataset_folder(copy) / "captions_val.json"
    before = index.read_text()
    index.write_text(before.replace(" a ", " A ", 1))
    assert check_dataset("scenes", copy) == [f"{index} has changed"]
    open_source("scenes", "val", copy)
    assert index.read_text() == before
    assert "captions_val.json is damaged; it is made again from the records" in caplog.text
    assert check_dataset("scenes", copy) == []


def mutate(path: Path, random: Random) -> str:
    content = bytearray(path.read_bytes())
    kind = random.choice(["cut", "flip", "overwrite", "delete"])
    at = random.randrange(len(content))
    if kind == "delete":
        path.unlink()
        return kind
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        content[at] ^= 1 << random.randrange(8)
    else:
        content[at : at + 8] = random.randbytes(8)
    path.write_bytes(content)
    return kind


@pytest.mark.parametrize("digests", [True, False])
def test_damage_is_reported_in_one_line_or_changes_nothing(
    digests: bool, data_dir: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened(data_dir)
    folder, intact = dataset_folder(copy), dataset_folder(data_dir)
    if not digests:
        (folder / "SHA256SUMS").unlink()
    names = sorted(path.name for path in folder.iterdir())
    reported = 0
    for seed in range(60):
        random = Random(seed)
        name = random.choice(names)
        kind = mutate(folder / name, random)
        where = f"seed {seed}: {kind} {name}"
        found, message = expected, ""
        try:
            found = opened(copy)
        except UserError as error:
            reported += 1
            message = str(error)
        assert not message or "not prepared" in message or str(folder) in message, where
        assert "\n" not in message, where
        if digests or not name.startswith("captions_"):  # without digests, other captions cannot be noticed
            assert found == expected, where
        shutil.copy(intact / name, folder / name)
        for index in folder.glob("captions_*"):  # made again
            shutil.copy(intact / index.name, index)
    assert reported > 10


def test_damaged_records_name_the_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dataset_folder(copy)
    (records,) = folder.glob("*-val.array_record*")
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    with pytest.raises(UserError, match=r"-val\.array_record-00000-of-00001 is damaged .*prepare the dataset again"):
        opened(copy)
    assert main(["data", "inspect", "scenes", "--check", "--data-dir", str(copy)]) == 2
    output = capsys.readouterr()
    assert output.out == f"{records} has changed\n"
    assert output.err == "imgcap: scenes: 1 damaged file; delete its folder and prepare the dataset again\n"
    records.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"array_record-00000-of-00001 is damaged \([\d,]+ bytes; expected [\d,]+\)"):
        open_source("scenes", "train", copy)  # the size of every file is checked at once
    # Preparing it again, as the message says, repairs it.
    said: list[str] = []
    splits = SceneSplits(40, 3, 3, 3, image_size=32)
    prepare("scenes", data_dir=copy, scenes=splits, progress=False, say=said.append)
    assert "damaged" in said[0]
    assert main(["data", "inspect", "scenes", "--check", "--data-dir", str(copy)]) == 0
    assert capsys.readouterr().out == "scenes: not damaged\n"
    (folder / "origin.json").write_text("{}")
    with pytest.raises(UserError, match=r"damaged .origin.json.; delete this folder and run the same command again"):
        prepare("scenes", data_dir=copy, scenes=splits, progress=False)


def test_a_dataset_imports_no_module(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_features.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = dataset_folder(copy)
    (folder / "SHA256SUMS").unlink()
    features = (folder / "features.json").read_text()
    own = "tensorflow_datasets.core.features.image_feature.Image"
    assert own in features
    (folder / "features.json").write_text(features.replace(own, "evil_features.Image"))
    with pytest.raises(UserError, match=r"features\.json: 'evil_features\.Image' is not a feature of TFDS"):
        open_source("scenes", "val", copy)


def test_sha256sum_reads_the_digests(data_dir: Path, copy: Path) -> None:
    folder = dataset_folder(copy)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder, capture_output=True, text=True).stderr == ""
    # A note that is added later changes only the origin, which contains its own digest.
    write_origin(folder, replace(read_origin(folder), licence="my own"))
    assert describe("scenes", copy).licence == "my own"
    assert subprocess.run(check, cwd=folder, capture_output=True, text=True).stderr == ""
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == 2 * (len(list(folder.iterdir())) - 2) + 1
    assert check_dataset("scenes", copy) == []
    origin = (folder / "origin.json").read_text()
    (folder / "origin.json").write_text(origin.replace("my own", "my owm"))
    assert "origin.json is damaged (its digest has changed)" in check_dataset("scenes", copy)[0]
    with pytest.raises(UserError, match=r"origin.json is damaged .its digest has changed"):
        describe("scenes", copy)


def test_the_origin_is_replaced_even_if_the_process_is_killed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dataset_folder(copy)
    origin = read_origin(folder)
    # Older versions list the origin in SHA256SUMS.
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    added = [
        f"# {(folder / 'origin.json').stat().st_size} bytes: origin.json\n",
        f"{file_digest(folder / 'origin.json')}  origin.json\n",
        f"# {len(sums) // 2 + 1} files\n",
    ]
    (folder / "SHA256SUMS").write_text("".join([*sums[:-1], *added]))
    assert check_dataset("scenes", copy) == []

    class Killed(BaseException):
        pass

    for writes in range(3):
        left = writes

        def write(path: Path, text: str) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            write_text(path, text)

        monkeypatch.setattr(layout, "write_text", write)
        if writes < 2:
            with pytest.raises(Killed):
                write_origin(folder, replace(origin, licence="CC0"))
        else:
            write_origin(folder, replace(origin, licence="CC0"))
        assert check_dataset("scenes", copy) == [], writes
        assert describe("scenes", copy).licence == ("CC0" if writes == 2 else origin.licence)
        if writes < 2:
            (folder / "SHA256SUMS").write_text("".join([*sums[:-1], *added]))


def test_a_note_that_is_added_later_is_one_write(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(layout, "write_text", lambda path, text: written.append(path.name))
    write_origin(dataset_folder(copy), Origin("scenes", "", "CC0", "x"))
    assert written == ["origin.json"]


@pytest.mark.parametrize("digests", [True, False])
def test_pipes_in_place_of_files_are_refused(digests: bool, copy: Path) -> None:
    folder = dataset_folder(copy)
    if not digests:
        (folder / "SHA256SUMS").unlink()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)  # reading it would wait for ever
        with pytest.raises(UserError, match=rf"{path.name} is a pipe or a device"):
            open_source("scenes", "val", copy)
        path.unlink()
        path.write_bytes(content)
    assert len(open_source("scenes", "val", copy)) == 3


def test_digests_that_are_cut_off_are_damage(copy: Path) -> None:
    sums = dataset_folder(copy) / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(UserError, match=r"SHA256SUMS is damaged \(not complete\)"):
        describe("scenes", copy)


def test_errors_say_what_to_do(data_dir: Path) -> None:
    assert split_names("scenes", data_dir) == ["train", "val", "test", "test_compositional"]
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, val, test, test_compositional"):
        open_source("scenes", "dev", data_dir)
    with pytest.raises(
        UserError, match=r"datasets: scenes.*imgcap data prepare flickr8k; .* TFDS_DATA_DIR .* --data-dir"
    ):
        open_source("flickr8k", "train", data_dir)
    with pytest.raises(UserError, match=r"imgcap data prepare coco;"):
        open_source("coco", "train", data_dir)
    with pytest.raises(UserError, match="not prepared"):
        open_source("../scenes", "train", data_dir / "scenes")


def test_an_unknown_split_is_reported_with_advice(copy: Path) -> None:
    """TFDS's own builders can have other names of splits, such as validation."""
    with pytest.raises(UserError, match=r"no split 'validation'; .*; did you mean val\?$"):
        open_source("scenes", "validation", copy)
    with pytest.raises(UserError, match=r"no split 'minival'; it has train, val, test, test_compositional$"):
        open_source("scenes", "minival", copy)
    (info,) = copy.glob("scenes/*/dataset_info.json")
    (info.parent / "SHA256SUMS").unlink()
    text = info.read_text()
    info.write_text(text.replace('"val"', '"valid"'))
    with pytest.raises(UserError, match=r"no split 'val'; .*; its split 'valid' must be called 'val': rename it and"):
        open_source("scenes", "val", copy)
    info.write_text(text.replace('"val"', '"other"'))
    with pytest.raises(UserError, match=r"no split 'val'; .*; training needs train and val"):
        open_source("scenes", "val", copy)


def test_the_default_folder_is_that_of_tfds(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(data_dir))
    assert isinstance(open_source("scenes", "val")[0], CaptionExample)


def test_mixtures() -> None:
    assert parse_mixture("flickr8k") == [("flickr8k", 1.0)]
    assert parse_mixture("flickr8k*2 + coco") == [("flickr8k", 2.0), ("coco_captions", 1.0)]
    for wrong in ("", "a+", "a*0", "a*x", "a*-1", "a*inf", "a+a", "A b", "a*nan"):
        with pytest.raises(UserError):
            parse_mixture(wrong)


@pytest.mark.parametrize("name", ["origin.json", "dataset_info.json"])
def test_a_missing_file_of_a_dataset_is_damage(name: str, copy: Path) -> None:
    """Without these files it would pass for the dataset of another program, or for none."""
    (dataset_folder(copy) / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing: delete its folder"):
        open_source("scenes", "val", copy)


def test_records_outside_of_the_dataset_are_not_read(copy: Path) -> None:
    folder = dataset_folder(copy)
    (folder / "SHA256SUMS").unlink()
    info = (folder / "dataset_info.json").read_text().replace("{DATASET}-", "/etc/{DATASET}-")
    (folder / "dataset_info.json").write_text(info)
    with pytest.raises(UserError, match="its records are in another folder"):
        open_source("scenes", "val", copy)


def test_an_origin_without_its_digest_is_damage(copy: Path) -> None:
    path = dataset_folder(copy) / "origin.json"
    origin = json.loads(path.read_text())
    del origin["sha256"]
    path.write_text(json.dumps(origin))
    with pytest.raises(UserError, match=r"origin\.json is damaged \(its digest has changed\)"):
        describe("scenes", copy)


def test_a_long_number_in_the_digests_is_ignored(copy: Path) -> None:
    path = dataset_folder(copy) / "SHA256SUMS"
    path.write_text(f"# {'9' * 5000} bytes: features.json\n" + path.read_text())
    assert len(open_source("scenes", "val", copy))


def test_hashing_shows_its_progress(tmp_path: Path, progress_lines: list[str]) -> None:
    prepare("scenes", data_dir=tmp_path, scenes=SceneSplits(4, 1, 1, 1, image_size=32))
    assert "computing checksums: 0/1 MB" in progress_lines
    assert main(["data", "inspect", "scenes", "--check", "--data-dir", str(tmp_path)]) == 0
    assert "checking scenes: 0/1 MB" in progress_lines
