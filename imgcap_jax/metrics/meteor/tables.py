"""METEOR's English tables: synonyms, function words, paraphrases.

The data are those of the official tool, read from the installed package `pycocoevalcap` (extra `meteor`). They are
compiled once into arrays in the cache folder, which are then mapped into memory. No code of the package is run.

Letters: K known words, D entries of synsets, P nodes of the prefix tree of phrases, E paraphrases.
"""

import gzip
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from imgcap_jax.errors import UserError
from imgcap_jax.files import cache_folder, damages, read_digests, write_digests
from imgcap_jax.metrics.corpus import changes, expand, pairs
from imgcap_jax.metrics.official import official_folder

HOW_TO_ADD = "pip install pycocoevalcap adds its tables"
LONGEST = 7  # words of the longest phrase in the table
_AT_A_TIME = 1 << 17  # phrases; limits the memory of the compilation
_FORMAT = 4  # version of the compiled tables; must be increased when their format changes
_ARRAYS = ("function", "synset_start", "synset", "base_start", "base", "paraphrase_start", "paraphrase")
_PREFIXES = tuple(f"prefix_{length}" for length in range(2, LONGEST + 1))
_FILES = {"words.txt", *(f"{name}.npy" for name in _ARRAYS + _PREFIXES)}

# Endings that WordNet's morphology replaces, in this order, until the result is a word in the dictionary.
_ENDINGS = (
    ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ("er", ""), ("er", "e"), ("est", ""), ("est", "e"), ("men", "man"),
)  # fmt: skip


def package_folder() -> Path | None:
    """The folder of METEOR's data in `pycocoevalcap`; None if it is not installed or does not contain them."""
    folder = official_folder("meteor")
    return folder if folder is not None and all(path.is_file() for path in _sources(folder)) else None


def _sources(folder: Path) -> tuple[Path, Path]:
    return folder / "meteor-1.5.jar", folder / "data" / "paraphrase-en.gz"


@dataclass(frozen=True)
class Tables:
    """The compiled tables.

    Attributes:
        number: the id of each known word.
        function: whether each known word is a function word, [K].
        synset_start [K+1], synset [D]: the synsets of each word, from `synset_start[word]` on, without those of its
            base forms.
        base_start [K+1], base: the words of which each word is an irregular form.
        prefix: for each phrase length from 2 on, sorted pairs (node of all words except the last, last word). The node
            of a single word is its id. The nodes of length n follow those of length n-1, in the order of the pairs.
        paraphrase_start [P+1], paraphrase [E]: the nodes of the paraphrases of each node, in the order of the table.
            The table lists one direction; matching uses both.
    """

    number: dict[str, int]
    function: np.ndarray
    synset_start: np.ndarray
    synset: np.ndarray
    base_start: np.ndarray
    base: np.ndarray
    prefix: tuple[np.ndarray, ...]
    paraphrase_start: np.ndarray
    paraphrase: np.ndarray

    @classmethod
    def load(cls) -> "Tables":
        """Maps the compiled tables into memory. Compiles them first if necessary.

        Compiling takes 6 s of CPU time. The whole process of a first `imgcap score` needs up to 450 MB of memory.

        Raises:
            UserError: `pycocoevalcap` is not installed or is damaged, or the cache cannot be written.
        """
        package = package_folder()
        if package is None:
            raise UserError(f"METEOR needs its tables: {HOW_TO_ADD}")
        sizes = "-".join(str(path.stat().st_size) for path in _sources(package))
        folder = cache_folder("meteor") / f"1.5-en-{sizes}-{_FORMAT}"
        try:
            try:
                return cls._read(package, folder)
            except FileNotFoundError:  # another process has just replaced the folder, which was damaged
                return cls._read(package, folder)
        except OSError as error:
            raise UserError(
                f"cannot keep METEOR's tables in {folder.parent} ({error.strerror or error}): set IMGCAP_CACHE to a "
                "writable folder with 100 MB of free space"
            ) from error

    @classmethod
    def _read(cls, package: Path, folder: Path) -> "Tables":
        if not _is_whole(folder):
            _compile(package, folder)
        words = (folder / "words.txt").read_text("utf-8").split("\n")
        arrays = {name: _mapped(folder / f"{name}.npy") for name in _ARRAYS}
        prefix = tuple(_mapped(folder / f"{name}.npy") for name in _PREFIXES)
        return cls({word: i for i, word in enumerate(words)}, prefix=prefix, **arrays)

    def synsets(self, word: str) -> set[int]:
        """The synsets of a word and of its possible base forms, which are found as in WordNet's morphology."""
        known = self.number.get(word)
        numbers = [] if known is None else [known]
        bases = [] if known is None else self.base[self.base_start[known] : self.base_start[known + 1]].tolist()
        if bases:
            numbers += bases
        elif len(word) > 2 and not word.endswith("ss"):
            numbers += islice(self._regular_bases(word), 1)
        return {
            synset
            for number in numbers
            for synset in self.synset[self.synset_start[number] : self.synset_start[number + 1]].tolist()
        }

    def _regular_bases(self, word: str) -> Iterator[int]:
        for ending, replacement in _ENDINGS:
            if word.endswith(ending):
                base = self.number.get(word[: -len(ending)] + replacement)
                if base is not None and self.synset_start[base] < self.synset_start[base + 1]:
                    yield base

    def nodes(self, words: np.ndarray, left: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Looks up all phrases in a text, one phrase length after another.

        Args:
            words: the ids of the words of the text, -1 for unknown words.
            left: the number of words from each word to the end of its sentence, itself included.

        Yields:
            For lengths 1 to `LONGEST`: the positions at which a known phrase or a prefix of one begins; its nodes.
        """
        place = np.flatnonzero(words >= 0)
        node = words[place].astype(np.int64)
        yield place, node
        offset = len(self.function)
        for length, keys in enumerate(self.prefix, 2):
            if not len(keys):
                return
            goes_on = left[place] >= length
            place, node = place[goes_on], node[goes_on]
            last = words[place + length - 1].astype(np.int64)
            wanted = pairs(node, last)
            found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known = (last >= 0) & (keys[found] == wanted)
            place, node = place[known], found[known] + offset
            offset += len(keys)
            yield place, node


def _mapped(path: Path) -> np.ndarray:
    """An array in a file. A ``memmap`` is slow to index, so it is viewed as a plain array."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def _is_whole(folder: Path) -> bool:
    """Whether all files are as they were written (0.1 s). A power cut or a clean-up can damage a cache."""
    try:
        return (read_digests(folder) or {}).keys() == _FILES and not damages(folder)
    except OSError:
        return False


def _compile(package: Path, folder: Path) -> None:
    """Compiles the tables into a temporary folder, which then takes the final name and replaces a damaged folder."""
    print("METEOR: compiling its tables (only once, a few seconds)", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".1.5-en-*"):  # left by a process that was killed
        with suppress(FileNotFoundError):  # that process is alive and has just finished
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    damaged = temporary.with_name(f"{temporary.name}.damaged")
    temporary.chmod(0o755)  # the cache can be shared between users
    try:
        try:
            _write_tables(*_sources(package), temporary)
        except (
            zipfile.BadZipFile,
            gzip.BadGzipFile,
            zlib.error,
            EOFError,
            KeyError,
            ValueError,
            RuntimeError,
        ) as error:
            raise UserError(f"{package} is damaged ({error}): install pycocoevalcap again") from error
        write_digests(temporary)
        if folder.is_dir() and not _is_whole(folder):
            with suppress(FileNotFoundError):  # another process has just moved it
                folder.rename(damaged)  # at once; other processes could read a folder that is being deleted
        try:
            temporary.rename(folder)
        except OSError:
            if not _is_whole(folder):  # otherwise another process has just created it
                raise
        for other in folder.parent.glob("1.5-en-*"):
            written = re.fullmatch(r"1\.5-en-\d+-\d+-(\d+)", other.name)
            if written and int(written[1]) < _FORMAT:  # only earlier releases of this package read it
                shutil.rmtree(other, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)


def _write_tables(jar: Path, paraphrases: Path, folder: Path) -> None:
    from imgcap_jax.metrics.meteor.paraphrases import Paraphrases  # imports pyarrow, which only this needs

    table = Paraphrases.read(paraphrases, LONGEST)
    words = _write_words(jar, table.words, folder)
    number = {word: i for i, word in enumerate(words)}
    ids = np.array([number[word] for word in table.words], np.int64)
    prefix, node_of = _prefix_tree(table.phrases, ids, len(words))
    repeats = table.repeats
    del table  # frees the memory of the phrases
    for length, keys in enumerate(prefix, 2):
        np.save(folder / f"prefix_{length}.npy", keys)
    nodes = len(words) + sum(map(len, prefix))
    targets, sources = np.split(node_of, [len(node_of) - len(repeats)])
    starts = np.concatenate([[0], np.cumsum(np.bincount(sources, repeats, nodes))])
    np.save(folder / "paraphrase_start.npy", starts.astype(np.int32))
    begin = np.cumsum(repeats) - repeats
    of_sources = (
        targets[expand(begin[some], repeats[some])[1]]
        for some in np.array_split(np.argsort(sources, kind="stable"), 16)  # in parts, which need less memory
    )
    np.save(folder / "paraphrase.npy", np.concatenate(list(of_sources)))


def _write_words(jar: Path, in_phrases: Sequence[str], folder: Path) -> list[str]:
    """Writes the known words, their synsets and their base forms. Returns the words, sorted."""
    with zipfile.ZipFile(jar) as archive:

        def lines(name: str) -> list[str]:
            return archive.read(name).decode("utf-8").split("\n")

        function = set(lines("function/english.words")) - {""}
        synsets = dict(_pairs(lines("synonym/english.synsets")))
        bases = defaultdict[str, list[str]](list)
        for base, forms in _pairs(lines("synonym/english.exceptions")):
            for form in forms.split():
                bases[form].append(base)
    irregular = {word for form, words in bases.items() for word in (form, *words)}
    # Entries of several words ("ice_cream") are omitted, because METEOR matches synonyms word by word.
    words = sorted(word for word in {*function, *synsets, *irregular, *in_phrases} if "_" not in word)
    number = {word: i for i, word in enumerate(words)}
    arrays = {
        "function": np.array([word in function for word in words]),
        **_listed("synset", [[int(synset) for synset in synsets.get(word, "").split()] for word in words]),
        **_listed("base", [[number[base] for base in bases.get(word, ()) if base in number] for word in words]),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    (folder / "words.txt").write_text("\n".join(words), "utf-8")
    return words


def _pairs(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of lines: a word, then its values."""
    return zip(lines[::2], lines[1::2], strict=False)


def _listed(name: str, lists: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Concatenates lists of numbers. Returns one array and the start of each list in it."""
    starts = np.concatenate([[0], np.cumsum([len(numbers) for numbers in lists])])
    values = np.array([number for numbers in lists for number in numbers], np.int32)
    return {f"{name}_start": starts.astype(np.int32), name: values}


def _prefix_tree(phrases: np.ndarray, ids: np.ndarray, known: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The sorted pairs (``Tables.prefix``) of each length from 2 on, and the node of each phrase.

    The tree is made in parts, which need little memory. A part contains all phrases that begin with the same words.

    Args:
        phrases: the words of each phrase, from 1 on, then zeros, [F, LONGEST].
        ids: the ids of words 1, 2, ..., ascending.
        known: the number of known words, K.
    """
    first_word = phrases[:, 0] - 1
    part_of_word = np.cumsum(np.bincount(first_word, minlength=len(ids))) // _AT_A_TIME
    part = part_of_word.astype(np.int16)[first_word]
    order = np.argsort(part, kind="stable").astype(np.int32)
    rows = np.split(order, np.cumsum(np.bincount(part))[:-1])
    node_of, lengths = np.zeros(len(phrases), np.int32), np.zeros(len(phrases), np.uint8)

    def part_of_tree(some: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        words = phrases[some]
        lengths[some] = np.count_nonzero(words, 1)
        found, node_of[some] = _part_of_tree(words, len(ids))
        return found

    with ThreadPoolExecutor(2) as pool:  # numpy sorts without the lock of the interpreter
        parts = list(pool.map(part_of_tree, rows))

    # In each part, nodes are counted from 0 for each length. Each length's nodes of all parts follow each other.
    sizes = np.array([[len(parents) for parents, _ in found] for found in parts])
    total = sizes.sum(0)
    first = known + np.cumsum(total) - total + np.cumsum(sizes, 0) - sizes
    for some, starts in zip(rows, first, strict=True):
        node, length = node_of[some], lengths[some].astype(np.int64)
        node_of[some] = np.where(length == 1, ids[np.where(length == 1, node, 0)], node + starts[length - 2])
    prefix = []
    for level in range(LONGEST - 1):
        parents = [
            found[level][0] + starts[level - 1] if level else ids[found[level][0]]
            for found, starts in zip(parts, first, strict=True)
        ]
        last = np.concatenate([found[level][1] for found in parts])
        prefix.append(pairs(np.concatenate(parents), ids[last]))
    return prefix, node_of


def _part_of_tree(phrases: np.ndarray, most: int) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """The tree of N phrases.

    The phrases are sorted by as many words at once as 64 bits hold, which is four for the official table.

    Args:
        phrases: the words of each phrase, from 1 to `most`, then zeros, [N, LONGEST].
        most: the number of the last word.

    Returns:
        For each length from 2 on: the parent and the last word of each node, sorted. For each phrase: its node.
        Words and nodes are counted from 0, nodes for each length. The node of a single word is the word.
    """
    bits = most.bit_length()
    found, node_of = list[tuple[np.ndarray, np.ndarray]](), np.zeros(len(phrases), np.int32)
    row, count, depth = np.arange(len(phrases)), 1, 0  # the phrases longer than `depth`; their nodes of this length
    while depth < LONGEST:
        at_once = min((64 - (count - 1).bit_length()) // bits, LONGEST - depth)
        key = node_of[row].astype(np.uint64)
        for place in range(depth, depth + at_once):
            key = (key << bits) | phrases[row, place]
        order = np.argsort(key)
        row, key = row[order], key[order]
        differs = changes(key)
        key = key[differs]
        node = (key >> (bits * at_once)).astype(np.int32)
        for place in range(at_once):
            beginning = key >> (bits * (at_once - 1 - place))
            word = (beginning & ((1 << bits) - 1)).astype(np.int32) - 1  # -1 if the phrase has ended
            if depth + place == 0:
                node = word
                continue
            new = (word >= 0) & changes(beginning)
            found.append((node[new], word[new]))
            node = np.where(word >= 0, np.cumsum(new, dtype=np.int32) - 1, node)
        node_of[row] = node[np.cumsum(differs) - 1]
        depth, count = depth + at_once, len(found[-1][0])
        if depth < LONGEST:
            row = row[phrases[row, depth] > 0]
    return found, node_of
