"""Ready-made regions (bottom-up attention, CLIP), one file per image, in place of an encoder."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeIs

from imgcap_jax.array_files import read_arrays
from imgcap_jax.errors import UserError
from imgcap_jax.files import reading

if TYPE_CHECKING:
    from imgcap_jax.data.sources import CaptionSource

_SUFFIXES = (".npz", ".npy")


class RegionSource(Protocol):
    """The regions of the images of one split: a `FeatureStore`, `ReadyRegions`, or your own. Picklable."""

    @property
    def views(self) -> int:
        """Versions of each image."""
        ...

    def __len__(self) -> int:
        """The number of images, I."""
        ...

    def read(self, i: int, view: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
        """The regions [N, D] of a view of image i, and the mask [N] of those that exist; None: all of them."""
        ...


def read_regions(
    source: RegionSource, images: npt.NDArray[np.int64], views: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """The regions [B, N, D] of these views of these images, and the mask [B, N] of those that exist; None: all of them.

    A source can have a method `read_many` with these arguments and results, which then reads all of them at once.
    """
    read_many = getattr(source, "read_many", None)
    if read_many is not None:
        found: tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None] = read_many(images, views)
        return found
    rows = [source.read(i, view) for i, view in zip(images.tolist(), views.tolist(), strict=True)]
    masks = [mask for _, mask in rows if mask is not None]
    return np.stack([regions for regions, _ in rows]), np.stack(masks) if masks else None


class RegionSettings(Protocol):
    """Settings of ready-made regions: a frozen dataclass in the place of an encoder's settings.

    It has `read_regions` where an encoder's settings have `build`.
    """

    @property
    def region_size(self) -> int:
        """D."""
        ...

    @property
    def frozen(self) -> bool:
        """True."""
        ...

    def read_regions(self, source: "CaptionSource") -> RegionSource:
        """The regions of a split.

        Raises:
            UserError: regions of an image are missing.
        """
        ...


def has_ready_regions(settings: object) -> TypeIs[RegionSettings]:
    """Whether an experiment's encoder settings read ready-made regions."""
    return hasattr(settings, "read_regions")


@dataclass(frozen=True)
class RegionFiles:
    """Files of ready-made regions, whose number can differ between images.

    The folder contains one file per image. All files are named by image id (`391895.npz`), or all by image file name
    without its ending (`COCO_val2014_000000391895.npz`). Each contains an array [n, D] or [rows, columns, D]. Without a
    folder, the array is the feature `regions` of the dataset's records.
    """

    folder: Path | None = None
    region_size: int = 2048
    """D; 2048 in the bottom-up features of Anderson et al. (2018)."""
    max_regions: int = 100
    """N: images with fewer regions are padded and masked; of more regions, the first N are kept."""
    key: str = "feat"
    """Name of the array in an .npz file; not needed if the file has only one array."""

    def __post_init__(self) -> None:
        for name in ("region_size", "max_regions"):
            if getattr(self, name) < 1:
                raise UserError(f"encoder.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def frozen(self) -> bool:
        """True: there is nothing to train."""
        return True

    def read_regions(self, source: "CaptionSource") -> "ReadyRegions":
        """See `RegionSettings`."""
        return ReadyRegions(self, source)


class ReadyRegions:
    """The ready-made regions of one split. Picklable and safe to read from several threads."""

    views = 1

    def __init__(self, config: RegionFiles, source: "CaptionSource") -> None:
        """Finds the file of each image.

        Raises:
            UserError: the folder is missing, an image has no file, or the dataset has no feature `regions`.
        """
        self._config = config
        self._source = source
        self._paths: list[Path] = []
        if config.folder is None:
            if source[0].regions is None:
                raise UserError(
                    f"{source.name} has no feature `regions`; set encoder.folder to a folder of region files"
                )
            return
        if not config.folder.is_dir():
            raise UserError(f"encoder.folder {config.folder} is not a folder; give the one with the region files")
        present: dict[str, Path] = {}
        for path in _region_files(config.folder):
            if path.stem in present:
                raise UserError(f"{config.folder} holds both {present[path.stem].name} and {path.name}; keep one")
            present[path.stem] = path
        by_name = [Path(name).stem for name in source.filenames()]
        by_id = [str(image_id) for image_id in source.image_ids()]
        # All files must be named the same way: `1.npz` could belong to image 1 or to `1.jpg`.
        ways = [names for names in (by_name, by_id) if all(name in present for name in names)]
        where = f"{config.folder}, {source.name}, split {source.split}"
        if not ways:
            names = max((by_name, by_id), key=lambda names: sum(name in present for name in names))
            missing = [name for name in names if name not in present]
            raise UserError(
                f"{where}: {len(missing)} of {len(names)} images have no region file, the first is {missing[0]}.npz; "
                f"give the folder of this dataset's features, named all by file name or all by image id"
            )
        if len(ways) == 2 and by_name != by_id:
            raise UserError(f"{where}: files match by file name and by image id, which differ; keep one kind")
        if len(set(ways[0])) < len(ways[0]):
            raise UserError(f"{where}: several images have the same file name; name the region files by image id")
        self._paths = [present[name] for name in ways[0]]

    def __len__(self) -> int:
        return len(self._source)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self._config.max_regions, self._config.region_size

    def identity(self) -> dict[str, Any]:
        """What the regions depend on, for a copy: the settings, and the names, sizes and times of the files."""
        config = self._config
        files = hashlib.sha256()
        for path in self._paths:
            found = path.stat()
            files.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        return {
            "regions": [config.max_regions, config.region_size, config.key],
            "files": files.hexdigest() if self._paths else self._source.fingerprint,
            "dataset": [self._source.name, self._source.split],
        }

    def read(self, i: int, view: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The regions float32 [N, D] of an image, padded with zeros, and the mask [N] of those that exist.

        Raises:
            UserError: the file cannot be read, or its array has another size.
        """
        config = self._config
        if self._paths:
            where, array = str(self._paths[i]), _load(self._paths[i], config.key)
        else:
            where, array = f"{self._source.name}, image {i}", np.asarray(self._source[i].regions)
        if array.ndim == 3 and array.size:
            array = array.reshape(-1, array.shape[-1])
        if array.ndim != 2 or array.shape[1] != config.region_size or not len(array) or array.dtype.kind != "f":
            raise UserError(
                f"{where}: an array {array.dtype} {list(array.shape)}, expected floating-point regions "
                f"[n, {config.region_size}]; set encoder.region_size and encoder.key to what the files hold"
            )
        count = min(len(array), config.max_regions)
        regions = np.zeros((config.max_regions, config.region_size), np.float32)
        with np.errstate(over="ignore"):
            regions[:count] = array[:count]
        if not np.isfinite(regions).all():
            raise UserError(f"{where}: regions that are NaN, infinite or beyond float32; make this file again")
        return regions, np.arange(config.max_regions) < count


def _region_files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            # Not a pipe or a device, which could be read without end.
            return sorted(Path(entry) for entry in entries if entry.name.endswith(_SUFFIXES) and entry.is_file())
    except OSError as error:
        raise UserError(f"encoder.folder {folder} can't be read ({error.strerror})") from error


def _load(path: Path, key: str) -> npt.NDArray[Any]:
    def choose(names: Sequence[str]) -> list[str]:
        if key not in names and len(names) != 1:
            raise UserError(f"{path} has no array {key!r} but {', '.join(names)[:200]}; set encoder.key to one of them")
        return [key if key in names else names[0]]

    with reading(path, "make this .npz or .npy file again, with regions as floating-point numbers"):
        (array,) = read_arrays(path, choose).values()
        return array
