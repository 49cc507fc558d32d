"""
Training batches and the fixed evaluation windows.

A training batch is a pure function of (seed, step, index in the global batch): nothing is carried from one step to the
next, so a resumed run reads what an uninterrupted one would have read, and the global batch does not depend on how many
ranks or micro-steps share it. Windows of block_size + 1 tokens are drawn uniformly over the token stream; they may span
documents.

Shapes: M micro-steps, B sequences each, T = block_size.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch

from data.tokens import DataError

IGNORE = -100  # a target that is no target; the model's loss leaves it out


class Batch(NamedTuple):
    x: torch.Tensor  # (..., T) int64
    y: torch.Tensor  # (..., T) int64, the token after each x, IGNORE where there is none to predict
    docs: torch.Tensor | None  # (..., T) int32 document numbers, counted from the window's first; only when asked for
    n_valid: int  # targets that are not IGNORE
    begins: torch.Tensor | None = None  # (...) bool, the sequence is a document's first; only with carried_batch

    def _map(self, function) -> "Batch":
        x, y, docs, begins = (None if t is None else function(t) for t in (*self[:3], self.begins))
        return Batch(x, y, docs, self.n_valid, begins)

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run asynchronously."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda t: t.to(device, non_blocking=True))

    def micro(self, m: int, device: torch.device) -> "Batch":
        """Micro-step m of a stacked batch, on `device`."""
        return self._map(lambda t: t[m].to(device, non_blocking=True))


def check_length(file, block_size: int, carried: bool = False):
    """ValueError naming both numbers when the set does not hold one window; carried: when no document does."""
    if carried and (longest := int(np.diff(file.doc_offsets).max())) < block_size + 1:
        raise ValueError(f"{file.path}: its longest document has {longest} tokens, carry_memory reads inside one and needs "
                         f"block_size + 1 = {block_size + 1}: use --block-size {max(1, longest - 1)} at most")
    if file.n_tokens < block_size + 1:
        raise ValueError(f"{file.path} holds {file.n_tokens} tokens, a window needs block_size + 1 = {block_size + 1}: "
                         f"use more text or --block-size {max(1, file.n_tokens - 1)} at most")


def sample_rng(seed: int, step: int, index: int) -> np.random.Generator:
    """The random numbers of one training sample: Philox keyed by (seed, step), its counter starting at `index`."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, index]))


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
        if window.max() >= file.vocab_size:
            raise DataError(f"{file.path} is damaged: token {window.max()} within {n + 1} from token {start} on, its "
                            f"vocabulary is {file.vocab_size}: delete it and prepare it again")
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


def eval_batches(file, block_size: int, batch_size: int, n_targets: int, rank: int = 0, world: int = 1,
                 with_docs: bool = False) -> Iterator[Batch]:
    """
    The first `n_targets` targets of a set (all, if it has fewer) in consecutive windows of block_size, batch_size at a
    time; rank r of `world` gets batches r, r + world, ... Yields Batch of x, y, docs (B, T), always so: the last
    window and the last batch are filled up with IGNORE, so every target counts exactly once.
    """
    n_targets = min(n_targets, file.n_tokens - 1)
    n_batches = -(-n_targets // (batch_size * block_size))
    for b in range(rank, n_batches, world):
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
