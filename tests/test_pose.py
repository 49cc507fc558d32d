"""PoSE's samples: what text, which positions, which targets. How the trainer uses them is in test_train.py."""

import numpy as np
import pytest
import torch

from data.loader import check_length, pose_batch
from data.tokens import DataError, TokenFile, TokenWriter

T, TARGET = 16, 64


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Token t of the stream is t, so that values tell their place. 300 tokens hold 284 windows of 17, 100 hold 84, 17 one."""
    path, at = tmp_path_factory.mktemp("data") / "train.byte.tokens", 0
    with TokenWriter(path, vocab_size=5000, tokenizer="byte") as writer:
        for n in (5, 300, 16, 100, 1, 17):
            writer.add_document(np.arange(at, at + n))
            at += n
    return TokenFile(path)


def sample(file, n, *, size=T, target=TARGET, seed=0, **options):
    """n samples -> x, y, positions as arrays (n, size)."""
    batch = pose_batch(file, size, seed, 3, 0, 1, n, target, **options)
    assert batch.docs is None and batch.begins is None and batch.n_valid == n * size
    assert {t.dtype for t in (batch.x, batch.y, batch.positions)} == {torch.int64}
    return [t[0].numpy() for t in (batch.x, batch.y, batch.positions)]


def is_uniform(values, n_bins):
    """Chi-square: n_bins - 1 degrees of freedom, five standard deviations of it above its mean are too many."""
    counts = np.bincount(values, minlength=n_bins)
    expected = len(values) / n_bins
    assert len(counts) == n_bins and expected > 20
    return ((counts - expected)**2).sum() / expected < n_bins - 1 + 5 * np.sqrt(2 * (n_bins - 1))


@pytest.mark.parametrize("content_skip", [True, False])
@pytest.mark.parametrize("chunks", [1, 2, 3, T])
def test_text_positions_and_targets(file, chunks, content_skip):
    x, y, positions = sample(file, 400, chunks=chunks, content_skip=content_skip)
    assert (y == x + 1).all()  # the text's own next token, across the jump too
    document = np.searchsorted(file.doc_offsets, x, side="right")
    assert (document == document[:, :1]).all() and (y < file.doc_offsets[document]).all()
    assert set(document[:, 0]) == {2, 4, 6}  # those with a window
    assert (np.diff(x) >= 1).all() and (x[:, -1] - x[:, 0] < 5 * T).all()
    assert (positions[:, 0] == 0).all() and (np.diff(positions) >= 1).all() and positions.max() < TARGET
    for rows, skipping in ((x, content_skip and chunks > 1), (positions, chunks > 1)):
        jumps = (np.diff(rows) > 1).sum(1)
        assert jumps.max() <= chunks - 1 and (jumps > 0).any() == skipping
    jump = np.diff(positions) > 1  # a content skip is where a position skip can be: between the same chunks
    for row, skip in zip(np.diff(x) > 1, jump):
        assert (row | skip).sum() <= chunks - 1


def test_two_chunks_are_drawn_uniformly_and_independently(file):
    x, _, positions = sample(file, 12000)
    long = x[:, 0] < 305  # of the documents the one with a whole stretch
    u, v = positions[:, -1] - (T - 1), x[long, -1] - x[long, 0] - (T - 1)
    assert is_uniform(u, TARGET - T + 1) and is_uniform(v, 4 * T + 1)
    jumps = np.diff(positions) > 1
    assert is_uniform(jumps[u > 0].argmax(1), (T + 1) // 2)  # one less than the first chunk's length
    assert is_uniform((v >= 2 * T) * 2 + (u[long] >= (TARGET - T) / 2), 4)  # 65 and 49 values halve well enough
    assert is_uniform(x[long, 0] - 5, 300 - 5 * T)  # the stretch's start
    first = jumps.argmax(1) + 1
    assert abs(np.corrcoef(first[u > 0], u[u > 0])[0, 1]) < 0.05


def test_every_distance_is_trained(file):
    """The relative distances of 2000 samples are all there are, 0 to target - 1; the baseline's without skips are not."""
    for chunks, most in ((1, T - 1), (2, TARGET - 1), (3, TARGET - 1), (T, TARGET - 1)):
        _, _, positions = sample(file, 2000, chunks=chunks)
        distances = np.bincount((positions[:, :, None] - positions[:, None])[:, *np.tril_indices(T)].ravel())
        assert len(distances) == most + 1 and (distances > 0).all()


def test_skips_of_many_chunks_are_uniform(file):
    """All non-decreasing sequences alike: 0 <= u_1 <= u_2 <= 2 are 6, and a position per token any set with 0 in it."""
    _, _, positions = sample(file, 3000, size=3, target=5, chunks=3)
    u1, u2 = positions[:, 1] - 1, positions[:, 2] - 2
    assert is_uniform(u1 + u2 * (u2 + 1) // 2, 6)
    _, _, positions = sample(file, 20000, chunks=T)
    assert is_uniform(positions[:, 1:].ravel() - 1, TARGET - 1)


def test_lengths_of_three_chunks(file):
    _, _, positions = sample(file, 8000, chunks=3, target=5000)  # so far that hardly any skip is 0
    jumps = np.diff(positions) > 1
    sizes = np.array([np.diff(np.append(0, np.flatnonzero(row) + 1)) for row in jumps if row.sum() == 2])
    assert len(sizes) > 7900
    assert is_uniform(sizes[:, 0] - 1, (T + 1) // 3) and is_uniform(sizes[:, 1] - 1, (T + 1) // 3)


def test_documents_by_their_windows_and_all_of_each_is_read(file):
    for content_skip in (True, False):
        x, y, _ = sample(file, 6000, content_skip=content_skip)
        counts = np.array([(x[:, 0] < 305).sum(), ((x[:, 0] >= 321) & (x[:, 0] < 421)).sum(), (x[:, 0] >= 422).sum()])
        expected = 6000 * np.array([284, 84, 1]) / 369
        assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
        unseen = {*range(5, 305), *range(321, 421), *range(422, 439)} - set(x.ravel()) - set(y.ravel())
        assert len(unseen) <= 5 * content_skip  # the last of a stretch that is the last of its document: 1 in 14365


def test_a_sample_is_its_own_and_the_batch_is_the_same_however_it_is_shared(file):
    whole = pose_batch(file, T, 3, 5, 0, 1, 12, TARGET)
    for ranks, n_micro, size in ((1, 4, 3), (2, 3, 2), (12, 1, 1)):
        parts = [pose_batch(file, T, 3, 5, rank * n_micro * size, n_micro, size, TARGET) for rank in range(ranks)]
        assert parts[0].x.shape == parts[0].positions.shape == (n_micro, size, T)
        for name in ("x", "y", "positions"):
            got = torch.cat([getattr(part, name).view(-1, T) for part in parts])
            assert torch.equal(got, getattr(whole, name)[0])
    rows = whole.positions[0]
    assert len({tuple(row.tolist()) for row in rows}) > 9  # drawn afresh for every sample
    for seed, step, first in ((4, 5, 0), (3, 6, 0), (3, 5, 12), (5, 3, 0)):
        other = pose_batch(file, T, seed, step, first, 1, 12, TARGET)
        assert not torch.equal(other.x, whole.x) and not torch.equal(other.positions, whole.positions)
    micro = whole.micro(0, torch.device("cpu"))
    assert torch.equal(micro.positions, rows) and micro.begins is None


def test_stream_of_numbers_stays_what_it_was(file):
    """Other draws would silently change every resumed run."""
    assert [(x[0], x[-1], p[-1]) for x, _, p in (
        [t[0].tolist() for t in sample(file, 1, seed=seed, chunks=chunks)] for seed, chunks in ((0, 2), (1, 2), (0, 5)))
    ] == [(109, 155, 53), (145, 200, 18), (109, 175, 59)]


def test_a_target_that_is_the_window_skips_the_text_alone(file):
    x, _, positions = sample(file, 50, target=T)
    assert (positions == np.arange(T)).all() and (np.diff(x) > 1).any()


def test_a_file_that_does_not_do(file, tmp_path):
    check_length(file, 299, "pose_target")
    with pytest.raises(ValueError, match=r"document has 300 tokens, pose_target .* block_size \+ 1 = 301: use --block-size 299"):
        check_length(file, 300, "pose_target")
    path = tmp_path / "train.byte.tokens"
    with TokenWriter(path, vocab_size=600, tokenizer="byte") as writer:
        writer.add_document(np.arange(100))
    raw = bytearray(path.read_bytes())
    raw[128:328] = b"\xff" * 200
    path.write_bytes(raw)
    with pytest.raises(DataError, match="token 65535 .* vocabulary is 600"):
        sample(TokenFile(path), 1)
