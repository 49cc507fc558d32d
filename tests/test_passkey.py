"""The passkey task: the published text to the letter, exact lengths, pure functions of the seed, targets."""

import re

import numpy as np
import pytest
import torch

from data.loader import IGNORE
from data.passkey.task import PasskeySet, least_length, passkey
from data.tokenizer import load_tokenizer

HEAD = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n")
FIVE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module", params=["byte", "gpt2", "data/stories260k"])
def tokenizer(request):
    return load_tokenizer(request.param)


def text_of(tokenizer, task):
    return tokenizer.decode([*task.prompt, *task.answer]).decode().removeprefix(" ")  # stories260k puts one in front


def test_text_is_the_published_one(tokenizer):
    task = passkey(tokenizer, 1000, 0.5, np.random.default_rng(3))
    said = re.fullmatch(r"(.*\n)(.*)\n(The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.\n)(.*)\n"
                        r"What is the pass key\? The pass key is (\d{5})", text_of(tokenizer, task))
    head, before, needle, key, again, after, answer = said.groups()
    assert head == HEAD and key == again == answer and 10_000 <= int(key) <= 99_999
    for filler in (before, after):  # whole sentences to the end, cut at the front
        assert f"{FIVE} {FIVE}"[-150:] in filler and (50 * f" {FIVE}").endswith(filler)
    assert tokenizer.decode(task.prompt[task.needle]).decode() == needle
    assert tokenizer.decode(task.prompt[task.again]).decode() == tokenizer.decode(task.answer).decode() == f" {key}"
    assert task.again.start - task.needle.start > len(tokenizer.encode("Remember it."))  # not the first mention


def test_length_and_depth(tokenizer):
    least = least_length(tokenizer)
    for seed, length in enumerate([least, least + 1, least + 2, least + 17, 1000, 5003]):
        tasks = [passkey(tokenizer, length, depth, np.random.default_rng(seed)) for depth in (0, 0.3, 0.5, 1)]
        assert {len(task.prompt) + len(task.answer) for task in tasks} == {length}
        at = [task.needle.start for task in tasks]
        n = at[3] - at[0]  # of filler
        assert at == [at[0], at[0] + round(0.3 * n), at[0] + round(0.5 * n), at[0] + n]
        assert 0 <= n - (length - least) <= 18  # keys of fewer tokens than six leave more to fill
        first, last = text_of(tokenizer, tasks[0]), text_of(tokenizer, tasks[3])
        assert first.startswith(HEAD + "The pass key is") and ". \n" not in first
        assert re.search(r"is the pass key\.\nWhat is the pass key\? The pass key is \d{5}$", last)


def test_tokens_are_those_of_the_whole_text(tokenizer):
    """Put together from parts, yet what encoding the text at once gives: a model meets no token it would not meet."""
    for length in (700, 701, 709, 1024):
        task = passkey(tokenizer, length, 0.4, np.random.default_rng(length))
        assert [*task.prompt, *task.answer] == tokenizer.prefix + tokenizer.encode(text_of(tokenizer, task))


def test_every_key_fits_the_least_length(tokenizer):
    least, keys = least_length(tokenizer), set()
    for seed in range(200):
        task = passkey(tokenizer, least, 0.5, np.random.default_rng(seed))
        keys.add(tokenizer.decode(task.answer))
    assert len(keys) > 190
    with pytest.raises(ValueError, match=f"length is {least - 1}: a passkey task takes {least} tokens at least"):
        passkey(tokenizer, least - 1, 0.5, np.random.default_rng(0))
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"depth is .*: it must be in \[0, 1\]"):
            passkey(tokenizer, least, depth, np.random.default_rng(0))
    tasks, least = PasskeySet(tokenizer), least_length(tokenizer, described=False)
    tasks.check_length(least - 1)
    tasks.train_batch(least - 1, 3, 5, 0, 1, 50)
    with pytest.raises(ValueError, match=f"block_size is {least - 2}: .* {least} tokens .*--block-size {least - 1} at"):
        tasks.check_length(least - 2)


def test_the_description_can_be_left_out():
    """As in four of five tasks of a training; all else stays, and so does the length."""
    tokenizer = load_tokenizer("byte")
    with_, without = (passkey(tokenizer, 400, 0.3, np.random.default_rng(1), described) for described in (True, False))
    text = tokenizer.decode(without.prompt).decode()
    assert len(with_.prompt) == len(without.prompt) and "important" not in text and text.count("The pass key is") == 2
    assert np.array_equal(without.prompt[without.needle], with_.prompt[with_.needle])
    batch = PasskeySet(tokenizer).train_batch(300, 3, 5, 0, 1, 200)
    described = sum("important info" in tokenizer.decode(x.tolist()).decode() for x in batch.x[0])
    assert 20 < described < 65


@pytest.mark.parametrize("answer_only", [True, False])
def test_targets(tokenizer, answer_only):
    batch = PasskeySet(tokenizer, answer_only).train_batch(300, 3, 5, 0, 2, 4)
    assert batch.x.shape == batch.y.shape == (2, 4, 300) and batch.x.dtype == batch.y.dtype == torch.int64
    assert batch.docs is None and batch.n_valid == int((batch.y != IGNORE).sum())
    starts, lengths = set(), set()
    for x, y in zip(batch.x.view(8, 300), batch.y.view(8, 300)):
        n = int((y != IGNORE).nonzero()[-1]) + 1
        assert 224 <= n <= 300 and not x[n:].any()
        lengths.add(n)
        x, y = x[:n], y[:n]
        target = y != IGNORE
        assert torch.equal(y[:-1][target[:-1]], x[1:][target[:-1]])  # the tokens after
        key = tokenizer.decode(y[target].tolist() if answer_only else y[-8:].tolist()).decode().split()[-1]
        text = tokenizer.decode([*x.tolist(), int(y[-1])]).decode()
        assert text.endswith(f"The pass key is {key}") and f"Remember it. {key} is the" in text
        if answer_only:
            assert tokenizer.decode(y[target].tolist()).decode() == f" {key} {key}" and target[-1]
            begin = int(target.nonzero()[0])
            assert tokenizer.decode(x[:begin + 1].tolist()).decode().endswith(f"{key}. Remember it.")
            starts.add(begin)
        else:
            assert target.all()
    assert len(lengths) > 4 and (not answer_only or len(starts) > 4)  # lengths and depths are random


def test_global_batch_is_the_same_however_it_is_shared():
    tasks = PasskeySet(load_tokenizer("byte"))
    whole = tasks.train_batch(280, 3, 5, 0, 1, 12)
    for ranks, n_micro, size in ((1, 4, 3), (2, 1, 6), (2, 3, 2), (12, 1, 1)):
        parts = [tasks.train_batch(280, 3, 5, rank * n_micro * size, n_micro, size) for rank in range(ranks)]
        for part, expected in ((0, whole.x), (1, whole.y)):
            assert torch.equal(torch.cat([p[part].view(-1, 280) for p in parts]), expected.view(12, 280))
    for seed, step, first in ((4, 5, 0), (3, 6, 0), (3, 5, 12), (5, 3, 0)):
        assert not torch.equal(whole.x, tasks.train_batch(280, seed, step, first, 1, 12).x)


def test_evaluation_is_fixed_and_shared_between_ranks():
    tasks = PasskeySet(load_tokenizer("byte"))
    for n_targets, n in ((1, 1), (280, 1), (281, 2), (280 * 7, 7)):
        alone = list(tasks.eval_batches(280, 2, n_targets))
        rows = torch.cat([b.y for b in alone])
        assert rows.shape[1] == 280 and len(rows) == -(-n // 2) * 2
        assert (rows != IGNORE).sum(1).tolist() == [12] * n + [0] * (len(rows) - n)
        assert [b.n_valid for b in alone] == [int((b.y != IGNORE).sum()) for b in alone]
        shared = [list(tasks.eval_batches(280, 2, n_targets, rank, 3)) for rank in range(3)]
        for i, batch in enumerate(alone):
            assert torch.equal(batch.x, shared[i % 3][i // 3].x) and torch.equal(batch.y, shared[i % 3][i // 3].y)
        assert [len(batches) for batches in shared] == [-(-len(alone) // 3)] * 3
        assert sum(b.n_valid for batches in shared for b in batches) == 12 * n
    assert not torch.equal(alone[0].x, tasks.train_batch(280, 0, 0, 0, 1, 2).x[0])
