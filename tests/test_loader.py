"""Batches as pure functions of (seed, step, index), and evaluation windows that count every target once."""

import numpy as np
import pytest
import torch

from data.loader import IGNORE, carried_batch, check_length, eval_batches, prefetch, sample_rng, train_batch
from data.tokens import TokenFile, TokenWriter


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Documents of 1 to 60 tokens and token t of the stream is t: values tell their place."""
    path = tmp_path_factory.mktemp("data") / "train.byte.tokens"
    rng, at = np.random.default_rng(0), 0
    with TokenWriter(path, vocab_size=5000, tokenizer="byte") as writer:
        for n in rng.integers(1, 60, 40):
            writer.add_document(np.arange(at, at + n))
            at += n
    return TokenFile(path)


def test_windows_are_consecutive_and_targets_follow(file):
    batch = train_batch(file, 16, seed=3, step=5, first=0, n_micro=2, batch_size=4)
    assert batch.x.shape == batch.y.shape == (2, 4, 16) and batch.x.dtype == batch.y.dtype == torch.int64
    assert torch.equal(batch.x + 1, batch.y) and torch.equal(batch.x[..., :-1] + 1, batch.x[..., 1:])
    assert batch.docs is None and batch.n_valid == 2 * 4 * 16


def test_global_batch_is_the_same_however_it_is_shared(file):
    whole = train_batch(file, 16, 3, 5, 0, 1, 12).x.view(12, 16)
    for ranks, n_micro, size in ((1, 4, 3), (2, 1, 6), (2, 3, 2), (3, 2, 2), (12, 1, 1)):
        parts = [train_batch(file, 16, 3, 5, rank * n_micro * size, n_micro, size).x for rank in range(ranks)]
        assert torch.equal(torch.cat([part.view(-1, 16) for part in parts]), whole)


def test_every_part_of_the_key_counts(file):
    first = train_batch(file, 16, 3, 5, 0, 1, 8).x
    assert torch.equal(first, train_batch(file, 16, 3, 5, 0, 1, 8).x)
    for seed, step, start in ((4, 5, 0), (3, 6, 0), (3, 5, 8), (5, 3, 0)):
        assert not torch.equal(first, train_batch(file, 16, seed, step, start, 1, 8).x)


def test_stream_of_numbers_stays_what_it_was():
    """A numpy that draws other numbers would silently change every resumed run."""
    drawn = [int(sample_rng(1, step, index).integers(10**9)) for step, index in ((0, 0), (0, 1), (1, 0), (10**6, 511))]
    assert drawn == [458534411, 332403286, 213693508, 493831355]


def test_windows_are_uniform_over_every_start(file):
    small = train_batch(file, file.n_tokens - 4, 0, 0, 0, 1, 2000)  # 4 starts are possible
    starts = np.bincount(small.x[0, :, 0].numpy(), minlength=4)
    assert len(starts) == 4 and (abs(starts - 500) < 5 * np.sqrt(500 * 0.75)).all()


def test_documents(file):
    batch = train_batch(file, 64, 3, 5, 0, 1, 30, with_docs=True)
    plain = train_batch(file, 64, 3, 5, 0, 1, 30)
    assert torch.equal(batch.x, plain.x) and batch.docs.dtype == torch.int32
    ends = set(file.doc_offsets[1:] - 1)  # last tokens of documents
    for x, y, docs in zip(batch.x[0], batch.y[0], batch.docs[0]):
        last = torch.tensor([int(v) in ends for v in x])
        assert torch.equal(y == IGNORE, last) and torch.equal(y[~last], x[~last] + 1)
        assert torch.equal(docs, torch.cat([torch.zeros(1), last[:-1].cumsum(0)]).int())
    assert batch.n_valid == int((batch.y != IGNORE).sum()) < plain.n_valid


@pytest.mark.parametrize("with_docs", [False, True])
@pytest.mark.parametrize("n_targets", [1, 31, 32, 100, 10**9])
def test_evaluation_counts_every_target_once(file, n_targets, with_docs):
    kept = min(n_targets, file.n_tokens - 1)
    stream = np.asarray(file.tokens[:kept + 1]).astype(np.int64)
    crossing = np.isin(np.arange(1, kept + 1), file.doc_offsets) if with_docs else np.zeros(kept, bool)
    for world in (1, 2, 5):
        pairs = []
        for rank in range(world):
            batches = list(eval_batches(file, 8, 4, n_targets, rank, world, with_docs))
            assert len(batches) == -(-kept // (32 * world))  # equally many on every rank
            for batch in batches:
                assert batch.x.shape == (4, 8) and batch.n_valid == int((batch.y != IGNORE).sum())
                valid = batch.y != IGNORE
                pairs += zip(batch.x[valid].tolist(), batch.y[valid].tolist())
        assert sorted(pairs) == sorted(zip(stream[:-1][~crossing].tolist(), stream[1:][~crossing].tolist()))


def test_short_set_names_both_numbers(file):
    check_length(file, file.n_tokens - 1)
    with pytest.raises(ValueError, match=rf"holds {file.n_tokens} tokens.* = {file.n_tokens + 1}: "):
        check_length(file, file.n_tokens)


def test_prefetch_keeps_order_and_brings_errors():
    assert list(prefetch(lambda step: step * step, range(3, 9))) == [9, 16, 25, 36, 49, 64]
    assert list(prefetch(lambda step: step, range(0))) == [] and list(prefetch(lambda step: step, range(1))) == [0]
    steps = prefetch(lambda step: 1 // (2 - step), range(5))
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)


def test_carried_sequences_read_each_document_on_and_on(file):
    """Stream by stream every window follows the one before, inside one document, from its first token on."""
    T, n, starts = 8, 6, set(file.doc_offsets[:-1])
    total = sum((file.doc_offsets[i + 1] - file.doc_offsets[i] - 1) // T for i in range(file.n_docs))
    seen, last = [], None
    for step in range(total):
        batch = carried_batch(file, T, 3, step, 0, 2, 3, n_streams=n)
        x, begins = batch.x.view(n, T), batch.begins.view(n)
        assert torch.equal(batch.x + 1, batch.y) and batch.n_valid == n * T and batch.docs is None
        document = np.searchsorted(file.doc_offsets, x.numpy(), side="right")
        assert (document == document[:, :1]).all()
        if last is None:
            assert begins.all()
        else:
            assert [first in starts for first in x[:, 0].tolist()] == begins.tolist()
            assert torch.equal(x[~begins, 0], last[~begins])
        last, seen = x[:, -1] + 1, seen + [x[:, 0]]
    for stream in torch.stack(seen, 1):  # each has read every window once
        assert len(stream.unique()) == total
    parts = [carried_batch(file, T, 3, 5, first, 1, 2, n_streams=n).x[0] for first in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), carried_batch(file, T, 3, 5, 0, 1, 6, n_streams=n).x[0])
    assert not torch.equal(parts[0], carried_batch(file, T, 4, 5, 0, 1, 2, n_streams=n).x[0])
    with pytest.raises(ValueError, match="longest document has .* carry_memory .* block_size \\+ 1 = 101: use --block-size"):
        check_length(file, 100, "carry_memory")
