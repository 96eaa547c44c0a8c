"""Up-Down, soft attention and Show and Tell in idiomatic, efficient PyTorch, for the comparisons in benchmark.py.

The regions are projected once per image and shared by its captions. The vocabulary layer runs once, over all words that
are not pad. The LSTM cells are those of PyTorch. Decoding is batched over images and beams. ``PackedShowTell`` runs
``torch.nn.LSTM`` over packed captions in place of one cell per step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

BOS, EOS, PAD = 1, 2, 0


def use(device: str, threads: int) -> None:
    """Makes this the device of new tensors and modules, with full precision of float32 products, and sets the seed."""
    torch.set_num_threads(threads)
    torch.set_default_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)


def tensor(values: Any) -> Tensor:
    """A NumPy array on the device of ``use``."""
    return torch.from_numpy(values).to(torch.get_default_device())


def timed(function: Callable[[], Any], dtype: str, *, fetched: bool = False) -> Callable[[], None]:
    """The function, under automatic mixed precision for bfloat16, until the device has finished.

    Args:
        function: what is timed.
        dtype: of the matrix products.
        fetched: whether the time includes the copy of its result, a tensor, to the host.
    """
    device = torch.get_default_device().type

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            result = function()
        if fetched:
            result.cpu()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


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
    """Base class of the decoders. All sizes are ``size``."""

    def __init__(self, size: int, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.size, self.embedding = size, nn.Embedding(vocabulary, size)
        self.words, self.dropout = nn.Linear(size, vocabulary), nn.Dropout(dropout)

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

    def loss(self, regions: Tensor, tokens: Tensor) -> Tensor:
        """The mean loss of the words of tokens [B,M,T] (bos, words, eos, pad), given regions [B,N,D].

        The vocabulary layer skips pad, and the steps end with the longest caption.
        """
        tokens = tokens[:, :, : int((tokens != PAD).sum(-1).max())]
        hidden = self.unroll(regions, tokens[:, :, :-1])
        targets = tokens[:, :, 1:]
        counted = targets != PAD
        return smoothed(self.score(hidden[counted]), targets[counted])

    def see(self, regions: Tensor) -> Any:
        """What is computed once per image from regions [B,N,D]."""
        raise NotImplementedError

    def first(self, memory: Any, M: int) -> Any:
        """The state of M sequences per image before bos."""
        raise NotImplementedError

    def step(self, state: Any, word: Tensor, memory: Any) -> tuple[Any, Tensor]:
        """Reads the vectors of one word per sequence, [B,M,H]; returns the next state and the input of ``score``."""
        raise NotImplementedError

    def score(self, hidden: Tensor) -> Tensor:
        """[...,F] -> logits [...,V]."""
        return self.words(hidden)


class AttentionDecoder(Decoder):
    """Base class of the decoders with attention."""

    def __init__(self, region_size: int, size: int, vocabulary: int) -> None:
        super().__init__(size, vocabulary, dropout=0.5)
        self.project, self.attention = nn.Linear(region_size, size), Attention(size)

    def see(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """regions [B,N,D] -> projected regions [B,N,H], keys [B,N,H] and the mean of the projected regions [B,1,H]."""
        regions = self.dropout(F.relu(self.project(regions)))
        return regions, self.attention.key(regions), regions.mean(1, keepdim=True)


def cell(lstm: nn.LSTMCell, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Applies an LSTMCell to [B,M,...]."""
    flat = [x.flatten(0, 1) for x in (inputs, *state)]
    h, c = lstm(flat[0], (flat[1], flat[2]))
    return h.view(*inputs.shape[:2], -1), c.view(*inputs.shape[:2], -1)


class UpDown(AttentionDecoder):
    """Up-Down, Anderson et al. (2018)."""

    def __init__(self, region_size: int, size: int, vocabulary: int) -> None:
        super().__init__(region_size, size, vocabulary)
        self.attention_lstm, self.language_lstm = (
            nn.LSTMCell(3 * size, size),
            nn.LSTMCell(2 * size, size),
        )

    def first(self, memory: Any, M: int) -> Any:
        zeros = memory[0].new_zeros(len(memory[0]), M, self.size)
        return (zeros, zeros), (zeros, zeros)

    def step(self, state: Any, word: Tensor, memory: Any) -> tuple[Any, Tensor]:
        regions, keys, mean = memory
        first = cell(
            self.attention_lstm,
            torch.cat([state[1][0], mean.expand_as(word), word], -1),
            state[0],
        )
        context = self.attention(first[0], keys, regions)
        second = cell(self.language_lstm, torch.cat([context, first[0]], -1), state[1])
        return (first, second), self.dropout(second[0])


class Attend(AttentionDecoder):
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


class ShowTell(Decoder):
    """Show and Tell, Vinyals et al. (2015): the image is the first input of the LSTM."""

    def __init__(self, region_size: int, size: int, vocabulary: int) -> None:
        super().__init__(size, vocabulary, dropout=0.3)
        self.image, self.lstm = nn.Linear(region_size, size), nn.LSTMCell(size, size)

    def see(self, regions: Tensor) -> Tensor:
        """regions [B,N,D] -> the vector of the image [B,1,H]."""
        return self.dropout(self.image(regions.mean(1, keepdim=True)))

    def first(self, memory: Any, M: int) -> Any:
        zeros = torch.zeros_like(memory)
        return tuple(part.expand(-1, M, -1).contiguous() for part in cell(self.lstm, memory, (zeros, zeros)))

    def step(self, state: Any, word: Tensor, memory: Any) -> tuple[Any, Tensor]:
        state = cell(self.lstm, word, state)
        return state, self.dropout(state[0])


class PackedShowTell(nn.Module):
    """Show and Tell over packed captions: ``torch.nn.LSTM`` reads the image, bos and the words at once."""

    def __init__(self, region_size: int, size: int, vocabulary: int) -> None:
        super().__init__()
        self.image, self.embedding = (
            nn.Linear(region_size, size),
            nn.Embedding(vocabulary, size),
        )
        self.lstm, self.words = (
            nn.LSTM(size, size, batch_first=True),
            nn.Linear(size, vocabulary),
        )
        self.dropout = nn.Dropout(0.3)

    def loss(self, regions: Tensor, tokens: Tensor) -> Tensor:
        """The mean loss of the words of tokens [B,M,T] (bos, words, eos, pad), given regions [B,N,D]."""
        captions = tokens.flatten(0, 1)
        lengths, order = (captions != PAD).sum(-1).sort(descending=True)
        captions = captions[order, : lengths[0]]
        images = self.image(regions.mean(1)).repeat_interleave(tokens.shape[1], 0)[order]
        # The input is image, bos, words; its length is that of bos, words, eos, which are the targets.
        inputs = self.dropout(torch.cat([images[:, None], self.embedding(captions[:, :-1])], 1))
        hidden = self.lstm(pack_padded_sequence(inputs, lengths.cpu(), batch_first=True))[0].data
        targets = pack_padded_sequence(captions, lengths.cpu(), batch_first=True).data
        first = len(captions)  # the outputs after the image, which predict bos, are not scored
        return smoothed(self.words(self.dropout(hidden[first:])), targets[first:])


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy with label smoothing of logits [n,V] and targets [n]."""
    return F.cross_entropy(logits, targets, label_smoothing=0.1)


def train_step(
    decoder: Decoder | PackedShowTell, optimizer: torch.optim.Optimizer, regions: Tensor, tokens: Tensor
) -> float:
    """One training step of cross-entropy; see ``loss``."""
    return update(decoder, optimizer, decoder.loss(regions, tokens))


def update(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """Differentiates the loss, clips the gradient and updates the parameters. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 5.0)
    optimizer.step()
    return float(loss.detach())


def self_critical_step(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    regions: Tensor,
    words: Tensor,
    steps: int,
) -> Tensor:
    """One step of self-critical training: captions are sampled with dropout, and the sampled pass is differentiated.

    The reward is the sum of the token ids, because rewards are not compared. The baseline is the mean reward of the
    other samples of the image.

    Args:
        decoder: in training mode.
        optimizer: of the decoder.
        regions: [B,N,D].
        words: int [B,M], the number of words after which each caption ends. If it is ``steps``, there is no eos.
        steps: the maximum number of words.

    Returns:
        The captions, int [B,M,T].
    """
    memory = decoder.see(regions)
    state = decoder.first(memory, words.shape[1])
    word, ended = torch.full_like(words, BOS), torch.zeros_like(words, dtype=torch.bool)
    tokens, log_likelihoods = [], []
    for t in range(steps):
        state, hidden = decoder.step(state, decoder.dropout(decoder.embedding(word)), memory)
        log_probs = torch.log_softmax(decoder.score(hidden), -1)
        with torch.no_grad():
            odds = log_probs.exp()
            odds[..., [PAD, BOS, EOS]] = 0
            word = torch.multinomial(odds.flatten(0, 1), 1).view_as(words)
            word = torch.where(words == t, EOS, word).masked_fill(ended, PAD)
        log_likelihoods.append(log_probs.gather(-1, word[..., None])[..., 0].masked_fill(ended, 0))
        tokens.append(word)
        ended = ended | (word == EOS)
        if bool(ended.all()):
            break
    captions = torch.stack(tokens, -1)
    reward = captions.sum(-1).float()
    others = (reward.sum(-1, keepdim=True) - reward) / (reward.shape[1] - 1)
    update(
        decoder,
        optimizer,
        -((reward - others) * torch.stack(log_likelihoods).sum(0)).mean(),
    )
    return captions


@torch.inference_mode()
def decode(decoder: Decoder, regions: Tensor, beam: int, steps: int, words: Tensor) -> Tensor:
    """Beam search, batched over images and beams (greedy if beam is 1).

    Args:
        decoder: in evaluation mode.
        regions: [B,N,D].
        beam: the number of beams.
        steps: the maximum number of words.
        words: int [B], the number of words after which the captions of each image end. If it is ``steps``, there is no
            eos.

    Returns:
        The tokens [B,T] of the best captions.
    """
    batch, vocabulary = len(regions), decoder.words.out_features
    memory = decoder.see(regions)
    state = decoder.first(memory, beam)
    tokens = torch.zeros(batch, beam, 0, dtype=torch.long)
    last = torch.full((batch, beam), BOS)
    scores = torch.full((batch, beam), -torch.inf)
    scores[:, 0] = 0
    done = torch.zeros(batch, beam, dtype=torch.bool)
    rows = torch.arange(batch)[:, None]
    for t in range(steps):
        state, hidden = decoder.step(state, decoder.embedding(last), memory)
        log_probs = torch.log_softmax(decoder.score(hidden), -1)
        ends = words == t
        log_probs[ends] = -torch.inf
        log_probs[..., EOS] = torch.where(ends, 0.0, -torch.inf)[:, None]  # certain, or impossible
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
