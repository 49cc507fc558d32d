"""
Training batches and the fixed evaluation windows.

A training batch is a pure function of (seed, step, index in the global batch): nothing is carried from one step to the
next, so a resumed run reads what an uninterrupted one would have read, and the global batch does not depend on how many
ranks or micro-steps share it. Windows of block_size + 1 tokens are drawn uniformly over the token stream; they may span
documents. PoSE's samples (pose_batch) are parts of one document, at positions as far apart as those of a longer text.

Shapes: M micro-steps, B sequences each, T = block_size.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch

from data.tokens import DataError
from kernels.ring import shard_sequence

IGNORE = -100  # a target that is no target; the model's loss leaves it out


class Batch(NamedTuple):
    x: torch.Tensor  # (..., T) int64
    y: torch.Tensor  # (..., T) int64, the token after each x, IGNORE where there is none to predict
    docs: torch.Tensor | None  # (..., T) int32 document numbers, counted from the window's first; only when asked for
    n_valid: int  # targets that are not IGNORE
    begins: torch.Tensor | None = None  # (...) bool, the sequence is a document's first; only with carried_batch
    positions: torch.Tensor | None = None  # (..., T) int64, where rotary models rotate to; of pose_batch, or count_documents

    def _map(self, function) -> "Batch":
        x, y, docs, *rest = (None if t is None else function(t) for t in (*self[:3], self.begins, self.positions))
        return Batch(x, y, docs, self.n_valid, *rest)

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run asynchronously."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def count_documents(self) -> "Batch":
        """With positions that begin at 0 in every document. The model finds them by itself, but not in a shard."""
        at = torch.arange(self.docs.shape[-1])
        begins = torch.nn.functional.pad(self.docs[..., 1:] != self.docs[..., :-1], (1, 0)) * at
        return self._replace(positions=at - begins.cummax(-1).values)

    def shard(self, group: torch.distributed.ProcessGroup, layout: str) -> "Batch":
        """This rank's part of every sequence: T / P tokens for P ranks, with the targets that they had in the whole."""
        x, y, docs, positions = (None if t is None else shard_sequence(t, group, layout, dim=-1)
                                 for t in (self.x, self.y, self.docs, self.positions))
        return Batch(x, y, docs, int((y != IGNORE).sum()), self.begins, positions)

    def micro(self, m: int, device: torch.device) -> "Batch":
        """Micro-step m of a stacked batch, on `device`."""
        return self._map(lambda t: t[m].to(device, non_blocking=True))


def check_length(file, block_size: int, inside: str | None = None):
    """ValueError naming both numbers when the set does not hold one window; inside: the option for which a document must."""
    if inside and (longest := int(np.diff(file.doc_offsets).max())) < block_size + 1:
        raise ValueError(f"{file.path}: its longest document has {longest} tokens, {inside} reads inside one and needs "
                         f"block_size + 1 = {block_size + 1}: use --block-size {max(1, longest - 1)} at most")
    if file.n_tokens < block_size + 1:
        raise ValueError(f"{file.path} holds {file.n_tokens} tokens, a window needs block_size + 1 = {block_size + 1}: "
                         f"use more text or --block-size {max(1, file.n_tokens - 1)} at most")


def sample_rng(seed: int, step: int, index: int) -> np.random.Generator:
    """The random numbers of one training sample: Philox keyed by (seed, step), its counter starting at `index`."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, index]))


def _check_ids(file, ids: np.ndarray, start: int):
    """DataError for an id outside the vocabulary among those read from token `start` on."""
    if ids.max() >= file.vocab_size:
        raise DataError(f"{file.path} is damaged: token {ids.max()} within {len(ids)} from token {start} on, its "
                        f"vocabulary is {file.vocab_size}: delete it and prepare it again")


def _stack(file, starts: np.ndarray, lengths: np.ndarray, T: int, with_docs: bool) -> Batch:
    """
    Windows of the token stream at `starts`, with `lengths` <= T targets each -> Batch of x, y, docs (n, T).

    With documents, attention stays inside one, so a target in another document than its input has nothing to go by and
    is left out. Places past a window's length are 0 in x and IGNORE in y. DataError for an id outside the vocabulary.
    """
    x = np.zeros((len(starts), T), np.int64)
    y = np.full((len(starts), T), IGNORE, np.int64)
    docs = np.zeros((len(starts), T), np.int32) if with_docs else None
    for row, (start, n) in enumerate(zip(starts, lengths)):
        if n == 0:
            continue
        window = file.tokens[start : start + n + 1]
        _check_ids(file, window, start)
        x[row, :n], y[row, :n] = window[:-1], window[1:]
        if with_docs:
            number = np.searchsorted(file.doc_offsets, np.arange(start, start + n + 1), side="right")
            docs[row, :n] = number[:-1] - number[0]
            y[row, :n][number[1:] != number[:-1]] = IGNORE
    n_valid = int((y != IGNORE).sum())
    return Batch(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(docs) if with_docs else None, n_valid)


def train_batch(file, block_size: int, seed: int, step: int, first: int, n_micro: int, batch_size: int,
                with_docs: bool = False) -> Batch:
    """
    Samples first .. first + n_micro * batch_size - 1 of the global batch of `step` -> Batch of x, y, docs (M, B, T).

    `file` is a data.tokens.TokenFile of at least block_size + 1 tokens.
    """
    n = n_micro * batch_size
    starts = np.array([sample_rng(seed, step, first + i).integers(file.n_tokens - block_size) for i in range(n)])
    batch = _stack(file, starts, np.full(n, block_size), block_size, with_docs)
    x, y, docs = (None if t is None else t.view(n_micro, batch_size, block_size) for t in batch[:3])
    return Batch(x, y, docs, batch.n_valid)


def carried_batch(file, block_size: int, seed: int, step: int, first: int, n_micro: int, batch_size: int,
                  n_streams: int) -> Batch:
    """
    As train_batch, but each of the n_streams sequences of the global batch reads on, step by step, where it was: every
    document in windows of block_size from its first token on (what is left at its end is left out), the documents in an
    order drawn from `seed`, over and over. The streams start evenly spread over that order. `begins` says where a
    sequence is its document's first, or the stream's.
    """
    order = sample_rng(seed, 0, 0).permutation(file.n_docs)
    windows = np.maximum(0, np.diff(file.doc_offsets)[order] - 1) // block_size
    ends = np.cumsum(windows)  # of the documents, in windows
    at = ((first + np.arange(n_micro * batch_size)) * ends[-1] // n_streams + step) % ends[-1]
    place = np.searchsorted(ends, at, side="right")
    within = at - (ends - windows)[place]
    starts = file.doc_offsets[order[place]] + within * block_size
    batch = _stack(file, starts, np.full(len(at), block_size), block_size, False)
    x, y = (t.view(n_micro, batch_size, block_size) for t in batch[:2])
    begins = torch.from_numpy((within == 0) | (step == 0)).view(n_micro, batch_size)
    return Batch(x, y, None, batch.n_valid, begins)


def pose_batch(file, block_size: int, seed: int, step: int, first: int, n_micro: int, batch_size: int, target: int,
               chunks: int = 2, content_skip: bool = True) -> Batch:
    """
    As train_batch, but by PoSE (Zhu et al., arXiv 2309.10400): the T = block_size tokens of a sample are `chunks` pieces
    of one document, in order, whose positions skip too, so that samples of T tokens train all distances in `target`.

    A document of at least T + 1 tokens is drawn in proportion to its windows, and from it a stretch of at most 5 T
    tokens, from anywhere: books are longer than what the paper considers, the first 5 T. Chunk i starts v_i tokens
    later in the stretch than contiguous text would, and its positions are u_i higher: 0 = v_0 <= v_1 <= .. <= stretch - T
    and 0 = u_0 <= u_1 <= .. <= target - T, both uniform over all such sequences and independent of each other. Every
    chunk but the last has 1 to (T + 1) // chunks tokens, the last one the rest. chunks 1: plain windows at positions
    0 .. T-1. chunks T: a random position per token, which is known not to work. Without content_skip all v are 0.

    y holds the token that follows in the document, also at a chunk's last token, where x goes on with another one: what
    is learnt is the text's own next token, never that of the jump. (The public code learns the jump.)
    """
    T, lengths = block_size, np.diff(file.doc_offsets)
    ends = np.cumsum(np.maximum(0, lengths - T))  # of the documents, in windows of T + 1 tokens
    x, y, positions = np.zeros((3, n_micro * batch_size, T), np.int64)
    for row in range(len(x)):
        rng = sample_rng(seed, step, first + row)
        document = np.searchsorted(ends, rng.integers(ends[-1]), side="right")
        stretch = min(5 * T, lengths[document] - 1) if content_skip else T  # the token after it is a target
        start = file.doc_offsets[document] + rng.integers(lengths[document] - stretch)
        sizes = rng.integers(1, (T + 1) // chunks, chunks - 1, endpoint=True)
        sizes = np.append(sizes, T - sizes.sum())
        tokens = start + np.arange(T) + np.repeat(_skips(rng, chunks, stretch - T), sizes)
        x[row], y[row] = file.tokens[tokens], file.tokens[tokens + 1]
        _check_ids(file, np.append(x[row], y[row]), start)
        positions[row] = np.arange(T) + np.repeat(_skips(rng, chunks, target - T), sizes)
    x, y, positions = (torch.from_numpy(t).view(n_micro, batch_size, T) for t in (x, y, positions))
    return Batch(x, y, None, y.numel(), positions=positions)


def _skips(rng: np.random.Generator, n: int, most: int) -> np.ndarray:
    """(n,) int64, 0 = s_0 <= s_1 <= .. <= s_(n-1) <= most: uniform over all such sequences; n = 2: s_1 in 0 .. most."""
    distinct = np.sort(rng.choice(most + n - 1, n - 1, replace=False)) if n > 1 else np.zeros(0, np.int64)
    return np.append(0, distinct - np.arange(n - 1))  # non-decreasing sequences are sets, each number less its rank


def eval_batches(file, block_size: int, batch_size: int, n_targets: int, rank: int = 0, world: int = 1,
                 with_docs: bool = False) -> Iterator[Batch]:
    """
    The first `n_targets` targets of a set (all, if it has fewer) in consecutive windows of block_size, batch_size at a
    time; rank r of `world` gets batches r, r + world, ..., every rank equally many. Yields Batch of x, y, docs (B, T),
    always so: what is beyond the last target is filled up with IGNORE, so every target counts exactly once.
    """
    n_targets = min(n_targets, file.n_tokens - 1)
    n_batches = -(-n_targets // (batch_size * block_size))
    for b in range(rank, -(-n_batches // world) * world, world):
        starts = (b * batch_size + np.arange(batch_size)) * block_size
        yield _stack(file, starts, np.clip(n_targets - starts, 0, block_size), block_size, with_docs)


def prefetch(load: Callable[[int], Batch], steps: range, depth: int = 2) -> Iterator[Batch]:
    """load(step) for each step, computed `depth` steps ahead on a background thread; errors arrive at their step."""
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        ahead = deque(pool.submit(load, step) for step in steps[:depth])
        for step in steps:
            if step + depth in steps:
                ahead.append(pool.submit(load, step + depth))
            yield ahead.popleft().result()
