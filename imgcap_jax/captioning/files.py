"""Captions image files, and passes the captions on to outputs. No file is lost: each is captioned or reported."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from imgcap_jax.captioner import BATCH, Caption, Captioner
from imgcap_jax.captioning.outputs import Output, shown_path
from imgcap_jax.data.image_files import ImageError
from imgcap_jax.data.prefetch import map_ahead
from imgcap_jax.errors import UserError
from imgcap_jax.files import reason
from imgcap_jax.terminal import on_terminal, working

_READERS = 8  # threads at most, each with a photo in memory


def caption_files(
    captioner: Captioner, files: Sequence[Path], outputs: Sequence[Output], *, quiet: bool = False
) -> Iterator[tuple[str, bool]]:
    """Captions image files. Yields (line to print, whether it reports a failure).

    An unreadable file is reported by name; the other files are still captioned. If an output fails for a photo, such as
    a picture that cannot be drawn, the photo still reaches the other outputs. The last line counts the files that were
    left out, and the photos for which an output failed, if there are any.

    Lines are printable: control characters in file names are escaped, and so are bytes that are not UTF-8.

    Args:
        captioner: the model.
        files: image files (see ``data.photo_files``), which can be missing.
        outputs: get the captions of each photo, in this order. They are closed, also after an interruption.
        quiet: whether no output prints captions, so that a terminal shows the progress instead.

    Raises:
        UserError: an output can't be written.
    """
    left_out, incomplete = 0, 0
    # On a terminal the captions themselves are shown.
    progress = working("captioning", len(files), "photos", shown=quiet or not on_terminal())
    try:
        with progress as work:
            for path, found in _captioned(captioner, files):
                work.advance()
                if isinstance(found, str):
                    left_out += 1
                    yield f"imgcap: {shown_path(path)}: {found}; not captioned", True
                    continue
                failed = False
                for output in outputs:
                    try:
                        for line in output.add(path, found):
                            yield line, False
                    except (ImageError, OSError, UserError) as error:
                        failed = True
                        yield f"imgcap: {shown_path(path)}: {reason(error)}; {output.missing}", True
                incomplete += failed
    finally:
        with ExitStack() as stack:  # all of them, also if one fails
            for output in reversed(outputs):
                stack.callback(output.close)
    if (left_out or incomplete) and len(files) > 1:
        outcome = f"captioned {len(files) - left_out:,} of {len(files):,} photos; left out {left_out:,}"
        lacking = f"; {incomplete:,} of the captioned ones lack an output" if incomplete else ""
        yield f"imgcap: {outcome}{lacking}", True


def _captioned(captioner: Captioner, files: Sequence[Path]) -> Iterator[tuple[Path, Sequence[Caption] | str]]:
    """The captions of each file, or the reason why it has none, in order. The next files are read in threads."""
    read: deque[tuple[Path, str]] = deque()  # with the reason of each file that cannot be read, else ""

    def pixels(path: Path) -> list[np.ndarray] | str:
        try:
            return captioner.pixels(path)
        except (ImageError, OSError) as error:
            return reason(error)

    def images() -> Iterator[list[np.ndarray] | None]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = map_ahead(pixels, files, threads=min(cores, _READERS), ahead=2 * BATCH, at_once=False)
        for path, image in zip(files, found, strict=True):
            assert image is not None
            read.append((path, image if isinstance(image, str) else ""))
            yield None if isinstance(image, str) else image

    for batch in captioner.turns(images()):
        for captions in batch:
            while read[0][1]:
                yield read.popleft()
            yield read.popleft()[0], captions
        while read and read[0][1]:
            yield read.popleft()
    yield from read
