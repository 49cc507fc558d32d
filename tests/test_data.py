"""Token files, tokenizers, the sample books and the PG-19 downloader (against a local server that misbehaves)."""

import base64
import csv
import hashlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import data.tokenizer
from data.pg19.prepare import Downloader, Options
from data.prepare import prepare_folder
from data.tokenizer import load_tokenizer
from data.tokens import HEADER, TokenFile, TokenWriter

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, STORIES = ROOT / "data" / "sample", ROOT / "data" / "stories260k"
GPT2_GOLDENS = json.loads((Path(__file__).parent / "gpt2_goldens.json").read_text())
# every width of UTF-8, combining marks, a BOM, control characters, CRLF, runs of spaces, and control tokens' names
HARD_TEXT = ("Hello, world!  a\r\n\n\tb   c\ufeff\x00\x7f caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \u2581 "
             "\U0001f600\U0001f44d\U0001f3fd <|endoftext|> </s> <s><unk><0x41> 1234567 don't " + "x" * 300 + " " * 300)


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and message.isascii()
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"
    return message


# ---- token files

def write_tokens(path, docs, vocab_size=257, tokenizer="byte"):
    with TokenWriter(path, vocab_size=vocab_size, tokenizer=tokenizer) as writer:
        for doc in docs:
            writer.add_document(doc)


@pytest.mark.parametrize("vocab_size, dtype",
                         [(1, "<u2"), (257, "<u2"), (65536, "<u2"), (65537, "<u4"), (2**32, "<u4")])
def test_token_file_round_trip(tmp_path, vocab_size, dtype):
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, vocab_size, n) for n in (5, 0, 1, 1000)] + [[vocab_size - 1, 0]]
    path = tmp_path / "new" / "train.byte.tokens"
    write_tokens(path, docs, vocab_size, "some tokenizer")
    file = TokenFile(path, vocab_size=vocab_size, tokenizer="some tokenizer")
    assert file.tokens.dtype == np.dtype(dtype) and isinstance(file.tokens, np.memmap)
    assert (file.vocab_size, file.n_docs, file.n_tokens, len(file)) == (vocab_size, 5, 1008, 1008)
    assert file.tokenizer == "some tokenizer"
    assert file.doc_offsets.tolist() == [0, 5, 5, 6, 1006, 1008]
    assert np.array_equal(file.tokens, np.concatenate(docs))
    assert path.stat().st_size == 128 + 1008 * np.dtype(dtype).itemsize + 6 * 8
    assert os.listdir(path.parent) == [path.name]


def test_token_file_of_nothing(tmp_path):
    write_tokens(tmp_path / "a.tokens", [])
    file = TokenFile(tmp_path / "a.tokens")
    assert len(file) == file.n_docs == len(file.tokens) == 0 and file.doc_offsets.tolist() == [0]


def test_token_writer_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "train.byte.tokens"
    write_tokens(path, [[1, 2, 3]])
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with TokenWriter(path, vocab_size=257, tokenizer="byte") as writer:
            writer.add_document([4])
            raise KeyboardInterrupt
    for bad in ([0, 257], [-1], [2**32]):
        with pytest.raises(ValueError) as error:
            write_tokens(path, [[1], bad])
        one_line(error, path, min(bad), max(bad), 257)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    write_tokens(path, [[9]])
    assert TokenFile(path).tokens.tolist() == [9]
    for vocab_size in (0, 2**32 + 1):
        with pytest.raises(ValueError, match=str(vocab_size)):
            TokenWriter(path, vocab_size=vocab_size, tokenizer="byte")
    with pytest.raises(ValueError, match="89 bytes"):
        TokenWriter(path, vocab_size=257, tokenizer="x" * 89)


WHOLE = 128 + 2 * 10 + 8 * 3  # the header, ten tokens, two documents


@pytest.mark.parametrize("size", [0, 1, 7, 8, 127, 128, 129, 147, 148, WHOLE - 8, WHOLE - 1, WHOLE + 1])
def test_token_file_refuses_a_wrong_length(tmp_path, size):
    path = tmp_path / "train.gpt2.tokens"
    write_tokens(path, [range(7), range(3)])
    whole = path.read_bytes()
    assert len(whole) == WHOLE
    path.write_bytes((whole + b"x")[:size])
    with pytest.raises(ValueError) as error:
        TokenFile(path)
    expected = 128 if size < 128 else WHOLE
    one_line(error, path, f"{size} bytes", expected, f"python data/pg19/prepare.py --out {tmp_path} --tokenizer gpt2",
             "too long" if size > WHOLE else "cut short")


def put(offset, fmt, value):
    def change(raw):
        return raw[:offset] + struct.pack(fmt, value) + raw[offset + struct.calcsize(fmt):]
    return change


@pytest.mark.parametrize("change, parts", [
    (put(0, "8s", b"nanoShor"), ["not a token file", b"nanoShor", b"nanoLong"]),
    (lambda raw: b"hello", ["not a token file", b"hello", b"nanoLong"]),
    (put(8, "<I", 2), ["version 2", "version 1"]),
    (put(12, "<I", 4), ["damaged", "4 bytes per token", "takes 2"]),
    (put(16, "<Q", 0), ["damaged", "vocab_size is 0"]),
    (put(16, "<Q", 70000), ["damaged", "2 bytes per token", "takes 4"]),
    (put(24, "<Q", 11), ["cut short", WHOLE, WHOLE + 2]),
    (put(32, "<Q", 2**63), ["cut short", WHOLE]),
    (put(40, "2s", b"\xff\xfe"), ["damaged", "utf-8"]),
    (put(WHOLE - 8, "<q", 9), ["damaged", "0 to 9", "0 to 10"]),
    (put(WHOLE - 24, "<q", 1), ["damaged", "1 to 10", "0 to 10"]),
    (put(WHOLE - 16, "<q", 11), ["damaged", "0 to 10 in order"]),
])
def test_token_file_refuses_damage(tmp_path, change, parts):
    path = tmp_path / "train.byte.tokens"
    write_tokens(path, [range(7), range(3)])
    TokenFile(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        TokenFile(path)
    one_line(error, path, "python data/pg19/prepare.py", *parts)


def test_token_file_refuses_another_vocabulary(tmp_path):
    path = tmp_path / "train.byte.tokens"
    write_tokens(path, [[1]])
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ValueError) as error:
        TokenFile(path, vocab_size=50257)
    one_line(error, path, "257 tokens", "50257", f"python {tmp_path}/prepare.py --tokenizer NAME")
    with pytest.raises(ValueError) as error:
        TokenFile(path, tokenizer="gpt2")
    one_line(error, path, "'byte'", "'gpt2'", "--tokenizer gpt2")
    with pytest.raises(ValueError) as error:
        TokenFile(tmp_path / "test.gpt2.tokens")
    one_line(error, "test.gpt2.tokens: no such token file", f"python {tmp_path}/prepare.py --tokenizer gpt2")


# ---- tokenizers

def check_bytes(tokenizer, text, prefix=b""):
    """Ids of a text decode to its bytes, together, one by one and in any two parts; token_nbytes counts them."""
    ids, raw = tokenizer.encode(text), prefix + text.encode("utf-8")
    assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == raw == b"".join(tokenizer.decode([i]) for i in ids)
    assert tokenizer.decode(np.array(ids[:7])) + tokenizer.decode(ids[7:]) == raw
    assert tokenizer.token_nbytes[ids].sum() == len(raw)
    assert tokenizer.token_nbytes.dtype == np.int64 and tokenizer.token_nbytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_nbytes[tokenizer.eot] == 0 and tokenizer.eot not in ids
    assert tokenizer.decode([tokenizer.eot, -1, tokenizer.vocab_size, 10**9]) == b""
    return ids


def test_byte_tokenizer():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.name, tokenizer.tag, tokenizer.vocab_size, tokenizer.eot) == ("byte", "byte", 257, 256)
    assert check_bytes(tokenizer, HARD_TEXT) == list(HARD_TEXT.encode("utf-8"))
    assert tokenizer.decode(range(257)) == bytes(range(256))
    assert tokenizer.encode("") == []


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("tiktoken")
    return load_tokenizer("gpt2")


@pytest.mark.parametrize("text, ids", GPT2_GOLDENS, ids=range(len(GPT2_GOLDENS)))
def test_gpt2_goldens(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text.encode("utf-8")


def test_gpt2_bytes(gpt2):
    assert (gpt2.name, gpt2.tag, gpt2.vocab_size, gpt2.eot) == ("gpt2", "gpt2", 50257, 50256)
    check_bytes(gpt2, HARD_TEXT)
    rng = random.Random(0)
    codes = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(5000)]
    check_bytes(gpt2, "".join(map(chr, codes)))
    assert {gpt2.decode([i]) for i in range(256)} == {bytes([b]) for b in range(256)}  # every byte has a token
    for run in (" ", "\n", "a", "-"):  # not in quadratic time, no stack overflow
        assert len(gpt2.decode(gpt2.encode(run * 900_000 + "x"))) == 900_001


def test_gpt2_is_offline_and_checks_its_ranks(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("gpt2 went to the network"))
    load_tokenizer("gpt2")
    raw = data.tokenizer.GPT2_RANKS.read_bytes()
    ranks = tmp_path / "gpt2.tiktoken"
    monkeypatch.setattr(data.tokenizer, "GPT2_RANKS", ranks)
    with pytest.raises(ValueError) as error:
        load_tokenizer("gpt2")
    one_line(error, ranks, "no such file", "git checkout")
    ranks.write_bytes(raw[:-10])
    with pytest.raises(ValueError) as error:
        load_tokenizer("gpt2")
    one_line(error, ranks, hashlib.sha256(raw[:-10]).hexdigest(), hashlib.sha256(raw).hexdigest(), "git checkout")


def test_unknown_tokenizers(tmp_path):
    for name, parts in [("gtp2", ["did you mean gpt2?"]), ("bytes", ["did you mean byte?"]),
                        ("llama", ["byte, gpt2 or"]), (tmp_path / "tokenizer.json", ["no such file"]),
                        (tmp_path, ["tokenizer.json", "no such file"])]:
        with pytest.raises(ValueError) as error:
            load_tokenizer(name)
        one_line(error, name, *parts)


def train_hf(path, kind, specials=("<unk>", "<s>", "</s>")):
    """A small tokenizer.json, trained here: "bytelevel" as GPT-2's, "metaspace" as Llama 2's, "wordpiece" as BERT's."""
    tokenizers = pytest.importorskip("tokenizers")
    models, pre, dec = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders
    text, specials = (SAMPLE / "test" / "10321.txt").read_text(encoding="utf-8")[:30_000], list(specials)
    if kind == "bytelevel":
        hf = tokenizers.Tokenizer(models.BPE())
        hf.pre_tokenizer, hf.decoder = pre.ByteLevel(add_prefix_space=False), dec.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False,
                                                 initial_alphabet=pre.ByteLevel.alphabet())
    elif kind == "metaspace":
        hf = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        hf.pre_tokenizer = pre.Metaspace(prepend_scheme="always", split=True)
        hf.decoder = dec.Sequence([dec.Replace("\u2581", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
        specials += [f"<0x{b:02X}>" for b in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    else:
        hf = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        hf.pre_tokenizer, hf.decoder = pre.Whitespace(), dec.WordPiece()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    hf.train_from_iterator(text.splitlines(keepends=True), trainer)
    spec = json.loads(hf.to_str())
    # byte tokens are plain entries of the vocabulary, as SentencePiece's converters write them
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(spec))
    return spec


def test_byte_level_tokenizer_json(tmp_path):
    path = tmp_path / "my model" / "tokenizer.json"
    spec = train_hf(path, "bytelevel")
    spec["added_tokens"].append({"id": 400, "content": "  \u00e9", "special": False, "single_word": False,
                                 "lstrip": False, "rstrip": False, "normalized": False})
    spec["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    path.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == (str(path), 401, spec["model"]["vocab"]["</s>"])
    assert tokenizer.tag == "tokenizer-" + hashlib.sha256(path.read_bytes() + b"%d" % tokenizer.eot).hexdigest()[:8]
    check_bytes(tokenizer, HARD_TEXT)
    check_bytes(tokenizer, "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 997)])))
    assert {tokenizer.decode([i]) for i in range(400)} >= {bytes([b]) for b in range(256)}
    assert 400 in check_bytes(tokenizer, "one  \u00e9 two")  # an added token that is not special stands for its text
    assert max(tokenizer.token_nbytes) > 3  # merges were learned


def test_metaspace_tokenizer_json(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_hf(path, "metaspace")
    tokenizer = load_tokenizer(path)
    text = HARD_TEXT.replace("\u2581", "")  # which this family cannot tell from a space
    ids = check_bytes(tokenizer, "<" + text, prefix=b" ")  # one space before a text, as the tokenizer itself puts it
    assert tokenizer.decode(tokenizer.encode("\U0001f600")[-4:-3]) == b"\xf0"  # a part of a character, alone
    assert tokenizer.decode([0, 1, 2]) == b"" and len(ids) < len(text.encode("utf-8"))


def test_stories260k_tokenizer_json():
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(STORIES)  # the folder's
    assert load_tokenizer(STORIES / "tokenizer.json").tag == tokenizer.tag
    assert (tokenizer.vocab_size, tokenizer.eot) == (512, 2) and tokenizer.tag.startswith("tokenizer-")
    assert (tokenizer.prefix, tokenizer.stop) == ([1], {2})
    assert tokenizer.encode("Once upon a time,") == [403, 407, 261, 378, 432]
    assert tokenizer.encode("<s>a", control=True) == [1, 261] and 1 not in tokenizer.encode("<s>a")
    check_bytes(tokenizer, HARD_TEXT.replace("\u2581", ""), prefix=b" ")


def test_control_tokens(gpt2):
    """They come of text only where asked for."""
    assert load_tokenizer("byte").encode("</s>", control=True) == list(b"</s>")
    assert gpt2.encode("a<|endoftext|>b", control=True) == [64, 50256, 65] and gpt2.stop == {50256}
    assert 50256 not in gpt2.encode("a<|endoftext|>b") and gpt2.prefix == []


def test_what_ends_a_text(tmp_path):
    """The configurations beside a tokenizer.json say it, or else the names of its tokens."""
    path = tmp_path / "tokenizer.json"
    spec = train_hf(path, "bytelevel", specials=["<s>", "<|endoftext|>", "<|im_end|>", "<call>"])
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "<call>", "type_id": 0}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": around, "pair": around + [
        {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<s>", 0), ("<call>", 3))}}
    path.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eot, tokenizer.stop, tokenizer.prefix) == (1, {1, 2}, [0])
    (tmp_path / "chat_template.jinja").write_text("x")
    tags = {}
    for config, generation, eot, stop in (({}, {}, 1, {1, 2}), ({"eos_token_id": None}, {}, 1, {1, 2}),
                                          ({"eos_token_id": 2}, {}, 2, {1, 2}),
                                          ({"eos_token_id": 2}, {"eos_token_id": [3, 2]}, 3, {1, 2, 3})):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        tokenizer = load_tokenizer(path)
        assert (tokenizer.eot, tokenizer.stop) == (eot, stop)
        tags[tokenizer.tag] = eot
        (tmp_path / "copy").mkdir(exist_ok=True)
        for name, content in tokenizer.files.items():
            (tmp_path / "copy" / name).write_bytes(content)
        copy = load_tokenizer(tmp_path / "copy")
        for name in ("tag", "eot", "stop", "prefix", "files"):
            assert getattr(copy, name) == getattr(tokenizer, name)
        check_bytes(tokenizer, HARD_TEXT)
        assert tokenizer.decode(sorted(stop)) == b"" and tokenizer.encode("a<call>", control=True)[-1] == 3
    assert sorted(tags.values()) == [1, 2, 3] and "chat_template.jinja" in tokenizer.files
    for wrong in (400, -1, "2", [1, 2.0]):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError) as error:
            load_tokenizer(path)
        one_line(error, tmp_path / "config.json", wrong, "0 to 399")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    one_line(error, tmp_path / "config.json", "not valid JSON")


def test_tokenizer_json_refusals(tmp_path):
    path = tmp_path / "tokenizer.json"
    spec = train_hf(path, "wordpiece")
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    one_line(error, path, "WordPiece", "gpt2")
    train_hf(path, "bytelevel", specials=["<pad>"])
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    one_line(error, path, "no end-of-text", "<|endoftext|>")
    for raw in (b"{", b"\xff", json.dumps(spec["model"]).encode()):
        path.write_bytes(raw)
        with pytest.raises(ValueError) as error:
            load_tokenizer(path)
        one_line(error, path)


def test_a_tokenizer_json_that_drops_text_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.save(str(tmp_path / "tokenizer.json"))
    write_books(tmp_path, {"train/1.txt": "abba", "test/1.txt": "abcba"})
    options = dict(source=tmp_path, out=tmp_path / "out", tokenizer_name=str(tmp_path / "tokenizer.json"))
    assert TokenFile(prepare_folder(**options, splits=("train",))["train"]).tokens.tolist() == [0, 1, 1, 0, 2]
    with pytest.raises(ValueError) as error:
        prepare_folder(**options, splits=("test",))
    one_line(error, tmp_path / "test" / "1.txt", "5 bytes", "become 4", "offset 2", "tokenizer.json")


# ---- folders of books

def write_books(folder, books):
    for name, text in books.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8"))


def library(n_train=9):
    rng = random.Random(1)
    names = [f"train/{i}.txt" for i in rng.sample(range(1, 20_000), n_train)] + ["validation/7.txt", "test/11.txt"]
    return {name: f"{name}\r\n" + "the \u00e9t\u00e9 of " * rng.randrange(2000) for name in names}


def test_prepare_folder_order_and_content(tmp_path):
    books = {"train/9.txt": "nine", "train/10.txt": "", "train/100.txt": "\ufeffa\r\nb\r\n", "train/.9.txt": "hidden",
             "validation/1.txt": "v", "test/1.txt": "t"}
    write_books(tmp_path / "books", books)
    paths = prepare_folder(tmp_path / "books", tmp_path / "out")
    assert paths == {s: tmp_path / "out" / f"{s}.byte.tokens" for s in ("train", "validation", "test")}
    file = TokenFile(paths["train"], vocab_size=257, tokenizer="byte")
    docs = [file.tokens[a:b].tolist() for a, b in zip(file.doc_offsets, file.doc_offsets[1:])]
    assert docs == [[*books[f"train/{i}.txt"].encode("utf-8"), 256] for i in (9, 10, 100)]


def test_prepare_folder_puts_the_prefix_before_each_document(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(STORIES)
    write_books(tmp_path, {"test/1.txt": "Once", "test/2.txt": ""})
    file = TokenFile(prepare_folder(tmp_path, tmp_path, str(STORIES), splits=("test",))["test"])
    assert file.tokens[:].tolist() == [1, *tokenizer.encode("Once"), 2, 1, *tokenizer.encode(""), 2]


def test_prepare_folder_is_the_same_for_any_number_of_workers(tmp_path):
    write_books(tmp_path, library())
    contents = set()
    for workers in (1, 2, 3):
        paths = prepare_folder(tmp_path, tmp_path / str(workers), workers=workers)
        contents.add(b"".join(path.read_bytes() for path in paths.values()))
    assert len(contents) == 1
    assert TokenFile(paths["train"]).n_docs == 9
    (tmp_path / "train" / "99999.txt").write_bytes(b"abc\xe9def")
    for workers in (1, 2):
        with pytest.raises(ValueError) as error:
            prepare_folder(tmp_path, tmp_path / "bad", workers=workers)
        one_line(error, tmp_path / "train" / "99999.txt", "0xe9", "offset 3 of 7", "iconv")
    assert os.listdir(tmp_path / "bad") == []


def test_prepare_folder_remakes_what_changed(tmp_path):
    write_books(tmp_path, library(3))
    out = prepare_folder(tmp_path, tmp_path)["train"]

    def made_again(**kwargs):
        old = out.stat().st_ino, out.stat().st_mtime_ns
        time.sleep(0.02)  # more than a tick of the file system's clock
        prepare_folder(tmp_path, tmp_path, **kwargs)
        TokenFile(out)
        return (out.stat().st_ino, out.stat().st_mtime_ns) != old

    assert not made_again()
    time.sleep(0.02)
    book = sorted((tmp_path / "train").iterdir())[0]
    book.write_text("another text")
    assert made_again() and not made_again()
    book.rename(book.with_stem("1"))
    assert made_again() and not made_again()
    out.write_bytes(out.read_bytes()[:-3])
    assert made_again() and not made_again()
    assert made_again(limit=2) and TokenFile(out).n_docs == 2
    assert made_again() and TokenFile(out).n_docs == 3


def test_prepare_folder_refusals(tmp_path):
    write_books(tmp_path, {"train/1.txt": "x"})
    for kwargs, parts in [(dict(source=tmp_path / "no"), [tmp_path / "no", "no such folder"]),
                          (dict(), [tmp_path / "validation", "no books"]),
                          (dict(tokenizer_name="gtp2"), ["gpt2"]),
                          (dict(workers=0), ["workers is 0"]), (dict(limit=0), ["limit 0"])]:
        with pytest.raises(ValueError) as error:
            prepare_folder(**{"source": tmp_path, "out": tmp_path / "out", **kwargs})
        one_line(error, *parts)
    assert list(prepare_folder(tmp_path, tmp_path / "out", splits=("train",))) == ["train"]


def test_sample_books(tmp_path):
    """The books are the ones described, and their GPT-2 token counts the ones computed apart from this code."""
    rows = {row[0]: row for row in csv.reader((SAMPLE / "metadata.csv").read_text().splitlines())}
    readme = (SAMPLE / "README.md").read_text()
    files = {path.stem: path for path in SAMPLE.glob("*/*.txt")}
    assert files.keys() == rows.keys() and all(len(row) == 4 for row in rows.values())
    authors = {}
    for i, (_, title, year, url) in rows.items():
        name, author = title.split(" by ")
        authors.setdefault(files[i].parent.name, set()).add(author)
        row = next(line for line in readme.splitlines() if f"`{files[i].parent.name}/{i}.txt`" in line)
        assert name.lower() in row.lower()
        assert all(part in row for part in (author, year, url, f"{files[i].stat().st_size:,}"))
        assert "gutenberg license" not in files[i].read_text(encoding="utf-8").lower()
    assert authors.keys() == {"train", "validation", "test"} and len(set.union(*authors.values())) == 5
    assert 1_500_000 < sum(path.stat().st_size for path in files.values()) < 2_500_000
    n_bytes = {"train": 429045 + 635749, "validation": 553858, "test": 249429 + 318140}
    n_gpt2 = {"train": 112067 + 162484, "validation": 138178, "test": 61258 + 85963}
    for name, expected in [("byte", n_bytes), ("gpt2", n_gpt2)]:
        if name == "gpt2":
            pytest.importorskip("tiktoken")
        made = {s: TokenFile(path) for s, path in prepare_folder(SAMPLE, tmp_path, name).items()}
        assert {s: f.n_tokens - f.n_docs for s, f in made.items()} == expected
        assert {s: f.n_docs for s, f in made.items()} == {"train": 2, "validation": 1, "test": 2}
        nbytes = load_tokenizer(name).token_nbytes
        assert {s: nbytes[f.tokens].sum() for s, f in made.items()} == n_bytes


# ---- the scripts

def run(*args, cwd=ROOT, rc=0):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == rc and "Traceback" not in done.stderr, done.stderr
    return done


def test_scripts_run_from_a_source_tree(tmp_path):
    write_books(tmp_path / "books", library(2))
    options = ["--source", tmp_path / "books", "--splits", "train", "test", "--workers", "2"]
    for command in (["data/pg19/prepare.py"], ["-m", "data.pg19.prepare"]):
        out = tmp_path / str(len(command))
        done = run(*command, *options, "--out", out)
        assert done.stdout.split() == [str(out / "train.byte.tokens"), str(out / "test.byte.tokens")]
    assert (tmp_path / "1/train.byte.tokens").read_bytes() == (tmp_path / "2/train.byte.tokens").read_bytes()
    run(SAMPLE / "prepare.py", "--out", tmp_path / "sample", cwd=tmp_path)
    assert TokenFile(tmp_path / "sample/test.byte.tokens").n_tokens == 567571


def test_scripts_end_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for args, message in [(["--source", tmp_path / "no"], f"error: {tmp_path}/no: no such folder"),
                          (["--source", SAMPLE, "--out", tmp_path / "file" / "x"], "error: [Errno 20] Not a directory"),
                          (["--base-url", "nonsense"], "error: unknown url type")]:
        done = run("data/pg19/prepare.py", *args, rc=1)
        assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert "--tokenizer" in run("data/sample/prepare.py", "--tokeniser", "gpt2", rc=2).stderr


# ---- the downloader, against a server that misbehaves

class Bucket:
    """A bucket on 127.0.0.1: lists two objects a page. faults: {name: [what to do at each request, then behave]}."""

    def __init__(self, files):
        self.files = {name: text.encode("utf-8") for name, text in files.items()}
        self.faults, self.requests, self.delay = {}, Counter(), 0.0
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                bucket.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # the client hung up
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        url = urllib.parse.urlsplit(request.path)
        if url.path == "/storage/v1/b/deepmind-gutenberg/o":
            name, body = "listing", self.list(dict(urllib.parse.parse_qsl(url.query)))
        else:
            name = url.path.removeprefix("/deepmind-gutenberg/")
            body = self.files.get(name)
        self.requests[name] += 1
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if name != "listing":
            time.sleep(self.delay)
        if fault == "drop" or (fault == "truncate" and not body):
            return request.connection.shutdown(socket.SHUT_RDWR)
        if fault == "delay":
            time.sleep(3.0)  # longer than the client's timeout
        status = fault if isinstance(fault, int) else 404 if body is None else 200
        body = body if status == 200 else b"no"
        request.send_response(status)
        request.send_header("Content-Length", str(len(body) // 2 if fault == "short" else len(body)))
        request.end_headers()
        if fault in ("truncate", "short"):  # half of it: told by Content-Length, or told by nothing but the listing
            body = body[:len(body) // 2]
        if fault == "garble":
            body = bytes(len(body))
        request.wfile.write(body)

    def list(self, query):
        names = sorted(n for n in self.files if n.startswith(query["prefix"]))
        start = int(query.get("pageToken", 0))
        page = {"items": [{"name": n, "size": str(len(self.files[n])),
                           "md5Hash": base64.b64encode(hashlib.md5(self.files[n]).digest()).decode()}
                          for n in names[start:start + 2]]}
        if start + 2 < len(names):
            page["nextPageToken"] = str(start + 2)
        return json.dumps(page).encode()


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    extra = {"metadata.csv": "7,A Book,1900,http://x\n", "train/": "", "train/../evil.txt": "evil"}
    bucket = Bucket({**extra, **library(5)})
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()


def books_of(bucket):
    return {name: raw for name, raw in bucket.files.items() if name not in ("train/", "train/../evil.txt")}


def on_disk(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def download(bucket, out, **kwargs):
    options = dict(out=out, base_url=bucket.url, timeout=1.0, backoff=0.01, tries=20)
    Downloader(Options(**{**options, **kwargs})).download()


def test_download_survives_every_fault_and_resumes(tmp_path, bucket):
    books = books_of(bucket)
    names = sorted(n for n in books if n != "metadata.csv")
    faults = [["drop"], ["delay"], ["truncate"], ["short"], ["garble"], [503, 429], ["drop", "short", 500, "delay"]]
    bucket.faults = {name: list(fault) for name, fault in zip(names, faults, strict=True)}
    bucket.faults["listing"] = ["drop", 503, "truncate", "delay", "short"]
    download(bucket, tmp_path)
    assert on_disk(tmp_path) == books
    assert not any(bucket.faults.values())  # each was met
    assert all(bucket.requests[name] >= len(fault) + 1 for name, fault in zip(names, faults, strict=True))
    assert bucket.requests["train/../evil.txt"] == 0

    bucket.requests.clear()
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes(books[names[1]][:-1])
    (tmp_path / names[2]).write_bytes(bytes(len(books[names[2]])))
    download(bucket, tmp_path)
    assert on_disk(tmp_path) == books
    assert {n for n in bucket.requests if n != "listing"} == set(names[:3])


def test_download_gives_up_in_one_line(tmp_path, bucket):
    name = next(n for n in bucket.files if n.startswith("test/"))
    md5 = hashlib.md5(bucket.files[name]).hexdigest()
    for fault, parts in [("truncate", ["4 tries", "bytes"]), ("garble", ["4 tries", md5]),
                         ("delay", ["4 tries", "timed out"]), (503, ["4 tries", "503"]), (404, ["404", "--base-url"])]:
        bucket.faults = {name: [fault] * 99}
        with pytest.raises(ValueError) as error:
            download(bucket, tmp_path, tries=4, splits=("test",), timeout=0.5)
        one_line(error, f"{bucket.url}/deepmind-gutenberg/{name}", *parts)
        assert on_disk(tmp_path).keys() <= {"metadata.csv"}
    with pytest.raises(ValueError) as error:
        download(bucket, tmp_path, base_url="http://127.0.0.1:1", tries=2)
    one_line(error, "127.0.0.1:1", "2 tries", "--source")
    for wrong, message in [(dict(tries=0), "--tries is 0"), (dict(limit=-1), "--limit -1")]:
        with pytest.raises(ValueError) as error:
            download(bucket, tmp_path, **wrong)
        one_line(error, message)
    bucket.files = {}
    with pytest.raises(ValueError) as error:
        download(bucket, tmp_path)
    one_line(error, bucket.url, "train", "--base-url")


def test_download_refuses_a_full_disk(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError) as error:
        download(bucket, tmp_path)
    one_line(error, tmp_path, f"{sum(map(len, books_of(bucket).values())):,} bytes", "1,000 free", "--out")
    assert on_disk(tmp_path) == {}


def test_download_limit_takes_the_first_ids(tmp_path, bucket):
    download(bucket, tmp_path, limit=2, splits=("train",))
    first = sorted((n for n in books_of(bucket) if n.startswith("train/")), key=lambda n: int(Path(n).stem))[:2]
    assert on_disk(tmp_path).keys() == {"metadata.csv", *first}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on(tmp_path, bucket, how):
    bucket.files.update({f"train/{90000 + i}.txt": b"x" * 300_000 for i in range(60)})
    bucket.delay = 0.2
    options = ["--base-url", bucket.url, "--out", str(tmp_path), "--workers", "1"]
    command = [sys.executable, "data/pg19/prepare.py", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,  # SIGINT may be ignored around us
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while len(list(tmp_path.glob("*/[!.]*.txt"))) < 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    stderr = process.communicate(timeout=120)[1]
    done, books = on_disk(tmp_path), books_of(bucket)
    whole = {name for name, raw in done.items() if not name.endswith(".tmp")}
    assert 20 <= len(whole) < len(books) and all(done[name] == books[name] for name in whole)
    if how == signal.SIGINT:
        assert process.returncode == 130 and whole == done.keys()
        assert "run the same command" in stderr and "Traceback" not in stderr

    bucket.requests.clear()
    bucket.delay = 0.0
    run(*command[1:])
    after = on_disk(tmp_path)
    assert {name: raw for name, raw in after.items() if not name.endswith(".tokens")} == books
    assert not whole & bucket.requests.keys()
    assert TokenFile(tmp_path / "train.byte.tokens").n_docs == 65
