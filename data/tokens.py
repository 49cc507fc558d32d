"""
The token file: one split of one data set, tokenized, read by memory map.

    bytes 0..127    header: magic "nanoLong", version, bytes per token (2 or 4), vocab_size, n_tokens, n_docs, tokenizer
    n_tokens        tokens, little-endian uint16 (vocab_size <= 65536) or uint32
    n_docs + 1      document offsets, little-endian int64: document i is tokens[offsets[i]:offsets[i + 1]], its
                    end-of-text included

The offsets come last because a writer knows them last; the header says where they are, and how long the file must be.
"""

import os
import struct
import uuid
from array import array
from pathlib import Path

import numpy as np

MAGIC = b"nanoLong"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ88s")  # magic, version, bytes per token, vocab_size, n_tokens, n_docs, tokenizer


class DataError(ValueError):
    """A token file turns out to be damaged while it is read."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id: '<u2' or '<u4'. ValueError for a vocabulary that neither holds."""
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"vocab_size is {vocab_size}, a token file holds 1 to {2**32}")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenWriter:
    """
    Writes a token file document by document; it appears under its name whole or not at all.

        with TokenWriter(path, vocab_size=257, tokenizer="byte") as writer:
            writer.add_document(ids)

    Memory: one document and 8 bytes per document. An exception inside the `with` leaves an older file at `path` alone.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int, tokenizer: str):
        self.path, self.vocab_size, self.tokenizer = Path(path), vocab_size, tokenizer
        self.dtype = token_dtype(vocab_size)
        self._name = tokenizer.encode("utf-8")
        if len(self._name) > 88:
            raise ValueError(f"tokenizer name {tokenizer!r} is {len(self._name)} bytes, a header holds 88: shorten it")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own for each writer: two processes may prepare the same set at once, and the last rename wins
        self._tmp = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._file = open(self._tmp, "xb")
        self._file.write(bytes(HEADER.size))
        self._offsets = array("q", [0])
        return self

    def add_document(self, ids) -> None:
        """ids (n,) ints: list, array or tensor. ValueError if one is outside 0..vocab_size-1."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"{self.path}: token ids from {ids.min()} to {ids.max()}, vocab_size is "
                             f"{self.vocab_size}: was the text encoded by another tokenizer than {self.tokenizer!r}?")
        self._file.write(ids.astype(self.dtype).data)
        self._offsets.append(self._offsets[-1] + ids.size)

    def __exit__(self, exc_type, exc, traceback):
        try:
            with self._file:
                if exc_type is None:
                    self._file.write(np.asarray(self._offsets, dtype="<i8").data)
                    self._file.seek(0)
                    self._file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.vocab_size,
                                                 self._offsets[-1], len(self._offsets) - 1, self._name))
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if exc_type is None:
                os.replace(self._tmp, self.path)
        finally:
            self._tmp.unlink(missing_ok=True)


class TokenFile:
    """
    A token file, open for reading; nothing but the header and the offsets is read until tokens are.

    tokens (n_tokens,) np.memmap uint16 or uint32; doc_offsets (n_docs + 1,) int64; vocab_size, n_tokens, n_docs int;
    tokenizer str: the tag of the tokenizer that made it (data/tokenizer.py). len() is n_tokens.
    vocab_size=, tokenizer=: what the caller expects, checked when given.
    ValueError, one line: not a token file, another version, cut short, damaged, another vocabulary or tokenizer.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int | None = None, tokenizer: str | None = None):
        self.path = Path(path)
        again = f"make it again: {_prepare_command(self.path, tokenizer)}"
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such token file; make it: {_prepare_command(self.path, tokenizer)}")
        with open(self.path, "rb") as file:
            raw, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
        if raw[:8] != MAGIC[:len(raw)]:
            raise ValueError(f"{self.path}: not a token file, begins with {raw[:8]!r} and not {MAGIC!r}; {again}")
        if len(raw) < HEADER.size:
            raise ValueError(f"{self.path}: cut short, {size} bytes where the header alone is {HEADER.size}; {again}")
        _, version, itemsize, self.vocab_size, self.n_tokens, self.n_docs, name = HEADER.unpack(raw)
        if version != VERSION:
            raise ValueError(f"{self.path}: token file version {version}, this code reads version {VERSION}; {again}")
        try:
            self.tokenizer, dtype = name.rstrip(b"\0").decode("utf-8"), token_dtype(self.vocab_size)
        except ValueError as error:
            raise ValueError(f"{self.path}: damaged header ({error}); {again}") from None
        if itemsize != dtype.itemsize:
            raise ValueError(f"{self.path}: damaged header, {itemsize} bytes per token where a vocabulary of "
                             f"{self.vocab_size} takes {dtype.itemsize}; {again}")
        end = HEADER.size + self.n_tokens * itemsize
        expected = end + 8 * (self.n_docs + 1)
        if size != expected:
            what = "cut short" if size < expected else "too long"
            raise ValueError(f"{self.path}: {what}, {size} bytes where its header says {expected}; {again}")
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(f"{self.path}: vocabulary of {self.vocab_size} tokens (tokenizer {self.tokenizer}), "
                             f"expected {vocab_size}; prepare the set with the tokenizer you train or evaluate with: "
                             f"{_prepare_command(self.path, tokenizer or 'NAME')}")
        if tokenizer is not None and tokenizer != self.tokenizer:
            raise ValueError(f"{self.path}: made by tokenizer {self.tokenizer!r}, expected {tokenizer!r}; {again}")
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r", offset=HEADER.size, shape=(self.n_tokens,))
        self.doc_offsets = np.fromfile(self.path, dtype="<i8", count=self.n_docs + 1, offset=end)
        if self.doc_offsets[0] != 0 or self.doc_offsets[-1] != self.n_tokens or (np.diff(self.doc_offsets) < 0).any():
            raise ValueError(f"{self.path}: damaged, document offsets run from {self.doc_offsets[0]} to "
                             f"{self.doc_offsets[-1]} where 0 to {self.n_tokens} in order is expected; {again}")

    def __len__(self) -> int:
        return self.n_tokens


def _prepare_command(path: Path, tokenizer: str | None) -> str:
    """The command that makes `path`, a <split>.<tokenizer tag>.tokens, as far as its name tells."""
    tokenizer = tokenizer or (path.name.split(".")[-2] if path.name.count(".") > 1 else "NAME")
    if tokenizer not in ("byte", "gpt2", "NAME"):
        tokenizer = "PATH/tokenizer.json"  # a tag tells which, not where it is
    if (path.parent / "prepare.py").is_file():
        return f"python {path.parent / 'prepare.py'} --tokenizer {tokenizer}"
    return f"python data/pg19/prepare.py --out {path.parent} --tokenizer {tokenizer}"
