"""Up-Down and soft attention in idiomatic, efficient PyTorch, for the comparison in benchmark.py.

The regions are projected once per image and shared by its captions. The vocabulary layer runs once, over all words that
are not pad. The LSTM cells are those of PyTorch. Decoding is batched over images and beams.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BOS, EOS, PAD = 1, 2, 0


class Attention(nn.Module):
    """Additive attention with precomputed keys."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, regions: Tensor) -> Tensor:
        """query [B,M,H], keys and regions [B,N,H] -> [B,M,H]."""
        scores = self.score(torch.tanh(keys[:, None] + self.query(query)[:, :, None]))[..., 0]  # [B,M,N]
        return torch.softmax(scores, -1) @ regions


class Decoder(nn.Module):
    """Base class of both decoders. All sizes are ``size``."""

    def __init__(self, region_size: int, size: int, vocabulary: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.project, self.embedding = nn.Linear(region_size, size), nn.Embedding(vocabulary, size)
        self.attention, self.words = Attention(size), nn.Linear(size, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def see(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """regions [B,N,D] -> projected regions [B,N,H], keys [B,N,H] and the mean of the projected regions [B,1,H]."""
        regions = self.dropout(F.relu(self.project(regions)))
        return regions, self.attention.key(regions), regions.mean(1, keepdim=True)

    def unroll(self, regions: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: regions [B,N,D], tokens [B,M,T] -> the input of ``score``, [B,M,T,...]."""
        memory = self.see(regions)
        state = self.first(memory, tokens.shape[1])
        words = self.dropout(self.embedding(tokens))
        outputs = []
        for t in range(tokens.shape[2]):
            state, output = self.step(state, words[:, :, t], memory)
            outputs.append(output)
        return torch.stack(outputs, 2)

    def first(self, memory: Any, M: int) -> Any:
        raise NotImplementedError

    def step(self, state: Any, word: Tensor, memory: Any) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def score(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


def cell(lstm: nn.LSTMCell, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Applies an LSTMCell to [B,M,...]."""
    flat = [x.flatten(0, 1) for x in (inputs, *state)]
    h, c = lstm(flat[0], (flat[1], flat[2]))
    return h.view(*inputs.shape[:2], -1), c.view(*inputs.shape[:2], -1)


class UpDown(Decoder):
    """Up-Down, Anderson et al. (2018)."""

    def __init__(self, region_size: int, size: int, vocabulary: int) -> None:
        super().__init__(region_size, size, vocabulary)
        self.size = size
        self.attention_lstm, self.language_lstm = nn.LSTMCell(3 * size, size), nn.LSTMCell(2 * size, size)

    def first(self, memory: Any, M: int) -> Any:
        zeros = memory[0].new_zeros(len(memory[0]), M, self.size)
        return (zeros, zeros), (zeros, zeros)

    def step(self, state: Any, word: Tensor, memory: Any) -> tuple[Any, Tensor]:
        regions, keys, mean = memory
        first = cell(self.attention_lstm, torch.cat([state[1][0], mean.expand_as(word), word], -1), state[0])
        context = self.attention(first[0], keys, regions)
        second = cell(self.language_lstm, torch.cat([context, first[0]], -1), state[1])
        return (first, second), self.dropout(second[0])

    def score(self, hidden: Tensor) -> Tensor:
        return self.words(hidden)


class Attend(Decoder):
    """Soft attention with gate and deep output, Xu et al. (2015)."""

    def __init__(self, region_size: int, size: int, vocabulary: int) -> None:
        super().__init__(region_size, size, vocabulary)
        self.initial, self.gate = nn.Linear(size, 2 * size), nn.Linear(size, 1)
        self.lstm, self.deep = nn.LSTMCell(2 * size, size), nn.Linear(2 * size, size)

    def first(self, memory: Any, M: int) -> Any:
        state = torch.tanh(self.initial(memory[2])).expand(-1, M, -1)
        return tuple(part.contiguous() for part in state.chunk(2, -1))

    def step(self, state: Any, word: Tensor, memory: Any) -> tuple[Any, Tensor]:
        regions, keys, _ = memory
        context = self.attention(state[0], keys, regions) * torch.sigmoid(self.gate(state[0]))
        state = cell(self.lstm, torch.cat([word, context], -1), state)
        return state, torch.cat([word, self.dropout(torch.cat([state[0], context], -1))], -1)

    def score(self, hidden: Tensor) -> Tensor:
        word, state = hidden.split([self.deep.out_features, self.deep.in_features], -1)
        return self.words(word + self.deep(state))


def train_step(decoder: Decoder, optimizer: torch.optim.Optimizer, regions: Tensor, tokens: Tensor) -> float:
    """One training step of cross-entropy with label smoothing. The vocabulary layer skips pad."""
    length = int((tokens != PAD).sum(-1).max())  # the longest caption in the batch
    tokens = tokens[:, :, :length]
    hidden = decoder.unroll(regions, tokens[:, :, :-1])
    targets = tokens[:, :, 1:]
    counted = targets != PAD
    loss = F.cross_entropy(decoder.score(hidden[counted]), targets[counted], label_smoothing=0.1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
    optimizer.step()
    return float(loss.detach())


@torch.inference_mode()
def decode(decoder: Decoder, regions: Tensor, beam: int, steps: int) -> Tensor:
    """Beam search, batched over images and beams (greedy if beam is 1): tokens [B,steps] of the best captions."""
    batch, vocabulary = len(regions), decoder.words.out_features
    memory = decoder.see(regions)
    state = decoder.first(memory, beam)
    tokens = torch.zeros(batch, beam, 0, dtype=torch.long)
    last = torch.full((batch, beam), BOS)
    scores = torch.full((batch, beam), -torch.inf)
    scores[:, 0] = 0
    done = torch.zeros(batch, beam, dtype=torch.bool)
    rows = torch.arange(batch)[:, None]
    for _ in range(steps):
        state, hidden = decoder.step(state, decoder.embedding(last), memory)
        log_probs = torch.log_softmax(decoder.score(hidden), -1)
        log_probs[done] = -torch.inf
        log_probs[..., PAD] = torch.where(done, 0.0, -torch.inf)
        total, index = (scores[..., None] + log_probs).flatten(1).topk(beam)
        parent, last = index // vocabulary, index % vocabulary
        scores = total
        tokens = torch.cat([tokens[rows, parent], last[..., None]], -1)
        done = done[rows, parent] | (last == EOS)
        state = _take(state, rows, parent)
        if bool(done.all()):
            break
    return tokens[:, 0]


def _take(state: Any, rows: Tensor, parent: Tensor) -> Any:
    return state[rows, parent] if isinstance(state, Tensor) else tuple(_take(part, rows, parent) for part in state)
