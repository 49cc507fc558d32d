"""
The passkey task: a number said once somewhere in a long text of five sentences over and over, asked for at its end.

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you [...]
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green. ...
    The pass key is 71432. Remember it. 71432 is the pass key.
    The grass is green. The sky is blue. ... There and back again.
    What is the pass key? The pass key is 71432

Wording, grammar and line breaks are those of Mohtashami and Jaggi (arXiv 2305.16300: generate_prompt in run_test.py of
epfml/landmark-attention); Infini-attention (arXiv 2404.07143, appendix) has the same sentences. Theirs count characters
or sentences and cut the filler at its end; here a task has an exact number of tokens and the filler is cut at its
front: it begins anywhere in a sentence and always ends with "again.". Keys have five digits, 10000 to 99999 (theirs: 1
to 50000), so that every answer is equally long. Where no filler is left there is no empty line either.

A task is a pure function of the tokenizer, its length, its depth and the random numbers that it is given.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from data.loader import IGNORE, Batch, sample_rng
from data.tokenizer import Tokenizer

TASK = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
HELD_OUT = 2**62  # a step that no training reaches: its random numbers are for evaluation


class Task(NamedTuple):
    prompt: np.ndarray  # (n,) int64 ids, to the question's end
    answer: np.ndarray  # (m,) int64 ids: a space and the five digits
    needle: slice  # where in the prompt the needle is, its newline included
    again: slice  # where in the prompt the key is said for the second time


def _ids(tokenizer: Tokenizer, line: str) -> list[int]:
    """The ids of a line inside a text, after a newline: at a text's start some tokenizers put a space."""
    return tokenizer.encode("\n" + line)[len(tokenizer.encode("\n")):]


def _fixed(tokenizer: Tokenizer, key: str) -> tuple[list[int], list[int], list[int], list[int]]:
    """All but the filler: the ids of the task's description, the needle, the question, and the answer."""
    head, needle = [*tokenizer.prefix, *tokenizer.encode(TASK + "\n")], _ids(tokenizer, NEEDLE.format(key=key) + "\n")
    question = _ids(tokenizer, QUESTION)
    return head, needle, question, _ids(tokenizer, f"{QUESTION} {key}")[len(question):]


def _filler(tokenizer: Tokenizer, n: int) -> list[int]:
    """The last n ids of the filler's endless repetition and a newline."""
    first = len(_ids(tokenizer, FILLER))
    unit, last = (_ids(tokenizer, f"{FILLER} {FILLER}{end}")[first:] for end in ("", "\n"))
    ids = unit * (n // len(unit)) + last
    return ids[len(ids) - n:]


def least_length(tokenizer: Tokenizer, described: bool = True) -> int:
    """A length, prompt and answer together in tokens, that holds any key: 6 tokens for each of its three mentions."""
    head, *parts = _fixed(tokenizer, "10000")
    return len(head) * described + sum(map(len, parts)) + 3 * (6 - len(parts[-1]))


def passkey(tokenizer: Tokenizer, length: int, depth: float, rng: np.random.Generator, described: bool = True) -> Task:
    """
    A task whose prompt and answer together are exactly `length` tokens. depth in [0, 1] is where in the filler the
    needle lies: 0 at its start, 0.5 in its middle, 1 at its end, just before the question. described=False leaves the
    first line out, which says what the task is. ValueError when `length` is too short, naming the least, or `depth` is
    outside.
    """
    if length < (least := least_length(tokenizer, described)):
        raise ValueError(f"length is {length}: a passkey task takes {least} tokens at least with tokenizer "
                         f"{tokenizer.name}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: it must be in [0, 1], 0 for the start of the text, 1 for its end")
    key = str(rng.integers(10_000, 100_000))
    head, needle, question, answer = _fixed(tokenizer, key)
    head = head if described else []
    n = length - sum(map(len, (head, needle, question, answer)))
    before = round(depth * n)
    at = len(head) + before
    prompt = head + _filler(tokenizer, before) + needle + _filler(tokenizer, n - before) + question
    line = NEEDLE.format(key=key)
    start, end = (at + len(_ids(tokenizer, line[:i])) for i in (line.rindex(key) - 1, line.rindex(key) + len(key)))
    return Task(np.array(prompt), np.array(answer), slice(at, at + len(needle)), slice(start, end))


class PasskeySet:
    """
    Passkey tasks without end, as train.py reads a data set: one task per sequence, of between 3/4 of block_size and
    block_size + 1 tokens, so that the question lies anywhere in a segment (what follows the answer is 0 and no target);
    at a random depth, one of six at the very start and one at the very end: a long sequence would hardly ever show these.
    Nothing is stored: a task is made from the seed, the step and its index in the global batch. answer_only: the targets
    are the answer and the needle's second mention of the key, which teaches to copy it from nearby; every other one is
    IGNORE. Else all tokens are targets. Four tasks of five, and all where it does not fit, are without the description:
    so short sequences hold some filler, and a memory can be taught segment by segment.
    """

    def __init__(self, tokenizer: Tokenizer, answer_only: bool = True):
        self.tokenizer, self.answer_only = tokenizer, answer_only

    def check_length(self, block_size: int):
        """ValueError naming both numbers when a sequence holds no task."""
        if block_size + 1 < (least := least_length(self.tokenizer, described=False)):
            raise ValueError(f"block_size is {block_size}: a passkey task takes {least} tokens with tokenizer "
                             f"{self.tokenizer.name}, use --block-size {least - 1} at least")

    def train_batch(self, block_size: int, seed: int, step: int, first: int, n_micro: int, batch_size: int) -> Batch:
        """Samples first .. first + n_micro * batch_size - 1 of the global batch of `step` -> x, y (M, B, T)."""
        batch = self._stack(block_size, [(seed, step, first + i) for i in range(n_micro * batch_size)])
        x, y = (t.view(n_micro, batch_size, block_size) for t in batch[:2])
        return Batch(x, y, None, batch.n_valid)

    def eval_batches(self, block_size: int, batch_size: int, n_targets: int, rank: int = 0,
                     world: int = 1) -> Iterator[Batch]:
        """
        The first tasks, `n_targets` tokens of them rounded up to whole ones, of a fixed list that no training draws
        from, batch_size at a time; rank r of `world` gets batches r, r + world, ..., every rank equally many. Yields Batch
        of x, y (B, T), always so: what is beyond the last task is filled up with IGNORE.
        """
        n, turn = -(-n_targets // block_size), world * batch_size
        for at in range(rank * batch_size, -(-n // turn) * turn, turn):
            yield self._stack(block_size, [(0, HELD_OUT, i) if i < n else None for i in range(at, at + batch_size)])

    def _stack(self, T: int, samples: list[tuple[int, int, int] | None]) -> Batch:
        """One task for each argument list of sample_rng, a row of 0 and IGNORE for None -> Batch of x, y (n, T)."""
        x, y = np.zeros((len(samples), T), np.int64), np.full((len(samples), T), IGNORE, np.int64)
        for row, sample in enumerate(samples):
            if sample is None:
                continue
            rng = sample_rng(*sample)
            least = least_length(self.tokenizer, described=False)
            length = int(rng.integers(max(least, (T + 1) * 3 // 4), T + 2))
            described = rng.random() < 0.2 and length >= least_length(self.tokenizer)
            depth = min(1.0, max(0.0, rng.uniform(-0.25, 1.25)))
            task = passkey(self.tokenizer, length, depth, rng, described)
            ids = np.concatenate([task.prompt, task.answer])
            wanted = np.full(length, not self.answer_only)
            wanted[len(task.prompt):] = wanted[task.again] = True
            x[row, :length - 1], y[row, :length - 1] = ids[:-1], np.where(wanted, ids, IGNORE)[1:]
        return Batch(torch.from_numpy(x), torch.from_numpy(y), None, int((y != IGNORE).sum()))
