"""Reads METEOR's table of paraphrases. pyarrow splits its 270 MB of text into words."""

import gzip
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 1 << 21  # bytes of text; larger blocks need more memory and are slower


@dataclass(frozen=True)
class Paraphrases:
    """The table of paraphrases: several phrases in a row for each source phrase.

    Letters: E paraphrases; S sources; F = E + S phrases, some of them equal; W words of all phrases.

    Attributes:
        words: the different words, sorted.
        flat: the words of the phrases, as indices into `words`, [W]. The paraphrases are first, in the order of the
            table, and the sources follow.
        lengths: the number of words in each phrase, [F].
        repeats: the number of paraphrases of each source, [S].
    """

    words: list[str]
    flat: np.ndarray
    lengths: np.ndarray
    repeats: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "Paraphrases":
        """Reads the table (gzip): three lines per paraphrase, which are its probability, its source and itself.

        Raises:
            ValueError, EOFError, OSError, zlib.error: the file is damaged or cannot be read.
        """
        number: defaultdict[str, int] = defaultdict()
        number.default_factory = number.__len__  # a new word gets the next number

        def numbers(phrases: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
            """The numbers of the words of all phrases, and the number of words in each phrase."""
            split = pc.split_pattern(phrases, " ")
            words = split.flatten().dictionary_encode()
            known = np.array([number[word.removesuffix("\n")] for word in words.dictionary.to_pylist()], np.int64)
            return _small(known)[words.indices.to_numpy()], _small(pc.list_value_length(split).to_numpy())

        targets, sources, repeats = [], [], []
        for lines in _lines(path):
            runs = pc.run_end_encode(lines.take(np.arange(1, len(lines), 3)))
            sources.append(numbers(runs.values))
            targets.append(numbers(lines.take(np.arange(2, len(lines), 3))))
            repeats.append(np.diff(runs.run_ends.to_numpy(), prepend=0))
        ordered = sorted(number)
        place = _small(np.argsort([number[word] for word in ordered]))
        return cls(
            ordered,
            np.concatenate([place[flat] for flat, _ in targets + sources]),
            np.concatenate([lengths for _, lengths in targets + sources]),
            np.concatenate(repeats),
        )


def _small(values: np.ndarray) -> np.ndarray:
    """The values as integers without a sign of the smallest size that holds them."""
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def _lines(path: Path) -> Iterator[pa.StringArray]:
    """The lines with their newlines, in blocks of whole paraphrases. A second thread decompresses the next block."""
    with gzip.open(path) as file, ThreadPoolExecutor(1) as reader:
        rest, following = b"", reader.submit(file.read, _BLOCK)
        while block := following.result():
            following = reader.submit(file.read, _BLOCK)
            text = rest + block
            ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
            offsets = np.concatenate([[0], ends[: len(ends) // 3 * 3]]).astype(np.int32)
            rest = text[offsets[-1] :]
            yield pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))
    if rest:
        raise ValueError(f"{path.name} does not consist of groups of three lines")
