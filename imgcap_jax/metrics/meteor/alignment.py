"""The search for the best alignment of two sentences (Denkowski and Lavie, 2011, section 2.1).

Each word is covered by at most one match. The best alignment covers the most words of both sentences. Ties are broken
by the fewest chunks (runs that are contiguous and in the same order in both sentences), then by the smallest total
distance between the matched positions. A beam search of width 40 goes through the reference from left to right.

In the official tool the scores of many captions depend on how ties are broken, so its order is reproduced exactly:

- Paths are sorted stably.
- A chunk is counted when it ends.
- The distance of a match is not charged to the path that takes the match. It is charged to the paths that are tried
  after it: those of matches later in the list, and the one that leaves the word out. A definite match (``_definite``)
  is charged to its own path.

The beams of different pairs are independent, so all pairs are searched in parallel, with one array per quantity.

Letters: C pairs, M matches, P paths of all pairs (sorted by pair), Q new paths.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from imgcap_jax.metrics.corpus import expand
from imgcap_jax.metrics.meteor.matching import Matches

BEAM = 40
_PAIRS_AT_A_TIME = 4096
_NOTHING = -1


def align(matches: Matches, candidate_lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Finds the matches of the best alignment of each pair.

    Args:
        matches: the matches of all pairs, in the order of ``find_matches``.
        candidate_lengths, reference_lengths: the number of words in the sentences of each pair, [C].

    Returns:
        The sorted indices of the matches in these alignments.
    """
    definite = _definite(matches, candidate_lengths, reference_lengths)
    open_pairs = np.unique(matches.pair[~definite])
    in_search = np.zeros(len(reference_lengths), bool)
    in_search[open_pairs] = True
    chosen = [np.flatnonzero(definite & ~in_search[matches.pair])]
    # Pairs of similar length are grouped, because the longest sentence of a group sets the size of all its masks.
    sizes = np.maximum(candidate_lengths, reference_lengths)[open_pairs]
    order = open_pairs[np.argsort(sizes, kind="stable")]
    for group in _groups(order, np.sort(sizes)):
        group = np.sort(group)
        mine = np.flatnonzero(np.isin(matches.pair, group))
        part = matches.take(mine)
        pair = np.searchsorted(group, part.pair)
        search = _Search(part, pair, definite[mine], candidate_lengths[group], reference_lengths[group])
        chosen.append(mine[search.run()])
    return np.sort(np.concatenate(chosen))


def _groups(pairs: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of pairs that are searched in parallel: thousands of short pairs or a few long ones."""
    begin = 0
    while begin < len(pairs):
        end = min(begin + _PAIRS_AT_A_TIME, len(pairs))
        # The memory of a group grows with the square of the length.
        while end > begin + 1 and (end - begin) * int(sizes[end - 1]) ** 2 > _PAIRS_AT_A_TIME * 32**2:
            end = begin + (end - begin + 1) // 2
        yield pairs[begin:end]
        begin = end


def _definite(matches: Matches, candidate_lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Whether no other match covers a word of the match in either sentence, [M]. Such matches are always taken."""
    alone = np.ones(len(matches.pair), bool)
    for start, length, sizes in (
        (matches.start, matches.length, reference_lengths),
        (matches.other_start, matches.other_length, candidate_lengths),
    ):
        begin = (np.cumsum(sizes) - sizes)[matches.pair] + start
        match, word = expand(begin, length)
        covered = np.bincount(word, minlength=int(sizes.sum()))
        alone[match[covered[word] > 1]] = False
    return alone


@dataclass
class _Paths:
    """Paths of the search, sorted by pair.

    Attributes:
        pair: the pair of each path, [P].
        covered: the number of words covered in both sentences, as counted by ``Matches.weight``, [P].
        chunks: the number of chunks that have ended, [P].
        distance: the total distance charged to the path, [P].
        end: the position in the candidate after the last match, or -1 if no chunk is open, [P].
        position: the next position in the reference, [P].
        used: a bit mask of the candidate's covered words, [P, number of 64-bit integers].
    """

    pair: np.ndarray
    covered: np.ndarray
    chunks: np.ndarray
    distance: np.ndarray
    end: np.ndarray
    position: np.ndarray
    used: np.ndarray

    def take(self, rows: np.ndarray) -> "_Paths":
        return _Paths(*(values[rows] for values in vars(self).values()))

    def ranking(self) -> np.ndarray:
        """The rows sorted by pair, the best path of each pair first. The sort is stable."""
        best = int(self.covered.max(initial=0))
        key, bits = self.pair, int(self.pair.max(initial=0)).bit_length()
        for quantity in (best - self.covered, self.chunks, self.distance):
            width = int(quantity.max(initial=0)).bit_length()
            key, bits = (key << width) | quantity, bits + width
        if bits > 63:
            return np.lexsort((self.distance, self.chunks, -self.covered, self.pair))
        return np.argsort(key, kind="stable")

    def place_in_pair(self) -> np.ndarray:
        """The position of each path among the paths of its pair: 0, 1, 2, ..."""
        return np.arange(len(self.pair)) - np.searchsorted(self.pair, self.pair)


class _Search:
    """The search over a group of pairs, whose indices start at 0."""

    def __init__(
        self,
        matches: Matches,
        pair: np.ndarray,
        definite: np.ndarray,
        candidate_lengths: np.ndarray,
        reference_lengths: np.ndarray,
    ) -> None:
        self._matches, self._definite, self._lengths = matches, definite, reference_lengths
        self._weight = matches.weight
        self._distance = np.abs(matches.start - matches.other_start)
        # For each word of each reference: the index of the first match that begins at this word.
        self._first_word = np.cumsum(reference_lengths) - reference_lengths
        word = self._first_word[pair] + matches.start
        self._begin = np.searchsorted(word, np.arange(int(reference_lengths.sum()) + 1))
        self._spans = _bits(matches.other_start, matches.other_length, -(-int(candidate_lengths.max()) // 64))
        self._history: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self) -> np.ndarray:
        """The indices of the matches on the best path of each pair."""
        pairs = len(self._lengths)
        zero, used = np.zeros(pairs, np.int64), np.zeros((pairs, self._spans.shape[1]), np.uint64)
        paths = _Paths(np.arange(pairs), zero, zero, zero, zero + _NOTHING, zero, used)
        parent, match, chosen = np.arange(pairs), np.full(pairs, _NOTHING), []
        for current in range(int(self._lengths.max(initial=0)) + 1):
            rows = paths.ranking()
            rows = rows[paths.take(rows).place_in_pair() < BEAM]
            paths = paths.take(rows)
            self._history.append((parent[rows], match[rows]))
            ends = self._lengths[paths.pair] == current
            chosen.append(self._trace(self._winners(paths, np.flatnonzero(ends))))
            further = np.flatnonzero(~ends)
            paths, parent, match = self._step(paths.take(further), current)
            parent = further[parent]
        return np.concatenate(chosen)

    def _winners(self, paths: _Paths, rows: np.ndarray) -> np.ndarray:
        """The row of the best path of each pair among these complete paths, with the open chunk counted."""
        done = paths.take(rows)
        done.chunks = done.chunks + (done.end != _NOTHING)
        order = done.ranking()
        return rows[order[done.take(order).place_in_pair() == 0]]

    def _trace(self, winners: np.ndarray) -> np.ndarray:
        """The indices of the matches that led to these rows of the most recent ranking."""
        at, found = winners, [np.zeros(0, np.int64)]
        for parent, match in reversed(self._history):
            found.append(match[at][match[at] != _NOTHING])
            at = parent[at]
        return np.concatenate(found)

    def _step(self, paths: _Paths, current: int) -> tuple[_Paths, np.ndarray, np.ndarray]:
        """Extends the paths by word `current` of the references in all possible ways.

        Returns:
            The new paths, [Q]; the row of the path that each one extends, [Q]; the match that it takes or -1, [Q].
        """
        inside = paths.position > current  # inside a match that covers several words
        word = self._first_word[paths.pair] + current
        begin, end = self._begin[word], self._begin[word + 1]
        count = np.where(inside, 0, end - begin)
        forced = np.zeros(len(count), bool)
        forced[count == 1] = self._definite[begin[count == 1]]
        # One new path per match, and a last one that leaves the word out.
        row, match = expand(begin, count + ~forced)
        leaves = match == (begin + count)[row]
        match = np.where(leaves, 0, match)
        free = leaves | ~(paths.used[row] & self._spans[match]).any(1)
        row, match, leaves = row[free], match[free], leaves[free]

        new = paths.take(row)
        takes = ~leaves
        breaks = (new.end != _NOTHING) & np.where(leaves, ~inside[row], self._matches.other_start[match] != new.end)
        new.chunks = new.chunks + breaks
        new.covered = new.covered + np.where(takes, self._weight[match], 0)
        new.used = np.where(takes[:, None], new.used | self._spans[match], new.used)
        charge = np.where(takes, self._distance[match], 0)
        before = np.cumsum(charge) - charge
        first = np.searchsorted(row, row)
        new.distance = new.distance + np.where(forced[row], charge, before - before[first])
        new.position = np.where(takes, current + self._matches.length[match], np.maximum(new.position, current + 1))
        ended = np.where(inside[row], new.end, _NOTHING)
        new.end = np.where(takes, self._matches.other_start[match] + self._matches.other_length[match], ended)
        return new, row, np.where(takes, match, _NOTHING)


def _bits(start: np.ndarray, length: np.ndarray, words: int) -> np.ndarray:
    """Bit masks with bits start, ..., start + length - 1 set, as 64-bit integers, [M, words]."""
    base = 64 * np.arange(words)

    def below(bit: np.ndarray) -> np.ndarray:
        within = np.clip(bit[:, None] - base, 0, 64)
        all_bits = ~np.uint64(0)
        return np.where(within == 64, all_bits, ~(all_bits << np.minimum(within, 63).astype(np.uint64)))

    return below(start + length) ^ below(start)
