"""
What a model can do with a long text, as a table, a JSON file and a picture.

    python eval.py perplexity                                              the latest run on the test books, as trained
    python eval.py perplexity --model data/smollm2/model --tokens 100000 --attention 4+1020 0+1024 recompute+1024
    python eval.py lengths --lengths 512 1024 2048 --scaling as-is yarn    the same tokens after more and more text
    python eval.py passkey quickstart --lengths 1024 4096 16384            does it remember a number for so long?
    python eval.py stream --model data/smollm2/model --attention 4+1020 --at 1000 50000 --minutes 10
    torchrun --nproc-per-node 4 eval.py lengths --lengths 65536 262144     4 GPUs share each text, by ring attention

The model is chosen as in sample.py. `--attention` lists what is compared: `full`; S+W, a window of W tokens with S sinks
(StreamingLLM, arXiv 2309.17453); `blockwise`, each half of the trained length sees itself and the one before (LeX,
arXiv 2212.10554); `recompute+W`, each token predicted from a fresh pass over the W before it, the slow way that
streaming stands in for, at sampled positions; without it the model as it is.
Results go to evals/<name>.json, after each of them, and .png. Needs matplotlib for the picture.

Under torchrun every rank holds its part of each text, and the numbers are those of one process: perplexity and lengths
are one pass over the whole text, passkey reads its prompts so. What ranks cannot share is refused.
"""

import importlib.util
import itertools
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from data.loader import sample_rng
from data.passkey.task import HELD_OUT, Task, passkey
from data.tokenizer import Tokenizer
from kernels import linear_cross_entropy
from kernels.ring import shard_positions, shard_sequence, unshard_sequence
from model import GPT
from sample import SHIPPED, all_ranks, find_model, load, scaling_fields, size
from train import Place

RESULTS = Path("evals")


@dataclass
class Common:
    # a run folder, a step folder, or a name under runs/
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(
        metavar="[RUN]", constructor=str, help_behavior_hint="(default: the run saved last)")] = None
    model: str | None = None  # a pretrained model instead of a run: its folder or hub id
    attention: list[str] = field(default_factory=lambda: ["as-is"])  # as-is, full, blockwise, S+W (sinks, window), recompute+W
    name: str | None = None  # of the result's files in evals/ (default: the command and the model)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on capable CUDA, else float32


@dataclass
class Chunked(Common):
    chunk: int = 1024  # tokens per pass


@dataclass
class Perplexity(Chunked):
    """Perplexity per token and per word, bits per byte, by position in the text, with the memory that it took."""

    text: list[str] = field(default_factory=lambda: ["data/sample/test"])  # files, or folders of .txt files
    tokens: int = 20000  # of the texts, joined, each followed by the end-of-text token
    bins: int = 20  # rows of the table by position
    samples: int = 100  # positions at which recompute+W is evaluated, evenly spread; the others are compared there too


@dataclass
class Stream(Chunked):
    """Speed and memory of streaming: parallel passes against token by token, decoding early and late, and for minutes."""

    text: list[str] = field(default_factory=lambda: ["data/sample/test"])  # files, or folders of .txt files
    at: list[int] = field(default_factory=lambda: [1000, 50000])  # tokens of text before the timed decoding
    new_tokens: int = 100  # decoded at each
    minutes: float = 0.0  # then stream on for so long, and watch the memory
    transformers: bool = False  # also time generate() of transformers (installed by you) on the same folder


@dataclass
class Lengths(Common):
    """Perplexity of the same tokens with more and more text before them, and copying from so far back."""

    text: list[str] = field(default_factory=lambda: ["data/sample/test"])  # files, or folders of .txt files
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096])  # tokens that the model sees
    # of rotary models, for the longest length: as-is, default (no scaling), linear, ntk, dynamic, yarn, ..., JSON or a file
    scaling: list[str] = field(default_factory=lambda: ["as-is"])
    alibi_scale: float | None = None  # factor on ALiBi's slopes: 0.25 makes four times the length look trained
    windows: int = 20  # places of the texts, evenly spread, each inside one file
    targets: int = 256  # tokens of each that are predicted, its last: the same at every length
    copy: int = 64  # the window ends with a copy of its first so many tokens (0: no copying)
    batch_size: int = 4  # windows at a time: what fits in memory


@dataclass
class Passkey(Chunked):
    """The passkey task (data/passkey/task.py): a five-digit key said once in a long text, to be said again at its end."""

    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])  # tokens, prompt and answer together
    depths: list[float] = field(default_factory=lambda: [0, 0.5, 1])  # where the key is: 0 first, 1 last in the text
    samples: int = 20  # keys for each length and depth
    batch_size: int = 20  # of them at a time: what fits in memory
    seed: int = 1  # of the keys, none of which a training's samples are drawn with
    memory: bool = True  # --no-memory closes the gates of infini layers (beta -inf): exact attention alone is left
    diagnose: bool = False  # also how much of what infini layers' memories hold for the answer's queries is the needle


def choose(opt: Common, place: Place) -> tuple[str, dict]:
    """The folder or hub id of the model, and the result to fill. ValueError, SystemExit."""
    for attention in opt.attention:
        overrides(attention)  # before any work
    if opt.name is not None and "/" in opt.name:
        raise SystemExit(f"--name {opt.name} is the stem of files in {RESULTS}/: leave the / away")
    if slow := [x for x in opt.attention if x.startswith("recompute+")] if not isinstance(opt, Perplexity) else []:
        raise SystemExit(f"--attention {slow[0]} keeps no state to stream with: leave it to eval.py perplexity")
    if isinstance(opt, Stream) and opt.transformers and importlib.util.find_spec("transformers") is None:
        raise SystemExit("--transformers needs a package that is not installed: pip install transformers")
    if opt.run is not None and opt.model is not None:
        raise SystemExit(f"run {opt.run} and --model {opt.model}: give one of them")
    if place.world > 1:
        check_ranks(opt, place.world)
    name = str(find_model(opt.run, opt.model) or SHIPPED)
    ranks = dict(ranks=place.world) if place.world > 1 else {}
    return name, dict(command=type(opt).__name__.lower(), options=asdict(opt), model=name, **ranks, variants=[])


def check_ranks(opt: Common, ranks: int):
    """SystemExit for what several ranks have no use for: they share the tokens of one pass."""
    fresh = next((x for x in opt.attention if x.startswith("recompute+")), None)
    chunk = getattr(opt, "chunk", Chunked.chunk)
    for wrong, what, why in (
            (isinstance(opt, Stream), "eval.py stream", "a stream is one token after another: leave torchrun away"),
            (fresh, f"--attention {fresh}", "its passes are short and stand alone: leave it or torchrun away"),
            (chunk != Chunked.chunk, f"--chunk {chunk}", "a text is read in one pass: leave it or torchrun away"),
            (getattr(opt, "diagnose", False), "--diagnose", "it needs all keys in one place: leave it or torchrun away")):
        if wrong:
            raise SystemExit(f"{what} with {ranks} ranks: {why}")


def each_model(opt: Common, place: Place, name: str, **fields) -> Iterator[tuple[str, GPT, Tokenizer]]:
    """
    Each of opt.attention, with the model whose attention it is, where to compute, and its tokenizer. `fields` replace
    more of its GPTConfig. ValueError for a model whose sequences several ranks cannot share, SystemExit.
    """
    for attention in opt.attention:
        kept = {key: x for key, x in fields.items() if (attention, key) != ("blockwise", "block_size")}  # its blocks are halves
        model, tokenizer = load(name, overrides(attention) | kept)
        model.sequence_parallel(place.group)
        yield attention, model.to(place.device, place.dtype), tokenizer


def stem_of(opt: Common, name: str) -> str:
    """evals/<name>, or evals/<command>-<the model's last two folders>."""
    return str(RESULTS / (opt.name or "-".join([type(opt).__name__.lower(), *Path(name).resolve().parts[-2:]])))


def save(opt: Common, result: dict, place: Place):
    if place.rank:
        return
    RESULTS.mkdir(exist_ok=True)
    Path(f"{stem_of(opt, result['model'])}.json").write_text(json.dumps(result, indent=1))


def read_texts(paths: list[str]) -> Iterator[str]:
    """The texts of files, and of folders of .txt files, in the order of their names. SystemExit."""
    files = [f for path in map(Path, paths) for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if not files:
        raise SystemExit(f"no .txt files in {' '.join(paths)}: give --text a file")
    for path in files:
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise SystemExit(f"cannot read {path}: {e}") from None


def read_tokens(paths: list[str], tokenizer, n: int) -> tuple[torch.Tensor, int, int]:
    """The first n tokens of the texts -> ids (n,), and the words and bytes they hold. SystemExit if there are fewer."""
    ids = []
    for text in read_texts(paths):
        ids += [*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eot]
        if len(ids) >= n:
            break
    if len(ids) < n:
        raise SystemExit(f"{' '.join(paths)} holds {len(ids)} tokens, --tokens is {n}: use more text or --tokens {len(ids)}")
    text = tokenizer.decode(ids[1:n])  # the targets'
    return torch.tensor(ids[:n]), len(text.split()), len(text)


def overrides(attention: str) -> dict:
    """"4+1020" -> the fields of GPTConfig that make it so. SystemExit when it cannot be read."""
    if attention == "as-is":
        return {}
    if attention == "full" or re.fullmatch(r"recompute\+[1-9]\d*", attention):
        return dict(attention="full")
    if attention == "blockwise":
        return dict(attention="blockwise")
    if match := re.fullmatch(r"(\d+)\+(\d+)", attention):
        return dict(attention="window", sinks=int(match[1]), window=int(match[2]))
    raise SystemExit(f"--attention {attention}: write as-is, full, blockwise, SINKS+WINDOW as in 4+1020, or "
                     "recompute+WINDOW")


def memory_now(device: torch.device) -> int:
    """Bytes of GPU memory in tensors, or of this process in memory; 0 on a CPU without /proc."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@torch.no_grad()
def of_last(model: GPT, x: torch.Tensor, y: torch.Tensor, score: Callable, alone: bool = False) -> torch.Tensor:
    """
    What score(hidden (B, m, C), y (B, m)) -> (B, m) gives for the last n tokens of x (B, T), each with its own of
    y (B, n), after one pass over x from position 0: (B, n) float32 on the CPU. The ranks of the model's ring share x,
    each scores the tokens that it holds, and all get the result; with `alone` each does it by itself.
    """
    before = x.shape[1] - y.shape[1]
    if model.ring is None or alone:
        return score(model.hidden(x, alone=True)[:, before:], y).float().cpu()
    x, y = (shard_sequence(whole, *model.ring) for whole in (x, F.pad(y, (before, 0))))
    mine = shard_positions(x.shape[1], *model.ring, x.device) >= before
    hidden, scores = model.hidden(x)[:, mine], torch.zeros(x.shape, device=x.device)
    if hidden.shape[1]:
        scores[:, mine] = score(hidden, y[:, mine]).float()
    return unshard_sequence(scores, *model.ring)[:, before:].cpu()


def nll_of(model: GPT) -> Callable:
    """For of_last: the nll of y."""
    return lambda hidden, y: linear_cross_entropy(hidden, model.output_weight, y, reduction="none")


# ----------------------------------------------------------------------------------------------------------------------
# perplexity


@torch.no_grad()
def stream_nll(model: GPT, ids: torch.Tensor, chunk: int, title: str = "") -> tuple[torch.Tensor, list[dict]]:
    """
    ids (n,) -> nll (n - 1,) float32 on the CPU, of each token after the first given all that the model's state holds
    of those before it; and after each chunk the position, the state's bytes and the process's.
    """
    state, parts, memory = model.new_state(1), [], []
    device = model.wte.weight.device
    for at in tqdm(range(0, len(ids) - 1, chunk), title, unit="chunk", leave=False, disable=None):
        x, y = ids[at:at + chunk][:len(ids) - 1 - at].to(device), ids[at + 1:at + chunk + 1].to(device)
        parts.append(model(x[None], y[None], state=state, reduction="none")[1][0].float().cpu())
        memory.append(dict(position=state.position, state=state.nbytes, process=memory_now(device)))
    return torch.cat(parts), memory


@torch.no_grad()
def recompute_nll(model: GPT, ids: torch.Tensor, window: int, positions: list[int], title: str = "") -> torch.Tensor:
    """nll (len(positions),) of the tokens after `positions`, each from a fresh pass over the `window` tokens up to it."""
    device, parts = model.wte.weight.device, []
    for p in tqdm(positions, title, unit="pass", leave=False, disable=None):
        x = model.hidden(ids[max(0, p + 1 - window):p + 1][None].to(device))[:, -1]
        logits = F.linear(x, model.output_weight.to(x.dtype)).float()
        parts.append(F.cross_entropy(logits, ids[p + 1:p + 2].to(device)).cpu())
    return torch.stack(parts)


def shared_nll(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """stream_nll's nll, by one pass that the ranks of a ring share. ValueError for a number that they cannot share."""
    ranks, n = model.ring.group.size(), len(ids) - 1
    if n % (multiple := model.config.shard_multiple(ranks)):
        low = n // multiple * multiple + 1
        raise ValueError(f"--tokens {n + 1} with {ranks} ranks and attention {model.config.attention}: all but the last are "
                         f"read, and must be a multiple of {multiple}: use --tokens "
                         f"{f'{low} or ' if low > 1 else ''}{low + multiple}")
    ids = ids[None].to(model.wte.weight.device)
    return of_last(model, ids[:, :-1], ids[:, 1:], nll_of(model))[0]


def perplexity(opt: Perplexity, place: Place) -> dict:
    """Evaluates and prints each of opt.attention -> what the JSON file holds. ValueError, SystemExit."""
    name, result = choose(opt, place)
    edges = torch.linspace(0, opt.tokens - 1, opt.bins + 1).round().long().tolist()
    samples = result["samples"] = torch.linspace(
        opt.tokens // (2 * opt.samples), opt.tokens - 2, opt.samples).long().tolist()
    for attention, model, tokenizer in each_model(opt, place, name):
        ids, words, nbytes = read_tokens(opt.text, tokenizer, opt.tokens)
        began, variant = time.perf_counter(), dict(attention=attention)
        if attention.startswith("recompute+"):
            nll = recompute_nll(model, ids, int(attention.split("+")[1]), samples, attention)
            variant |= dict(ppl_at_samples=math.exp(nll.mean()), tok_per_s=len(samples) / (time.perf_counter() - began),
                            standard_error=float(nll.std() / len(nll)**0.5), sample_nll=nll.tolist())
        else:
            nll, memory = (stream_nll(model, ids, opt.chunk, attention) if model.ring is None else
                           (shared_nll(model, ids), []))
            variant |= dict(
                tok_per_s=len(nll) / (time.perf_counter() - began), ppl=math.exp(nll.double().mean()),
                second_half=math.exp(nll[len(nll) // 2:].double().mean()), word_ppl=math.exp(nll.double().sum() / words),
                bits_per_byte=float(nll.double().sum()) / math.log(2) / nbytes,
                ppl_at_samples=math.exp(nll[samples].mean()), sample_nll=nll[samples].tolist(),
                by_position=[dict(start=a, end=b, ppl=math.exp(nll[a:b].double().mean()))
                             for a, b in itertools.pairwise(edges)], memory=memory)
        result["variants"].append(variant)
        save(opt, result, place)
        print(f"{attention:>16}  " + "  ".join(f"{key} {variant[key]:.4g}" for key in (
            "ppl", "second_half", "word_ppl", "bits_per_byte", "ppl_at_samples", "tok_per_s") if key in variant), flush=True)
    streams = [v for v in result["variants"] if "by_position" in v]
    for i in range(opt.bins if streams else 0):
        print(f"{edges[i]:>8}..{edges[i + 1]:<8}" + "".join(f"{v['by_position'][i]['ppl']:>12.3f}" for v in streams))
    return result


def draw_perplexity(result: dict, axes):
    """Perplexity and memory by position, on two axes."""
    for variant in result["variants"]:
        name = variant["attention"]
        if "by_position" in variant:
            middle = [(b["start"] + b["end"]) / 2 for b in variant["by_position"]]
            axes[0].plot(middle, [b["ppl"] for b in variant["by_position"]], label=name)
            at = [m["position"] for m in variant["memory"]]
            for key in ("process", "state") if at else ():
                axes[1].plot(at, [m[key] / 2**20 for m in variant["memory"]], label=f"{key}, {name}")
        else:
            base = next((v for v in result["variants"] if "by_position" in v), None)
            if base is None:
                continue
            # few tokens say little by themselves; their difference from a stream's at the same ones says much
            difference = torch.tensor(variant["sample_nll"]) - torch.tensor(base["sample_nll"])
            n = min(6, len(difference))
            for i, (at, d) in enumerate(zip(torch.tensor(result["samples"]).tensor_split(n), difference.tensor_split(n))):
                middle = float(at.double().mean())
                ppl = next(b["ppl"] for b in base["by_position"] if middle <= b["end"]) * math.exp(d.mean())
                axes[0].plot(middle, ppl, "kx", label=f"{name}, paired" if i == 0 else None)
    axes[0].set(xlabel="position in the text, tokens", ylabel="perplexity", yscale="log")
    axes[1].set(xlabel="position in the text, tokens", ylabel="memory, MiB", ylim=(0, None))


# ----------------------------------------------------------------------------------------------------------------------
# streaming


def decode_speeds(model: GPT, states: list, tokens: list, n: int) -> list[float]:
    """
    Tokens per second of n greedy steps from each state, in turns of ten, so that all meet the same moods of the
    machine; the median turn counts.
    """
    turns = [[] for _ in states]
    steps = [model.generate(token, None, state, temperature=0) for token, state in zip(tokens, states)]
    for step in steps:
        next(step)
    for _ in range(max(1, n // 10)):
        for i, step in enumerate(steps):
            began = time.perf_counter()
            for _ in range(10):
                next(step).item()
            turns[i].append(10 / (time.perf_counter() - began))
    return [sorted(x)[len(x) // 2] for x in turns]


def transformers_speed(folder: str, ids: torch.Tensor, n: int, place) -> float:
    """Tokens per second of n greedy tokens by transformers' generate after `ids` (T,), the prompt's pass subtracted."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=place.dtype).to(place.device).eval()
    seconds = []
    for new in (1, n + 1):
        began = time.perf_counter()
        model.generate(ids[None].to(place.device), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        seconds.append(time.perf_counter() - began)
    return n / (seconds[1] - seconds[0])


def watch(model: GPT, state, token, minutes: float) -> list[dict]:
    """Streams for `minutes` -> every few seconds the position, tokens per second and the process's bytes."""
    points, began = [], time.perf_counter()
    last, n = began, 0
    for token in model.generate(token, None, state, temperature=1.0, seed=1):
        token.item()
        n, now = n + 1, time.perf_counter()
        done = now - began >= 60 * minutes
        if done or now - last >= 5:
            points.append(dict(seconds=now - began, position=state.position, tok_per_s=n / (now - last),
                               process=memory_now(token.device), state=state.nbytes))
            last, n = now, 0
        if done:
            return points


@torch.no_grad()
def stream(opt: Stream, place: Place) -> dict:
    """Times and prints each of opt.attention -> what the JSON file holds. ValueError, SystemExit."""
    name, result = choose(opt, place)
    for attention, model, tokenizer in each_model(opt, place, name):
        ids = read_tokens(opt.text, tokenizer, max(max(opt.at), 8 * opt.chunk) + 1)[0].to(place.device)
        variant = dict(attention=attention, state=model.new_state(1).nbytes)
        rates = {}
        for kind, n, chunk in (("parallel", 8 * opt.chunk, opt.chunk), ("token by token", 200, 1)):
            stream_nll(model, ids[:2 * chunk + 1], chunk)
            began = time.perf_counter()
            stream_nll(model, ids[:n + 1], chunk)
            rates[kind] = n / (time.perf_counter() - began)
        variant["perplexity_tok_per_s"] = rates
        print(f"{attention}: state {size(variant['state'])}; perplexity of a text, tok/s: "
              + ", ".join(f"{kind} {rate:.1f}" for kind, rate in rates.items())
              + f" ({rates['parallel'] / rates['token by token']:.0f}x)", flush=True)
        states = [model.new_state(1) for _ in opt.at]
        for state, at in zip(states, opt.at):
            for chunk in ids[:at].split(opt.chunk):
                model.hidden(chunk[None], state=state)
        tokens = [ids[None, at:at + 1] for at in opt.at]
        speeds = decode_speeds(model, states, tokens, opt.new_tokens)
        variant["decode_tok_per_s"] = dict(zip(map(str, opt.at), speeds))
        print(f"{attention}: decode, tok/s: " + ", ".join(f"{speed:.2f} after {at}" for at, speed in zip(opt.at, speeds)))
        if opt.transformers:
            variant["transformers_tok_per_s"] = transformers_speed(name, ids[:opt.at[0]], opt.new_tokens, place)
            print(f"transformers: decode, tok/s: {variant['transformers_tok_per_s']:.2f} after {opt.at[0]}", flush=True)
        if opt.minutes:
            variant["watch"] = points = watch(model, states[-1], tokens[-1], opt.minutes)
            third = max(1, len(points) // 3)
            print(f"{attention}: {opt.minutes:g} minutes, {points[-1]['position'] - points[0]['position']} tokens: process "
                  f"{size(max(p['process'] for p in points[:third]))} at most in the first third, "
                  f"{size(max(p['process'] for p in points[-third:]))} in the last", flush=True)
        result["variants"].append(variant)
        save(opt, result, place)
    return result


def draw_stream(result: dict, axes):
    """Speed and memory by minutes of streaming, on two axes."""
    for variant in result["variants"]:
        points = variant.get("watch", [])
        minutes = [p["seconds"] / 60 for p in points]
        axes[0].plot(minutes, [p["tok_per_s"] for p in points], label=variant["attention"])
        axes[1].plot(minutes, [p["process"] / 2**20 for p in points], label=f"process, {variant['attention']}")
        axes[1].plot(minutes, [p["state"] / 2**20 for p in points], label=f"state, {variant['attention']}")
    axes[0].set(xlabel="minutes of streaming", ylabel="tokens per second", ylim=(0, None))
    axes[1].set(xlabel="minutes of streaming", ylabel="memory, MiB", ylim=(0, None))


# ----------------------------------------------------------------------------------------------------------------------
# lengths


def read_windows(paths: list[str], tokenizer: Tokenizer, n: int, length: int) -> torch.Tensor:
    """(n, length) int64: n runs of `length` tokens, each inside one text, evenly spread over all there are. SystemExit."""
    texts = [torch.tensor(tokenizer.encode(text), dtype=torch.int64) for text in read_texts(paths)]
    places = np.cumsum([max(0, len(text) - length + 1) for text in texts])  # in this text and those before it
    if places[-1] < n:
        raise SystemExit(f"{' '.join(paths)}: {places[-1]} place(s) for {n} windows of {length} tokens inside one text, the "
                         f"longest has {max(map(len, texts))}: use a longer --text, fewer --windows or a smaller length")
    windows = []
    for i in range(n):
        place = int((2 * i + 1) * places[-1]) // (2 * n)
        which = int(np.searchsorted(places, place, side="right"))
        text, at = texts[which], place - int(places[which - 1] if which else 0)
        windows.append(text[at:at + length])
    return torch.stack(windows)


@torch.no_grad()
def last_nll(model: GPT, windows: torch.Tensor, targets: int, prefix: list[int], batch_size: int,
             title: str | None = None) -> torch.Tensor:
    """
    nll (n, targets) float32 on the CPU of the last `targets` tokens of windows (n, length + 1), each in one pass over
    its first `length` tokens, at positions 0 .. length - 1; `prefix`, what the tokenizer puts before every text, takes
    the place of the first ones. Without a title no progress is shown.
    """
    device, parts = model.wte.weight.device, []
    for ids in tqdm(windows.split(batch_size), title, unit="batch", leave=False, disable=True if title is None else None):
        x, y = ids[:, :-1].clone(), ids[:, -targets:].to(device)
        x[:, :len(prefix)] = torch.tensor(prefix, dtype=x.dtype)
        parts.append(of_last(model, x.to(device), y, nll_of(model)))
    return torch.cat(parts)


@torch.no_grad()
def copied(model: GPT, windows: torch.Tensor, n: int, prefix: list[int], batch_size: int) -> tuple[float, float]:
    """
    How much of a text is copied from where it stood before: in windows (N, length), with `prefix` as in last_nll, the
    last n tokens are replaced by the first n -> the fraction of the second half of these that are the likeliest tokens;
    and that of the same tokens when the model sees nothing but the n: what it would have guessed anyway.
    """
    device, half, right = model.wte.weight.device, n // 2, torch.zeros(2)

    def is_likeliest(hidden, y):
        return F.linear(hidden, model.output_weight.to(hidden.dtype)).argmax(-1) == y

    for ids in windows.split(batch_size):
        first = ids[:, len(prefix):len(prefix) + n]
        start = torch.tensor(prefix, dtype=ids.dtype).expand(len(ids), -1)
        seen = torch.cat([start, ids[:, len(prefix):-n], first], 1)
        y = F.pad(first[:, -half:], (0, 1)).to(device)  # nothing follows the last token, which is not counted
        for i, x in enumerate((seen, torch.cat([start, first], 1))):
            right[i] += of_last(model, x.to(device), y, is_likeliest, alone=i == 1)[:, :-1].sum()
    return tuple((right / (len(windows) * half)).tolist())


def compare_lengths(opt: Lengths, place: Place) -> dict:
    """Evaluates and prints each of opt.scaling with each of opt.attention -> what the JSON holds. ValueError, SystemExit."""
    name, result = choose(opt, place)
    lengths = sorted(set(opt.lengths))
    for what, least in (("targets", opt.targets), ("copy", 2 * opt.copy)):
        if lengths[0] < least:
            raise SystemExit(f"--lengths {lengths[0]} with --{what} {getattr(opt, what)}: the shortest must be at least {least}, "
                             f"or --{what} at most {lengths[0] // (2 if what == 'copy' else 1)}")
    if opt.copy == 1:
        raise SystemExit("--copy 1: it must be 0, or at least 2: the second half of the copied tokens is what counts")
    alibi = {} if opt.alibi_scale is None else dict(alibi_scale=opt.alibi_scale)
    fields = {scaling: alibi | ({} if scaling == "as-is" else scaling_fields(scaling, name, lengths[-1]))
              for scaling in opt.scaling}  # before any work
    windows = None
    print(f"perplexity of {opt.targets} tokens in {opt.windows} places after so many, these included" + (
        f"; percent of {opt.copy // 2} tokens\ncopied right from the window's start, and guessed right without it"
        if opt.copy else "") + f"\n{'tokens':>24}" + "".join(f"{n:>11}" for n in lengths))
    for scaling in opt.scaling:
        for attention, model, tokenizer in each_model(opt, place, name, **fields[scaling]):
            for n in lengths if model.ring is not None else []:
                model.config.check_shards(n, place.world)
            windows = read_windows(opt.text, tokenizer, opt.windows, lengths[-1] + 1) if windows is None else windows
            stem = Path(scaling).stem if os.path.isfile(scaling) else scaling
            label = stem if attention == "as-is" else f"{stem}, {attention}"
            nbytes = int(tokenizer.token_nbytes[windows[:, -opt.targets:]].sum())
            variant = dict(label=label, scaling=scaling, attention=attention,
                           rope_scaling=model.config.rope_scaling, cells=[])
            result["variants"].append(variant)
            for n in lengths:
                args = tokenizer.prefix, opt.batch_size
                nll = last_nll(model, windows[:, -n - 1:], opt.targets, *args, f"{label}, {n}").double()
                variant["cells"].append(dict(
                    length=n, ppl=math.exp(nll.mean()), bits_per_byte=float(nll.sum()) / math.log(2) / nbytes,
                    window_nll=nll.mean(1).tolist()))
                if opt.copy:
                    share = copied(model, windows[:, -n:], opt.copy, *args)
                    variant["cells"][-1] |= dict(copied=share[0], guessed=share[1])
                save(opt, result, place)
            print(f"{label:>24}" + "".join(f"{c['ppl']:>11.4g}" for c in variant["cells"]), flush=True)
            if opt.copy:
                shares = [f"{100 * c['copied']:.0f} ({100 * c['guessed']:.0f})" for c in variant["cells"]]
                print(f"{'copied (guessed), %':>24}" + "".join(f"{x:>11}" for x in shares), flush=True)
    return result


def draw_lengths(result: dict, axes):
    """Perplexity by length, a line for each variant; and what it copied, or without that its bits per byte."""
    copying = result["options"]["copy"] > 0
    for variant in result["variants"]:
        n = [c["length"] for c in variant["cells"]]
        line, = axes[0].plot(n, [c["ppl"] for c in variant["cells"]], "o-", label=variant["label"])
        second = [100 * c["copied"] if copying else c["bits_per_byte"] for c in variant["cells"]]
        axes[1].plot(n, second, "o-", color=line.get_color(), label=variant["label"])
    if copying:
        guessed = result["variants"][0]["cells"]
        axes[1].plot([c["length"] for c in guessed], [100 * c["guessed"] for c in guessed], "k:", label="guessed, unseen")
    axes[0].set(ylabel=f"perplexity of the last {result['options']['targets']} tokens", yscale="log")
    axes[1].set(ylabel="tokens copied right, percent" if copying else "bits per byte", ylim=(0, None))
    from matplotlib.ticker import LogFormatter, NullLocator
    for which in ("major", "minor"):  # 150, not 1.5 x 10^2
        getattr(axes[0].yaxis, f"set_{which}_formatter")(LogFormatter(minor_thresholds=(2, 0.7)))
    for ax in axes:
        ax.set(xlabel="tokens that the model sees", xscale="log")
        ax.set_xticks(n, labels=map(str, n))
        ax.xaxis.set_minor_locator(NullLocator())


# ----------------------------------------------------------------------------------------------------------------------
# passkey


@contextmanager
def needle_shares(model: GPT, state, task: Task):
    """
    Yields a list that has, once `state` has gone through B tasks laid out like `task` and their answers, one tensor
    (B, H) for each infini layer and each query that predicts a part of the answer:

        sigma(q) . (sum of sigma(k) over the needle's tokens in the memory) / (sigma(q) . z),    sigma = elu + 1,

    the needle's part of the normaliser; by the linear rule that is its weight in the average of values that is read.
    """
    shares, layers = [], [(block.attn, cache) for block, cache, kind in zip(
        model.blocks, state.layers, model.config.layer_kinds) if kind == "infini"]

    def watch(attn, cache):
        """Adds the share of each answer's position in one layer; -> the hook's handle."""
        keys = []

        def after(_, __, qkv):
            B, T, _ = qkv.shape
            H, G, at = attn.n_head, attn.n_kv_head, state.position
            q, k, _ = qkv.view(B, T, H + 2 * G, attn.head_dim).split([H, G, G], dim=2)
            k = k[:, max(0, task.needle.start - at):max(0, task.needle.stop - at)]
            q, k = (F.elu(x.float()) + 1 for x in attn.memory_inputs(q[:, -1:], k))
            keys.append(k)
            if at >= len(task.prompt) - 1:
                written = max(0, at - at % attn.segment - task.needle.start)  # of the needle's tokens
                needle = torch.cat(keys, 1)[:, :written].sum(1)  # (B, G, D)
                q = q.view(B, G, H // G, attn.head_dim)
                part, total = (torch.einsum("bgrd,bgd->bgr", q, x.float()).flatten(1) for x in (needle, cache.z))
                shares.append(part / total.clamp(min=1e-30))

        return attn.wqkv.register_forward_hook(after)

    handles = [watch(*layer) for layer in layers]
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def answers(model: GPT, tasks: list[Task], opt: Passkey, vocab_size: int,
            title: str = "") -> tuple[list[list[int]], int, torch.Tensor | None]:
    """
    The likeliest tokens, one at a time, after the whole prompts, opt.chunk tokens of each in a pass, or all that ranks
    can share: as many as the true answer has. The tasks are laid out alike -> ids of each answer, bytes of the state of
    one sequence and, with opt.diagnose, needle_shares averaged over the answer, (B, infini layers, H).
    """
    prompts = torch.from_numpy(np.stack([task.prompt for task in tasks])).to(model.wte.weight.device)
    state, n = model.new_state(len(tasks)), len(tasks[0].answer)
    with needle_shares(model, state, tasks[0]) if opt.diagnose else nullcontext() as shares:
        if model.ring is None:
            for part in tqdm(prompts[:, :-1].split(opt.chunk, dim=1), title, unit="chunk", leave=False, disable=None):
                model.hidden(part, state=state)
            prompts = prompts[:, -1:]
        made = list(model.generate(prompts, n, state, temperature=0, vocab_size=vocab_size, cuda_graphs=False))
    shares = torch.stack(shares, 1).unflatten(1, (n, -1)).mean(1).cpu() if opt.diagnose else None
    return torch.stack(made, 1).tolist(), state.nbytes // len(tasks), shares


def score(model: GPT, tokenizer, opt: Passkey, length: int, depth: float, title: str) -> dict:
    """
    opt.samples tasks of one length and depth, the same keys at every depth -> fractions of keys and of digits right.
    Most tokenizers say every key in equally many tokens; where not, those laid out alike are batched.
    """
    tasks = [passkey(tokenizer, length, depth, sample_rng(opt.seed, HELD_OUT + length, i)) for i in range(opt.samples)]
    began, exact, digits, shares = time.perf_counter(), 0, 0, []
    for n in sorted({len(task.prompt) for task in tasks}):
        same = [task for task in tasks if len(task.prompt) == n]
        for i in range(0, len(same), opt.batch_size):
            batch = same[i:i + opt.batch_size]
            made, nbytes, share = answers(model, batch, opt, tokenizer.vocab_size, f"{title}, {length} at depth {depth:g}")
            shares.append(share)
            for task, ids in zip(batch, made):
                key, said = tokenizer.decode(task.answer)[1:], tokenizer.decode(ids)[1:]
                exact += said == key
                digits += sum(a == b for a, b in zip(key, said)) / len(key)
    return dict(length=length, depth=depth, exact=exact / opt.samples, digits=digits / opt.samples, state=nbytes,
                tok_per_s=length * opt.samples / (time.perf_counter() - began),
                **(dict(needle_share=torch.cat(shares).mean(0).tolist()) if opt.diagnose else {}))


def evaluate_passkey(opt: Passkey, place: Place) -> dict:
    """Evaluates and prints each of opt.attention -> what the JSON file holds. ValueError, SystemExit."""
    name, result = choose(opt, place)
    for attention, model, tokenizer in each_model(opt, place, name):
        for depth in opt.depths:  # before any work
            shortest = passkey(tokenizer, min(opt.lengths), depth, sample_rng(0, 0, 0))
        least = 0 if model.ring is None else model.config.shard_multiple(place.world) + 1
        if len(shortest.prompt) < least:
            raise SystemExit(f"--lengths {min(opt.lengths)} with {place.world} ranks: its prompts of {len(shortest.prompt)} "
                             f"tokens are too short to share, which takes {least}: use --lengths "
                             f"{least + min(opt.lengths) - len(shortest.prompt)} or more")
        infini = [block.attn for block, kind in zip(model.blocks, model.config.layer_kinds) if kind == "infini"]
        if not infini and (opt.diagnose or not opt.memory):
            raise SystemExit(f"--{'diagnose' if opt.diagnose else 'no-memory'} with attention {model.config.attention} of "
                             f"{name}: only infini layers have a memory; leave it away")
        for attn in infini if not opt.memory else []:
            attn.beta.data.fill_(-math.inf)
        result["variants"].append(dict(attention=attention, cells=[]))
        print(f"{attention}{'' if opt.memory else ', no memory'}: right keys and digits, in percent of {opt.samples} keys\n"
              f"{'tokens':>9}" + "".join(f"{f'depth {d:g}':>16}" for d in opt.depths) + f"{'state':>12}{'tok/s':>10}")
        for length in opt.lengths:
            cells = []
            for depth in opt.depths:
                cells.append(score(model, tokenizer, opt, length, depth, attention))
                result["variants"][-1]["cells"].append(cells[-1])
                save(opt, result, place)
            print(f"{length:>9}" + "".join(f"{100 * c['exact']:>9.0f}{100 * c['digits']:>7.0f}" for c in cells)
                  + f"{size(cells[-1]['state']):>12}{cells[-1]['tok_per_s']:>10.0f}", flush=True)
            for c in cells if opt.diagnose else []:
                print(f"{'':>9} needle share at depth {c['depth']:g}, mean and best head of each infini layer: "
                      + "  ".join(f"{sum(heads) / len(heads):.2g} {max(heads):.2g}" for heads in c["needle_share"]))
    return result


def draw_passkey(result: dict, axes):
    """Keys and digits right by length, a line for each attention and depth, on two axes."""
    for variant in result["variants"]:
        for depth in result["options"]["depths"]:
            cells = sorted((c for c in variant["cells"] if c["depth"] == depth), key=lambda c: c["length"])
            for ax, what in zip(axes, ("exact", "digits")):
                ax.plot([c["length"] for c in cells], [100 * c[what] for c in cells], "o-",
                        label=f"{variant['attention']}, depth {depth:g}")
    for ax, what in zip(axes, ("keys", "digits")):
        ax.set(xlabel="length, tokens", ylabel=f"{what} right, percent", ylim=(-3, 103))
        ax.set_xscale("log", base=2)


# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    """The command line (argv: without the program's name). SystemExit, one line, for a user's mistake."""
    opt = tyro.extras.subcommand_cli_from_dict(
        {"perplexity": Perplexity, "lengths": Lengths, "passkey": Passkey, "stream": Stream}, prog="eval.py", args=argv,
        description=__doc__)
    for name, least in dict(tokens=2, bins=1, samples=1, chunk=1, new_tokens=10, minutes=0, batch_size=1, seed=0, windows=1,
                            targets=1, copy=0).items():
        if getattr(opt, name, least) < least:
            raise SystemExit(f"{name} is {getattr(opt, name)}: it must be at least {least}")
    if getattr(opt, "seed", 0) >= 2**63:
        raise SystemExit(f"seed is {opt.seed}: it must be below 2^63")
    for name in ("attention", "at", "text", "lengths", "scaling", "depths"):
        if getattr(opt, name, True) == []:
            raise SystemExit(f"--{name} without a value: give one, or leave it away")
    evaluate, draw = {Perplexity: (perplexity, draw_perplexity), Passkey: (evaluate_passkey, draw_passkey),
                      Lengths: (compare_lengths, draw_lengths), Stream: (stream, draw_stream)}[type(opt)]
    try:
        with all_ranks(opt.device, opt.dtype) as place:
            logging.basicConfig(format="%(message)s")  # to stderr
            logging.getLogger("nanolong").setLevel(logging.INFO)
            result = evaluate(opt, place)
    except ValueError as e:
        raise SystemExit(str(e)) from None
    if place.rank == 0:
        picture(opt, result, draw)


def picture(opt: Common, result: dict, draw: Callable):
    """Draws the result, where there is something to draw and matplotlib to do it, and says what was written."""
    stem = stem_of(opt, result["model"])
    written = [f"{stem}.json"]
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: pip install matplotlib draws it", file=sys.stderr)
    elif not isinstance(opt, Stream) or opt.minutes:
        from matplotlib.figure import Figure
        axes = (figure := Figure(figsize=(11, 4), dpi=120)).subplots(1, 2)
        draw(result, axes)
        for ax in axes:
            if not ax.has_data():
                ax.set_visible(False)
                continue
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small")
        figure.savefig(f"{stem}.png", bbox_inches="tight")
        written.append(f"{stem}.png")
    print(f"wrote {' and '.join(written)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
