"""TensorBoard events."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from imgcap_jax.errors import printable
from imgcap_jax.files import disk_errors
from imgcap_jax.training.writers.contract import Sample


class TensorBoard:
    """Writes events into a folder.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path, resumed_step: int) -> None:
        """Continues the events of earlier processes, of which TensorBoard hides those after ``resumed_step``."""
        from tensorboardX import SummaryWriter  # imports PyTorch if it is installed, which takes a second

        self.folder = folder
        self._events = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        with disk_errors(str(self.folder)):
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def captions(self, step: int, samples: Sequence[Sample]) -> None:
        with disk_errors(str(self.folder)):
            self._events.add_text("validation/captions", "\n\n".join(map(_markdown, samples)), step)

    def pictures(self, step: int, pictures: Sequence[np.ndarray]) -> None:
        """Writes pictures, uint8 [h,w,3] each. Picture i of every step has the same tag."""
        with disk_errors(str(self.folder)):
            for number, picture in enumerate(pictures, 1):
                self._events.add_image(f"validation/sample_{number}", picture, step, dataformats="HWC")

    def close(self) -> None:
        with disk_errors(str(self.folder)):
            self._events.close()


def _markdown(sample: Sample) -> str:
    """The sample as TensorBoard's Markdown, in which a list needs an empty line before it."""
    references = "\n".join(f"* {_plain(reference)}" for reference in sample.references)
    return f"**{_plain(sample.caption)}** ({_plain(sample.file_name)})\n\n{references}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: ``<unk>`` would vanish as an HTML tag."""
    return re.sub(r"[\\`*_{}\[\]#]", r"\\\g<0>", html.escape(printable(text), quote=False))
