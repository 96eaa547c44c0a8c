"""Ids of images: all ways to write the same id, and ids of images that have none."""

import hashlib

import pytest

from imgcap_jax.image_ids import id_of_file_name, parse_image_id


@pytest.mark.parametrize("value", [7, 7.0, "7", "000007", " 7", "7.0", "coco_7", "COCO_val2014_000000000007.jpg"])
def test_all_ways_to_write_an_id(value: object) -> None:
    assert parse_image_id(value) == 7


def test_the_largest_id() -> None:
    assert parse_image_id(str(2**63 - 1)) == parse_image_id(2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize(
    "value",
    [-1, 2**63, str(2**63), 10**5000, "9" * 5000, 1.5, float("nan"), float("inf"), 2.0**60, True, None, "cat", "", [7]],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else type(value).__name__,
)
def test_what_is_not_an_id(value: object) -> None:
    with pytest.raises(ValueError, match=r"is not an integer|is not between 0 and|has lost digits") as error:
        parse_image_id(value)
    assert len(str(error.value)) < 120


def test_ids_of_file_names() -> None:
    assert id_of_file_name("val2014/COCO_val2014_000000391895.jpg") == 391895
    assert id_of_file_name("000000391895.jpg") == 391895
    # The rule must never change: captions of an earlier version of a dataset belong to the same photos.
    assert (
        id_of_file_name("dog.jpg") == 2**52 + int(hashlib.sha256(b"dog.jpg").hexdigest()[:13], 16) == 8383619044458581
    )
    assert id_of_file_name("dog_12.jpg") != id_of_file_name("cat/dog_12.jpg")
    ids = {id_of_file_name(f"{number}.jpg") for number in range(2000)}
    assert len(ids) == 2000
    assert all(2**52 <= one < 2**53 for one in ids)
