"""
Tokenizers: text to ids, and ids to bytes.

    byte            the UTF-8 bytes themselves, 256 ends a text; no dependency
    gpt2            GPT-2's byte-pair encoding, from the ranks beside this file (works offline)
    tokenizer.json  (its path, or its folder's) any Hugging Face tokenizer over bytes: byte-level BPE (GPT-2, Llama 3,
                    Qwen, NeoX, SmolLM2) or SentencePiece with U+2581 for a space and <0xNN> for a byte (Llama 2,
                    Mistral)

Ids decode to *bytes* and each id alone to its own, because a token may hold part of a character: a stream of tokens
joins bytes and cuts them into UTF-8 where it can. Text never turns into a control token, unless asked for:
"<|endoftext|>" or "</s>" in a book is encoded as the characters it is.

Some vocabularies lack bytes: SmolLM2's has no token for 21 of them (six control characters, lead bytes of unassigned
characters from U+40000 on, and bytes that UTF-8 never has). Such a byte is left out, as transformers leaves it out, and
nothing fails; data/prepare.py, where a loss would go unseen, refuses the text.
"""

import base64
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

GPT2_RANKS = Path(__file__).parent / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken's own for r50k_base
# GPT-2's pattern as tiktoken writes it, possessive for speed. A run of 10^6 spaces or newlines overflows its stack.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # in the order they are looked for
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # what data/chat.py reads


class Tokenizer:
    """
    name          str, what load_tokenizer was given
    tag           str, short and fit for a file name: "byte", "gpt2", or tokenizer-<8 digits of a sha256>, that of
                  tokenizer.json and eot: copies of a tokenizer share token files, different ones never do
    vocab_size    int, every id is below it
    eot           int, the id that ends a document; decodes to nothing
    stop          set of int, all ids that end a text: eot, a chat model's end of turn
    prefix        list of int, what the tokenizer itself puts before every text: begin-of-text, or nothing
    token_nbytes  (vocab_size,) int64, the bytes each id stands for, 0 for control tokens. Over the ids of a text it
                  sums to the text's bytes, but for what a tokenizer.json adds: Llama 2's puts a space before each text
    files         {name: content} of a folder that load_tokenizer loads as this same tokenizer; none for byte and gpt2
    """

    def __init__(self, name: str, tag: str, token_bytes: list[bytes], eot: int,
                 encode: Callable[[str, bool], list[int]], stop: Iterable[int] = (), prefix: Iterable[int] = (),
                 files: dict[str, bytes] | None = None):
        self.name, self.tag, self.vocab_size, self.eot = name, tag, len(token_bytes), eot
        self.stop, self.prefix, self.files = {eot, *stop}, list(prefix), files or {}
        self.token_nbytes = np.array([len(b) for b in token_bytes], dtype=np.int64)
        self._token_bytes, self._encode = token_bytes, encode

    def encode(self, text: str, control: bool = False) -> list[int]:
        """
        The ids of a text, without any begin- or end-of-text token. With `control`, names of control tokens become
        those tokens ("<|im_start|>user"): for chat templates, never for text from outside. "byte" has no such names.
        """
        return self._encode(text, control)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids: decode(a) + decode(b) == decode(a + b). Control tokens and ids of no token give none."""
        return b"".join(self._token_bytes[i] for i in map(int, ids) if 0 <= i < self.vocab_size)


def load_tokenizer(name: str | os.PathLike) -> Tokenizer:
    """
    name: "byte", "gpt2", or the path of a tokenizer.json or its folder, whose generation_config.json and config.json
    say which tokens end a text. ValueError, one line, for any other or a damaged file.
    """
    name = os.fspath(name)
    if name == "byte":
        token_bytes = [bytes([i]) for i in range(256)] + [b""]
        return Tokenizer("byte", "byte", token_bytes, eot=256,
                         encode=lambda text, control: list(text.encode("utf-8")))
    if name == "gpt2":
        return _gpt2()
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.name.endswith(".json") and path.is_file():
        return _from_tokenizer_json(path)
    if path.name.endswith(".json"):
        raise ValueError(f"tokenizer {path}: no such file")
    close = difflib.get_close_matches(name, ["byte", "gpt2"], n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"unknown tokenizer {name!r}{hint}: use byte, gpt2 or the path of a tokenizer.json or its "
                     "folder")


def _gpt2() -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise ValueError("tokenizer gpt2 needs a package that is not installed: pip install tiktoken") from None
    restore = f"restore it: git checkout {GPT2_RANKS}"
    if not GPT2_RANKS.is_file():
        raise ValueError(f"{GPT2_RANKS}: no such file; {restore}")
    raw = GPT2_RANKS.read_bytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != GPT2_SHA256:
        raise ValueError(f"{GPT2_RANKS}: sha256 is {sha256}, expected {GPT2_SHA256}; {restore}")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines())}
    eot = len(ranks)
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": eot})
    return Tokenizer("gpt2", "gpt2", sorted(ranks, key=ranks.get) + [b""], eot,
                     lambda text, control: encoding.encode(text, allowed_special="all") if control
                     else encoding.encode_ordinary(text))


def _from_tokenizer_json(path: Path) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"tokenizer {path} needs a package that is not installed: pip install tokenizers") from None
    raw = path.read_bytes()
    try:
        hf, spec = tokenizers.Tokenizer.from_str(raw.decode("utf-8")), json.loads(raw)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json for tokenizers {tokenizers.__version__}: {error}") from None
    hf.no_padding()
    hf.no_truncation()
    vocab = hf.get_vocab(with_added_tokens=True)
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", []) if token["special"]}
    ends = _end_ids(path, max(vocab.values()) + 1)
    eot = ends[0] if ends else next((vocab[token] for token in END_OF_TEXT if token in vocab), None)
    if eot is None:
        raise ValueError(f"{path}: no end-of-text token among its {len(vocab)} tokens; "
                         f"looked for {' '.join(END_OF_TEXT)}")
    stop = {eot, *ends, *(special[token] for token in END_OF_TEXT if token in special)}
    to_bytes = _token_to_bytes(path, spec)
    token_bytes = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        token_bytes[i] = to_bytes(token)
    for token in spec.get("added_tokens", []):
        token_bytes[token["id"]] = b"" if token["special"] else token["content"].encode("utf-8")
    for i in stop:
        token_bytes[i] = b""
    tag = f"tokenizer-{hashlib.sha256(raw + b'%d' % eot).hexdigest()[:8]}"
    files = {file.name: file.read_bytes() for file in map(path.with_name, BESIDE) if file.is_file()}
    ends = json.dumps({"eos_token_id": [eot, *sorted(stop - {eot})]})
    files |= {"tokenizer.json": raw, "generation_config.json": ends.encode()}

    def encode(text, control):
        hf.encode_special_tokens = not control  # True: special tokens in the text are text
        return hf.encode(text, add_special_tokens=False).ids

    example = hf.encode("a", add_special_tokens=True)
    prefix = itertools.takewhile(lambda i: i in special.values(), example.ids)
    return Tokenizer(str(path), tag, token_bytes, eot, encode, stop, prefix, files)


def _end_ids(path: Path, vocab_size: int) -> list[int]:
    """The end-of-text ids that the configurations beside a tokenizer.json name, in their order, without repetition."""
    ids = []
    for file in (path.with_name("generation_config.json"), path.with_name("config.json")):
        try:
            config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        for i in value if isinstance(value, list) else [] if value is None else [value]:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise ValueError(f"{file}: eos_token_id is {value}, {path.name} has ids 0 to {vocab_size - 1}")
            ids.append(i)
    return list(dict.fromkeys(ids))


def _token_to_bytes(path: Path, spec: dict) -> Callable[[str], bytes]:
    """How the vocabulary of a tokenizer.json writes bytes. ValueError for one that loses them, such as WordPiece."""
    steps = set(re.findall(r'"type": "(\w+)"', json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])))
    if "ByteLevel" in steps:
        byte_of = _byte_level_alphabet()
        return lambda token: bytes(byte_of[c] for c in token) if byte_of.keys() >= set(token) else token.encode("utf-8")
    if steps & {"Metaspace", "ByteFallback"}:
        byte_token = re.compile(r"<0x([0-9A-F]{2})>")

        def to_bytes(token):
            match = byte_token.fullmatch(token)
            return bytes.fromhex(match[1]) if match else token.replace("\u2581", " ").encode("utf-8")
        return to_bytes
    raise ValueError(f"{path}: its tokens do not turn back into bytes (decoder {', '.join(sorted(steps)) or 'none'}; "
                     f"needed ByteLevel, Metaspace or ByteFallback): use another tokenizer, e.g. gpt2")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: bytes that print stay, the others count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
