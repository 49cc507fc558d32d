"""
From a folder of books to token files: what every data/<set>/prepare.py shares.

    <source>/{train,validation,test}/<id>.txt   ->   <out>/{train,validation,test}.<tokenizer tag>.tokens

One document per book, whole, between the tokenizer's prefix (begin-of-text, if it has one) and end-of-text, in the
order of the books' ids.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import TokenFile, TokenWriter

SPLITS = ("train", "validation", "test")


def prepare_folder(source: str | os.PathLike, out: str | os.PathLike, tokenizer_name: str = "byte",
                   splits: tuple[str, ...] = SPLITS, workers: int = 1, limit: int | None = None) -> dict[str, Path]:
    """
    Tokenizes source/<split>/*.txt into out/<split>.<tag>.tokens and returns {split: path}. A token file that is whole,
    newer than its books and has as many documents stays as it is, so calling this again costs nothing.

    tokenizer_name: as load_tokenizer takes it. workers: processes (1 stays in this one); the files are the same bytes
    for any number. limit: only the first books of each split. Memory: 2 * workers books.
    ValueError, one line: no such folder, no books in it, unknown tokenizer, a book that is not UTF-8.
    """
    source, out = Path(source), Path(out)
    tokenizer = load_tokenizer(tokenizer_name)
    if workers < 1 or (limit is not None and limit < 1):
        raise ValueError(f"workers is {workers} and limit {limit}, both must be 1 or more")
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; books are read from <folder>/{{{','.join(splits)}}}/<id>.txt")
    books = {split: sorted((source / split).glob("[!.]*.txt"), key=book_order)[:limit] for split in splits}
    for split in splits:
        if not books[split]:
            raise ValueError(f"{source / split}: no books there; expected <id>.txt files, one per book "
                             f"(leave a split out with --splits)")
    paths = {split: out / f"{split}.{tokenizer.tag}.tokens" for split in splits}
    for split in splits:
        if not _up_to_date(paths[split], books[split], tokenizer):
            _write(paths[split], books[split], tokenizer, workers)
    return paths


def book_order(path: Path) -> tuple[int, str]:
    """Sort key of <id>.txt: numbers by their value, anything else by length, then letters; the same everywhere."""
    return len(path.stem), path.stem


def encode_book(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """
    The prefix, the ids of a UTF-8 file, byte for byte (no newline translation), end-of-text: (n,) uint32. ValueError
    when it is not UTF-8, or when a tokenizer.json does not give its bytes back (but for the space that it may put
    before them).
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8, byte 0x{raw[error.start]:02x} at offset {error.start} of {len(raw)}; "
                         f"convert it, for instance: iconv -f latin1 -t utf-8 {path} > fixed.txt") from None
    ids = tokenizer.encode(text)
    if tokenizer.name not in ("byte", "gpt2") and (back := tokenizer.decode(ids)) not in (raw, b" " + raw):
        where = len(os.path.commonprefix([raw, back.removeprefix(b" ") if raw[:1] != b" " else back]))
        raise ValueError(f"{path}: {len(raw)} bytes become {len(back)} in {tokenizer.name}, which loses or changes the "
                         f"text from offset {where} on: use another tokenizer, e.g. gpt2")
    return np.array(tokenizer.prefix + ids + [tokenizer.eot], dtype=np.uint32)


def _up_to_date(path: Path, books: list[Path], tokenizer: Tokenizer) -> bool:
    try:
        n_docs = TokenFile(path, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.tag).n_docs
    except ValueError:
        return False
    # a book added, removed or renamed touches its folder
    newest = max(p.stat().st_mtime_ns for p in (*books, books[0].parent))
    return n_docs == len(books) and path.stat().st_mtime_ns > newest


def _write(path: Path, books: list[Path], tokenizer: Tokenizer, workers: int) -> None:
    n_tokens = 0
    with TokenWriter(path, tokenizer.vocab_size, tokenizer.tag) as writer, \
            contextlib.closing(_encode_books(books, tokenizer, workers)) as encoded:
        for ids in tqdm(encoded, total=len(books), desc=path.name, unit="book", disable=None):
            writer.add_document(ids)
            n_tokens += len(ids)
    print(f"{path}: {len(books):,} books, {n_tokens:,} tokens", file=sys.stderr)


def _encode_books(books: list[Path], tokenizer: Tokenizer, workers: int) -> Iterator[np.ndarray]:
    """The ids of each book, in order. At most 2 * workers books are under way: a slow one never piles up the others."""
    if workers == 1 or len(books) == 1:
        yield from (encode_book(book, tokenizer) for book in books)
        return
    # spawn: the caller may hold threads or a GPU, which a fork would break. Ctrl-C is for the parent, which then stops.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=signal.signal,
                             initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        pending = deque()
        try:
            for book in books:
                if len(pending) == 2 * workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(_encode_in_worker, book, tokenizer.name))
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError(f"one of {workers} tokenizing processes was killed, for want of memory perhaps; "
                             f"run again with fewer: --workers {max(1, workers // 2)}") from None
        finally:
            pool.shutdown(cancel_futures=True)


@functools.cache
def _worker_tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)  # once per worker process


def _encode_in_worker(path: Path, name: str) -> np.ndarray:
    return encode_book(path, _worker_tokenizer(name))


@contextlib.contextmanager
def one_line_errors():
    """For a script's main: a user's mistake, a full disk or Ctrl-C ends in one line, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
