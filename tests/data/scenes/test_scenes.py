"""Drawn scenes: the same in every process, held-out pairs only in their split, images that match the scene."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from imgcap_jax.data.scenes.world import (
    COLOURS,
    HELD_OUT,
    RADII,
    SHAPES,
    SPLITS,
    TEXTURES,
    Background,
    Scene,
    SceneObject,
    draw_scene,
    sample_scene,
)

GREY = Background((128, 128, 128), (128, 128, 128), 0.0)


def test_same_scenes_in_every_process_and_version() -> None:
    pinned = (
        '{"objects":[["triangle","orange","small","plain",0.169,0.279,0.142],'
        '["triangle","orange","small","plain",0.223,0.793,0.135],["ring","purple","large","plain",0.622,0.645,0.216]],'
        '"background":[[149,163,149],[149,163,149],0.0]}'
    )
    assert sample_scene("test", 3).to_json() == pinned
    code = "from imgcap_jax.data.scenes.world import sample_scene; print(sample_scene('test', 3).to_json())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == pinned


def test_splits_and_seeds_share_no_scene() -> None:
    scenes = [sample_scene(split, i, seed).to_json() for split in SPLITS for seed in (0, 1) for i in range(200)]
    assert len(set(scenes)) == len(scenes)


def test_json_round_trip_and_bad_json() -> None:
    for i in range(50):
        scene = sample_scene("train", i)
        assert Scene.from_json(scene.to_json()) == scene
    fields = json.loads(sample_scene("train", 0).to_json())
    fields["objects"][0][1] = "mauve"
    for bad in ("{}", "nonsense", "[1]", json.dumps(fields), '{"objects":[["circle"]],"background":[]}'):
        with pytest.raises(ValueError, match=r"scene"):
            Scene.from_json(bad)


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="test_compositional"):
        sample_scene("testing", 0)


def _has_held_out_pair(scene: Scene) -> bool:
    return any((a, o.shape) in HELD_OUT for o in scene.objects for a in (o.colour, o.texture))


def test_held_out_pairs_occur_only_in_the_compositional_split() -> None:
    for split in ("train", "val", "test"):
        assert not any(_has_held_out_pair(sample_scene(split, i)) for i in range(3000))
    compositional = [sample_scene("test_compositional", i) for i in range(1000)]
    assert all(map(_has_held_out_pair, compositional))
    # Every held-out pair is tested. Every other pair of a colour or texture with a shape occurs in training.
    seen = {(a, o.shape) for s in compositional for o in s.objects for a in (o.colour, o.texture)}
    assert set(HELD_OUT) <= seen
    trained = {
        (a, o.shape) for i in range(3000) for o in sample_scene("train", i).objects for a in (o.colour, o.texture)
    }
    assert trained == set(itertools.product((*COLOURS, *TEXTURES), SHAPES)) - set(HELD_OUT)


@pytest.mark.parametrize("split", SPLITS)
def test_number_of_objects(split: str) -> None:
    numbers = [len(sample_scene(split, i).objects) for i in range(1000)]
    assert set(numbers) == {1, 2, 3, 4}
    assert np.mean(numbers) >= 2.5


def test_groups_differ_in_colour_or_shape() -> None:
    for i in range(500):
        objects = sample_scene("test", i).objects
        kinds = {(o.shape, o.colour, o.size, o.texture) for o in objects}
        assert len(kinds) == len({(o.shape, o.colour) for o in objects})


def _silhouette(scene: Scene, i: int, *, alone: bool = False) -> np.ndarray:
    """The share of each pixel that object i fills within its outline, 0..1 [64, 64].

    It is measured by the difference between the object in white and in black.
    """
    pictures = []
    for colour in ("black", "white"):
        objects = [replace(o, colour=colour, texture="plain") if j == i else o for j, o in enumerate(scene.objects)]
        shown = (objects[i],) if alone else tuple(objects)
        pictures.append(draw_scene(Scene(shown, GREY)).astype(float).mean(-1))
    return (pictures[1] - pictures[0]) / (np.mean(COLOURS["white"]) - np.mean(COLOURS["black"]))


def test_every_object_is_mostly_visible_and_within_the_image() -> None:
    overlaps = 0
    for index in range(150):
        scene = sample_scene("test", index)
        for i, o in enumerate(scene.objects):
            whole, seen = _silhouette(scene, i, alone=True).sum(), _silhouette(scene, i).sum()
            assert seen >= 0.65 * whole, (index, i)
            overlaps += seen < 0.99 * whole
            assert o.radius - 0.01 <= min(o.x, o.y, 1 - o.x, 1 - o.y)
    assert overlaps > 10


def test_objects_are_drawn_with_the_position_and_size_of_the_scene() -> None:
    for shape in SHAPES:
        o = SceneObject(shape, "red", "large", "plain", x=0.3, y=0.65, radius=0.2)
        difference = np.abs(draw_scene(Scene((o,), GREY)).astype(int) - draw_scene(Scene((), GREY))).max(-1)
        rows, columns = np.nonzero(difference > 40)
        assert columns.min() / 64 == pytest.approx(0.1, abs=0.04)
        assert (columns.max() + 1) / 64 == pytest.approx(0.5, abs=0.04)
        assert rows.min() / 64 == pytest.approx(0.45, abs=0.04)
        assert (rows.max() + 1) / 64 == pytest.approx(0.85, abs=0.05)


def test_plain_objects_have_their_colour() -> None:
    looked_at = 0
    for index in range(300):
        scene = sample_scene("test", index)
        picture = draw_scene(scene)
        for i, o in enumerate(scene.objects):
            # A point inside the object: its centre, or for a ring the middle of its band.
            x, y = o.x, o.y - (0.74 * o.radius if o.shape == "ring" else 0)
            covered = any(math.hypot(x - p.x, y - p.y) < p.radius + 0.02 for p in scene.objects[i + 1 :])
            if o.texture == "plain" and not covered:
                looked_at += 1
                assert np.abs(picture[int(y * 64), int(x * 64)].astype(int) - COLOURS[o.colour]).max() < 60, (
                    index,
                    i,
                )
    assert looked_at > 200


@pytest.mark.parametrize("size", ["small", "large"])
def test_attributes_are_distinguishable_at_64_pixels(size: str) -> None:
    radius = RADII[size][0]
    inside = slice(int(64 * (0.5 - radius)), math.ceil(64 * (0.5 + radius)))

    def crop(shape: str, colour: str, texture: str) -> np.ndarray:
        scene = Scene((SceneObject(shape, colour, size, texture, 0.5, 0.5, radius),), GREY)
        return draw_scene(scene)[inside, inside].astype(float)

    for one, other in itertools.combinations(SHAPES, 2):
        assert np.abs(crop(one, "red", "plain") - crop(other, "red", "plain")).mean() > 9, (one, other)
    for shape, colour in itertools.product(SHAPES, COLOURS):
        for one, other in itertools.combinations(TEXTURES, 2):
            assert np.abs(crop(shape, colour, one) - crop(shape, colour, other)).mean() > 6, (
                shape,
                colour,
                one,
            )
    chromatic = [colour for colour in COLOURS if colour not in ("black", "white")]
    palette = np.array([*(COLOURS[colour] for colour in chromatic), (0, 0, 0), (128, 128, 128), (255, 255, 255)], float)
    for shape, texture in itertools.product(SHAPES, ("striped", "dotted")):
        for n, colour in enumerate(chromatic):
            # Outlines and marks are black, grey or white, so the most frequent hue is that of the object.
            distances = np.abs(crop(shape, colour, texture)[:, :, None] - palette).sum(-1)
            counts = np.bincount(distances.argmin(-1).ravel(), minlength=len(palette))[: len(chromatic)]
            assert counts.argmax() == n, (shape, texture, colour)
        brightness = {colour: crop(shape, colour, texture).mean() for colour in ("black", "white")}
        assert brightness["white"] > brightness["black"] + 10, (shape, texture)


def test_size_of_the_image() -> None:
    scene = sample_scene("test", 0)
    large = draw_scene(scene, 128)
    assert large.shape == (128, 128, 3)
    assert large.dtype == np.uint8
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(halved - draw_scene(scene, 64)).mean() < 4


def test_gradient_has_the_direction_of_its_angle() -> None:
    picture = draw_scene(Scene((), Background((100, 100, 100), (160, 160, 160), math.pi / 2))).astype(int)
    assert (np.diff(picture[:, 0, 0]) >= 0).all()
    assert np.ptp(picture[5, :, 0]) <= 1
    assert picture[-1, 0, 0] - picture[0, 0, 0] > 30
