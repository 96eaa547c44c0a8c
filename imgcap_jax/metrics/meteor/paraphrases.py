"""Reads METEOR's table of paraphrases. pyarrow splits its 270 MB of text into words."""

import gzip
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 1 << 21  # bytes of text; larger blocks need more memory and are slower
_AT_A_TIME = 1 << 17  # phrases; limits the memory


@dataclass(frozen=True)
class Paraphrases:
    """The table of paraphrases: several phrases in a row for each source phrase.

    Letters: E paraphrases; S sources; F = E + S phrases, some of them equal.

    Attributes:
        words: the different words, sorted.
        phrases: the words of each phrase, then zeros. Word 1 is the first of `words`. The paraphrases are first, in the
            order of the table, and the sources follow, [F, number of words in the longest phrase].
        repeats: the number of paraphrases of each source, [S].
    """

    words: list[str]
    phrases: np.ndarray
    repeats: np.ndarray

    @classmethod
    def read(cls, path: Path, longest: int) -> "Paraphrases":
        """Reads the table (gzip): three lines per paraphrase, which are its probability, its source and itself.

        Args:
            path: the file.
            longest: the number of words in the longest phrase.

        Raises:
            ValueError, EOFError, OSError, zlib.error: the file is damaged or cannot be read.
        """
        number = defaultdict[str, int]()
        number.default_factory = lambda: len(number) + 1  # a new word gets the next number

        def numbered(phrases: pa.StringArray) -> np.ndarray:
            """The words of each phrase, as numbers in the order of their first occurrence, then zeros."""
            split = pc.split_pattern(phrases, " ")
            lengths = pc.list_value_length(split).to_numpy()
            if lengths.max(initial=1) > longest:
                raise ValueError(f"{path.name} has a phrase of {lengths.max()} words")
            words = split.flatten().dictionary_encode()
            numbers = np.array([number[word.removesuffix("\n")] for word in words.dictionary.to_pylist()], np.int64)
            numbers = numbers.astype(np.min_scalar_type(len(number)))
            found = np.zeros((len(phrases), longest), numbers.dtype)
            found[np.arange(longest) < lengths[:, None]] = numbers[words.indices.to_numpy()]
            return found

        paraphrases, sources, repeats = [], [], []
        for block in _ahead(_blocks(path)):
            paraphrases.append(numbered(block.paraphrases))
            sources.append(numbered(block.sources))
            repeats.append(block.repeats)
        if not number:
            raise ValueError(f"{path.name} is empty")
        pa.default_memory_pool().release_unused()  # 20 MB
        words = sorted(number)
        phrases = np.concatenate(paraphrases + sources)
        del paraphrases, sources
        place = np.zeros(len(words) + 1, phrases.dtype)
        place[[number[word] for word in words]] = np.arange(1, len(place))
        for begin in range(0, len(phrases), _AT_A_TIME):
            phrases[begin : begin + _AT_A_TIME] = place[phrases[begin : begin + _AT_A_TIME]]
        return cls(words, phrases, np.concatenate(repeats))


class _Block(NamedTuple):
    """Consecutive paraphrases of the table. The attributes are as in ``Paraphrases``; each phrase ends in a newline."""

    paraphrases: pa.StringArray
    sources: pa.StringArray
    repeats: np.ndarray


def _blocks(path: Path) -> Iterator[_Block]:
    """The whole table, in blocks. Raises the errors of ``Paraphrases.read``."""
    rest = b""
    with gzip.open(path) as file:
        while block := file.read(_BLOCK):
            text = rest + block
            ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
            offsets = np.concatenate([[0], ends[: len(ends) // 3 * 3]]).astype(np.int32)
            rest = text[offsets[-1] :]
            lines = pa.StringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(text))
            sources = pc.run_end_encode(lines.take(np.arange(1, len(lines), 3)))
            repeats = np.diff(sources.run_ends.to_numpy(), prepend=0)
            yield _Block(lines.take(np.arange(2, len(lines), 3)), sources.values, repeats)
    if rest:
        raise ValueError(f"{path.name} does not consist of groups of three lines")


def _ahead(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """The same blocks. A second thread makes the next one while the caller works on one."""
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(next, blocks, None)
        while (block := following.result()) is not None:
            following = maker.submit(next, blocks, None)
            yield block
