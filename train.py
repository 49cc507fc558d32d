"""
The trainer, in one file: one process or torchrun, CPU, MPS or CUDA.

    python train.py                                      a small byte-level model on the sample books, at once
    python train.py config/quickstart.py --lr 1e-3       a config file gives the defaults, options change them
    torchrun --nproc-per-node 8 train.py config/pg19_124m.py
    torchrun --nproc-per-node 8 train.py config/pg19_124m.py --sp 4     4 GPUs share each sequence, by ring attention
    python train.py config/pg19_124m.py --plan           what it takes of memory and network, by ranks; needs no GPU
    python train.py config/quickstart.py --resume=auto   goes on from the latest checkpoint
    python train.py --init-from HuggingFaceTB/SmolLM2-135M --block-size 1024 --attention window
    python train.py --init-from runs/quickstart --pose-target 4096 --rope-scaling yarn      a longer context, by PoSE

Every run writes runs/<name>/: config.json, metrics.jsonl, log.txt, step_*/ checkpoints and at its end loss.png.
SIGTERM and Ctrl-C save a checkpoint at the end of the step and exit with 143 and 130. A user's mistake is one line on
stderr and exit code 1 (2 for a command line that cannot be read). So is a rank that died or does not answer for
--timeout seconds: every other one ends, and says how to go on.

A batch is a pure function of (seed, step, index in the global batch), and nothing else is random once the weights are
drawn: on CPU a resumed run is bit-identical to an uninterrupted one, and the curve does not depend on how many ranks
and micro-steps share a batch, nor on how many ranks share a sequence. On resume the model and the tokenizer must be the
same. What FREE_ON_RESUME lists may change without touching the curve; max_steps may too, and moves the end of the
learning rate's schedule; all else changes the curve from there on, and the log says so.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import platform
import re
import runpy
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from data.loader import Batch, carried_batch, check_length, eval_batches, pose_batch, prefetch, train_batch
from data.passkey.task import PasskeySet
from data.prepare import prepare_folder
from data.pretrained import find_folder, load_fields
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import DataError, TokenFile
from kernels.backend import use_triton
from model import GPT, GPTConfig, read_rope_scaling

log = logging.getLogger("nanolong")  # the kernels' too: everything said goes to stdout and to the run's log.txt
Data = tuple[TokenFile | PasskeySet, TokenFile | PasskeySet, Tokenizer]
Flag = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --x or --no-x; None: neither was given


@dataclass
class TrainConfig:
    name: str | None = None  # the run's folder under --out (default: the config file's name and the time)
    out: str = "runs"  # where the runs' folders are
    resume: str | None = None  # auto: the latest checkpoint of --name, or of the latest run; or a step_ folder
    max_steps: int = 1000  # optimizer steps
    log_every: int = 10  # steps between lines
    eval_every: int = 200  # steps between evaluations (0: only at the end)
    eval_tokens: int = 65536  # how many tokens of the validation set are evaluated, always its first
    save_every: int = 500  # steps between checkpoints (0: only at the end)
    keep: int = 2  # checkpoints kept, the newest
    wandb: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works)

    data: str = "data/sample"  # folder of {train,validation}.<tokenizer>.tokens, or data/passkey: the passkey task
    tokenizer: str | None = None  # byte, gpt2 or the path of a tokenizer.json (default: byte, or init_from's)
    vocab_multiple: int | None = None  # a new model's vocabulary is the tokenizer's, rounded up to this (default: 64)
    mask_documents: bool = False  # attention stays inside a document; without it batches span documents freely
    answer_only: Flag = None  # of data/passkey: only the key's second mention and the answer are learnt (default: yes)
    # infini: sequences read books on and on, and find the memory of the one before; validation starts from empty ones
    carry_memory: bool = False
    # PoSE: block_size tokens of a document train positions 0 to pose_target - 1; validation is plain windows all the same
    pose_target: int | None = None
    pose_chunks: int | None = None  # pieces that skip ahead, 1 (plain windows) to block_size (default: 2)
    pose_content_skip: Flag = None  # the text skips too, not only the positions (default: yes)
    seed: int = 1  # of the initial weights and of the batches

    init_from: str | None = None  # start from these weights: a run or step_ folder, a Hugging Face folder or hub id
    n_layer: int | None = None  # blocks (default: 4, or init_from's)
    n_head: int | None = None  # query heads (default: 4, or init_from's)
    n_kv_head: int | None = None  # key/value heads (default: n_head, or init_from's; fewer is GQA)
    n_embd: int | None = None  # width (default: 192, or init_from's)
    head_dim: int | None = None  # of each head (default: n_embd / n_head, or init_from's)
    n_inner: int | None = None  # width of the MLP (default: 4 n_embd, about 8/3 n_embd for swiglu, or init_from's)
    block_size: int | None = None  # tokens per training sequence (default: 256, or init_from's)
    attention: str | None = None  # full, window, infini, blockwise or a pattern: window,full (default: full, or init_from's)
    window: int | None = None  # keys that a window layer's query sees (default: block_size - sinks, or init_from's)
    sinks: int | None = None  # first tokens, which window layers see always (default: 4, or init_from's)
    segment: int | None = None  # tokens of an infini layer's segment (default: block_size / 16, or init_from's)
    memory_rule: str | None = None  # of infini layers, delta or linear (default: delta, or init_from's)
    memory_beta: float | None = None  # of new infini gates; sigmoid(beta) is the memory's share (default: 0)
    memory_norm: float | None = None  # RMSNorm of the memory's queries and keys; its weights start here (default: none)
    sink_logit: Flag = None  # a learned logit per head in the softmax's denominator (default: no, or init_from's)
    sink_tokens: int | None = None  # learned vectors in front of every sequence (default: 0, or init_from's)
    position: str | None = None  # rope, xpos, alibi or none (default: rope, or init_from's)
    rope_base: float | None = None  # larger turns slower: for longer context (default: 10000, or init_from's)
    rope_fraction: float | None = None  # of each head that is rotated (default: 1, or init_from's)
    # a family (linear, ntk, yarn, ...), JSON, or a JSON file's path; a config file may give a dict (default: init_from's).
    # Where no factor is given it is pose_target, or block_size without, over the length that init_from was trained at
    rope_scaling: str | None = None
    alibi_scale: float | None = None  # on alibi's slopes (default: 1, or init_from's)
    norm: str | None = None  # rmsnorm or layernorm (default: rmsnorm, or init_from's)
    norm_eps: float | None = None  # under the norm's square root (default: 1e-5, or init_from's)
    mlp: str | None = None  # swiglu or gelu (default: swiglu, or init_from's)
    bias: Flag = None  # in linear layers and layernorms (default: no, or init_from's)
    parallel_residual: Flag = None  # attention and MLP side by side, not in turn (default: no, or init_from's)
    tie_embeddings: Flag = None  # the output layer is the token embedding (default: yes, or init_from's)

    batch_size: int = 16  # sequences per rank (per group of sp ranks) and micro-step: what fits in memory
    batch_tokens: int | None = None  # tokens per optimizer step (default: one micro-step of every rank)
    sp: int = 1  # ranks that share each sequence, by ring attention: block_size / sp tokens on each
    fsdp: bool = False  # weights, gradients and optimizer are spread over all ranks: for a model that does not fit
    timeout: int = 600  # seconds to wait for another rank before giving up; saving a checkpoint must be faster
    lr: float = 2e-3  # peak learning rate
    warmup_steps: int = 50  # the learning rate rises linearly in them
    schedule: Literal["cosine", "wsd"] = "cosine"  # then: cosine, or constant with a linear decay at the end
    final_lr: float = 0.1  # learning rate at max_steps, as a fraction of lr
    wsd_decay: float = 0.2  # fraction of max_steps in which wsd decays
    gate_lr: float | None = None  # learning rate of the infini gates and of memory_norm, in lr (default: 30)
    weight_decay: float = 0.1  # of matrices only
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations (auto: bfloat16 on CUDA that has it)
    compile: bool = field(default_factory=torch.cuda.is_available)  # torch.compile; on by default where CUDA is
    # recompute blocks in the backward pass, or segments if all layers are infini: less memory, more time
    activation_checkpointing: bool = False
    plan: bool = False  # only print what a step takes of memory and network, with 1 to 1024 ranks per sequence (plan.py)
    plan_gpu: str = "H100"  # for these GPUs: their memory, speed and links
    plan_bandwidth: float | None = None  # GB/s from a rank to the next (default: those of that GPU)


FREE_ON_RESUME = {"name", "out", "resume", "log_every", "eval_every", "eval_tokens", "save_every", "keep", "wandb",
                  "init_from", "batch_size", "sp", "fsdp", "timeout", "device", "compile",
                  "activation_checkpointing", "plan", "plan_gpu", "plan_bandwidth"}  # batch_tokens counts
MINIMUM = dict(max_steps=1, gate_lr=0, log_every=1, eval_every=0, eval_tokens=1, save_every=0, keep=1, vocab_multiple=1,
               batch_size=1, sp=1, timeout=1, lr=0, warmup_steps=0, final_lr=0, wsd_decay=0, weight_decay=0, grad_clip=0,
               pose_target=1, pose_chunks=1)
NEW_MODEL = dict(n_layer=4, n_head=4, n_embd=192, block_size=256)  # for the rest: GPTConfig


def parse(args: list[str]) -> tuple[TrainConfig, str]:
    """[config/x.py] --option value ... -> the configuration, a stem for the run's name. ValueError, SystemExit."""
    config, stem = TrainConfig(), "train"
    if args and not args[0].startswith("-"):
        path, args = Path(args[0]), args[1:]
        config, stem = load_config(path), path.stem
    for arg in args:
        if arg.endswith(".py") and Path(arg).is_file():
            raise ValueError(f"the config file comes first, then the options: python train.py {arg} ...")
    config = tyro.cli(TrainConfig, prog="train.py [config/x.py]", default=config, args=args,
                      description="Trains a GPT. A config file gives the defaults, options change them.")
    for name, least in MINIMUM.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    for name, default in (("plan_gpu", TrainConfig.plan_gpu), ("plan_bandwidth", None)):
        if not config.plan and getattr(config, name) != default:
            raise ValueError(f"{name} is {getattr(config, name)}, which training has no use for: add --plan, or leave it away")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}: it must be in [0, 2^63)")
    return config, stem


def load_config(path: Path) -> TrainConfig:
    """The TrainConfig that a file like config/quickstart.py calls `config`."""
    if not path.is_file() or path.suffix != ".py":
        known = " ".join(map(str, sorted(Path("config").glob("*.py"))))
        raise ValueError(f"no such config file: {path}; there are: {known or 'none in config/'}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as e:  # it is the user's file: a misspelt field is a TypeError
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from None
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path} must say: from train import TrainConfig; config = TrainConfig(...)")
    if isinstance(config.rope_scaling, dict):  # text, as on the command line
        config = replace(config, rope_scaling=json.dumps(config.rope_scaling))
    return config


@dataclass
class Place:
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    reasons: list[str]  # one line each: device, dtype, compile
    sp: int = 1  # ranks that share a sequence: dp groups of sp neighbours
    group: dist.ProcessGroup | None = None  # those that share this rank's sequences, where sp > 1

    @property
    def dp(self) -> int:
        return self.world // self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp


def choose_place(config: TrainConfig) -> Place:
    """Picks device and dtype and says why; rank and world are torchrun's. ValueError when they cannot be had."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world % config.sp:
        most = max(n for n in range(1, world + 1) if world % n == 0 and n <= config.sp)
        raise ValueError(f"sp is {config.sp}, which does not divide {world} rank(s): use --sp {most}, or torchrun "
                         f"--nproc-per-node {-(-world // config.sp) * config.sp}")
    if config.fsdp and world == 1:
        raise ValueError("fsdp with 1 rank: there is nobody to share the weights with; leave --fsdp away, or use torchrun "
                         "--nproc-per-node 2")
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available() and world == 1, cpu=True)
    kind, why = config.device, f"--device {config.device}"
    if kind == "auto":
        kind = next(name for name in has if has[name])
        why = dict(cuda="a GPU is there", mps="no CUDA, but Apple's GPU", cpu="no GPU is there")[kind]
    if not has[kind]:
        raise ValueError(f"--device {kind}, but torch {torch.__version__} finds none for {world} rank(s) here: "
                         "use --device cpu or auto")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU of its own, this machine has {torch.cuda.device_count()}: "
                         f"torchrun --nproc-per-node {torch.cuda.device_count()}")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    name = f"{torch.get_num_threads()} threads" if kind == "cpu" else platform.machine()
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        name = torch.cuda.get_device_name(device)
    dtype, because = getattr(torch, config.dtype, None), f"--dtype {config.dtype}"
    if dtype is None:
        bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if bf16 else torch.float32
        because = "this GPU has it in hardware" if bf16 else "bfloat16 is for GPUs that have it in hardware"
    return Place(rank, world, device, dtype, [
        f"device: {kind}, {name}, {world} rank(s) ({why})",
        f"dtype: {str(dtype)[6:]} activations, float32 weights ({because})",
        "compile: on (the first step takes a while)" if config.compile else "compile: off (the default without CUDA)"],
        config.sp)


def connect(config: TrainConfig, place: Place):
    """Makes the process groups: that of all ranks and, with sp, place.group. Nobody waits for longer than --timeout."""
    if place.world == 1:
        return
    kind, timeout = place.device.type, timedelta(seconds=config.timeout)
    # gloo carries small numbers between CPUs: agreeing on them never waits for a GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timeout)
    if place.sp > 1:
        # the rows of a (dp, sp) mesh; init_device_mesh would wait for gloo's 30 minutes, its groups take no timeout
        place.group, _ = dist.new_subgroups(place.sp, timeout=timeout)
    total(place, 0)  # nobody may leave with an error before all have connected


def total(place: Place, *values: float) -> list[float]:
    """Each value summed over the ranks, in float64, on CPUs; also a barrier."""
    t = torch.tensor(values, dtype=torch.float64)
    if place.world > 1:
        dist.all_reduce(t)
    return t.tolist()


def from_rank0(place: Place, function, *args):
    """function(*args), called on rank 0 only: every rank gets what it returns, or raises its ValueError or OSError."""
    result = [None]
    if place.rank == 0:
        try:
            result = [function(*args)]
        except (ValueError, OSError) as e:
            result = [e]
    if place.world > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], (ValueError, OSError)):
        raise result[0]
    return result[0]


def choose_model(config: TrainConfig) -> tuple[TrainConfig, GPTConfig, Tokenizer, Path | None]:
    """-> config with all that it leaves open of the model and the tokenizer, these two, and init_from's folder."""
    given = {f.name: value for f in fields(GPTConfig) if (value := getattr(config, f.name, None)) is not None}
    base, folder, name = NEW_MODEL, None, config.tokenizer or "byte"
    if config.init_from is not None:
        folder = [find_folder(config.init_from), *checkpoints(Path(config.init_from), MODEL_FILES)][-1]
        base = load_fields(folder)[0]
        name = str(config.tokenizer or base.get("tokenizer") or folder / "tokenizer.json")
        base.pop("tokenizer", None)
    tokenizer = load_tokenizer(name)
    multiple = config.vocab_multiple or (64 if config.init_from is None else None)
    if multiple is not None:
        given["vocab_size"] = math.ceil(tokenizer.vocab_size / multiple) * multiple
    own = (base.get("rope_scaling") or {}) if config.init_from is not None else {}
    if config.pose_target is not None and config.block_size is None:  # what PoSE taught is no length to train on
        given["block_size"] = min(base["block_size"], own.get("original_max_position_embeddings", base["block_size"]))
    sizes = dict(sinks=GPTConfig.sinks) | base | given
    if config.rope_scaling is not None:
        given["rope_scaling"] = read_rope_scaling(config.rope_scaling, (base if config.init_from else sizes)["block_size"],
                                                  own, config.pose_target or sizes["block_size"])
    if "window" not in base.get("attention", "full"):
        given.setdefault("window", max(1, sizes["block_size"] - sizes["sinks"]))
    if "infini" not in base.get("attention", "full"):
        given.setdefault("segment", max(1, sizes["block_size"] // 16))
    c = GPTConfig(**base | given)
    check_used(config, c)
    for option in ("memory_beta", "memory_norm") if "infini" in base.get("attention", "full") else ():
        if given.get(option, base[option]) != base[option]:
            raise ValueError(f"{option} is {given[option]}, but {config.init_from} has learnt it, from {base[option]}: leave "
                             f"{option} away")
    if tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"tokenizer {name} has {tokenizer.vocab_size} ids, {config.init_from} has a vocabulary of "
                         f"{c.vocab_size}: use the --tokenizer that it was trained with")
    if config.mask_documents and "window" in c.attention and c.sinks > c.sink_tokens:
        raise ValueError(f"mask_documents with sinks {c.sinks} and sink_tokens {c.sink_tokens}: the sinks would be the "
                         f"first document's tokens; use --sinks {c.sink_tokens} or --sink-tokens {c.sinks}")
    if config.sp > 1:
        c.check_shards(c.block_size, config.sp)
    resolved = {f.name: getattr(c, f.name) for f in fields(GPTConfig) if hasattr(config, f.name)}
    c = replace(c, block_size=config.pose_target or c.block_size)  # the model's: the length that it has learnt
    return replace(config, tokenizer=name, vocab_multiple=multiple, **resolved), c, tokenizer, folder


def check_used(config: TrainConfig, c: GPTConfig):
    """ValueError, one line, for an option that this model or this data has no use for, or that excludes another."""
    window, infini, passkey = "window" in c.attention, "infini" in c.attention, is_passkey(config)
    model = f"attention {c.attention} with position {c.position}"
    for option, used, what in (("window", window, model), ("sinks", window, model), ("segment", infini, model),
                               ("memory_rule", infini, model), ("memory_beta", infini, model), ("memory_norm", infini, model),
                               ("gate_lr", infini, model),
                               ("rope_base", c.rotary, model), ("rope_fraction", c.rotary, model),
                               ("answer_only", passkey, f"data {config.data}"),
                               ("pose_chunks", config.pose_target is not None, "training without pose_target"),
                               ("pose_content_skip", config.pose_target is not None, "training without pose_target")):
        if not used and getattr(config, option) is not None:
            raise ValueError(f"{option} is {getattr(config, option)}, but {what} has no use for it: change that, leave {option} "
                             f"away, or give it as None where a config file sets it")
    if infini and c.segment >= c.block_size:
        raise ValueError(f"segment {c.segment} with block_size {c.block_size}: no sequence would read its memory; use --segment "
                         f"{max(1, c.block_size // 16)}, 16 in a sequence, or --block-size {16 * c.segment}")
    if config.carry_memory:
        for wrong, why in ((set(c.layer_kinds) != {"infini"}, f"attention {c.attention}: every layer must be infini"),
                           (c.block_size % c.segment, f"block_size {c.block_size} and segment {c.segment}: sequences must be "
                            "whole segments"),
                           (config.mask_documents, "mask_documents: each sequence is inside one document already"),
                           (passkey, "data/passkey: no task goes on from another"),
                           ((config.sp > 1 or config.fsdp) and config.activation_checkpointing, f"activation_checkpointing, sp "
                            f"{config.sp} and fsdp {config.fsdp}: only whole sequences and weights recompute by segments; leave "
                            "one of them away")):
            if wrong:
                raise ValueError(f"carry_memory with {why}")
    if config.pose_target is not None:
        for wrong, why in ((config.pose_target < c.block_size, f"block_size {c.block_size}: the target is the longer one; use "
                            f"--pose-target {16 * c.block_size}, 16 times as long, or --block-size {config.pose_target} at most"),
                           (c.position != "rope", f"position {c.position}: only those of rope can skip; use "
                            "--position rope, or leave pose_target away"),
                           (set(c.layer_kinds) != {"full"}, f"attention {c.attention}: only full attention meets distances "
                            "that long; use --attention full, or leave pose_target away"),
                           ((config.pose_chunks or 2) > c.block_size, f"pose_chunks {config.pose_chunks or 2} and block_size "
                            f"{c.block_size}: a chunk has a token at least; use --pose-chunks {c.block_size} at most"),
                           (config.pose_target > c.reach, f"rope_scaling {c.rope_scaling}, which reaches {c.reach} tokens; name "
                            "a family and its factor is chosen: --rope-scaling yarn"),
                           (c.rope_type == "dynamic", "rope_scaling dynamic: it goes by the length of a "
                            "text, which PoSE's sequences do not have; use --rope-scaling ntk, the same for one length"),
                           (config.mask_documents, "mask_documents: each sequence is inside one document already"),
                           (passkey, "data/passkey: a task's place is its text's, which must not skip")):
            if wrong:
                raise ValueError(f"pose_target {config.pose_target} with {why}")
    if passkey and config.mask_documents:
        raise ValueError("mask_documents with data/passkey: each sequence is one document already; leave it away")


def is_passkey(config: TrainConfig) -> bool:
    return Path(config.data).resolve() == Path(__file__).resolve().parent / "data" / "passkey"


def open_data(config: TrainConfig, place: Place, tokenizer: Tokenizer) -> Data:
    """The training and validation sets and their tokenizer; the sample set is prepared on first use."""
    if is_passkey(config):
        tasks = PasskeySet(tokenizer, answer_only=config.answer_only is not False)
        tasks.check_length(config.block_size)
        return tasks, tasks, tokenizer
    paths = [Path(config.data) / f"{split}.{tokenizer.tag}.tokens" for split in ("train", "validation")]
    sample = Path(__file__).resolve().parent / "data" / "sample"
    if Path(config.data).resolve() == sample:  # does nothing where they are up to date
        from_rank0(place, prepare_folder, sample, sample, tokenizer.name)
    try:
        train, validation = (TokenFile(path, tokenizer.vocab_size, tokenizer.tag) for path in paths)
    except ValueError as e:  # a token file's name tells which tokenizer.json made it, not where that is
        raise ValueError(str(e).replace("PATH/tokenizer.json", tokenizer.name)) from None
    check_length(train, config.block_size, "carry_memory" if config.carry_memory else
                 "pose_target" if config.pose_target is not None else None)
    if validation.n_tokens < 2:
        raise ValueError(f"{validation.path} holds {validation.n_tokens} tokens: evaluation needs 2 at least")
    return train, validation, tokenizer


def resolve_batch(config: TrainConfig, dp: int) -> tuple[int, int]:
    """-> tokens per optimizer step, micro-steps per rank. ValueError with the nearest choice if they do not divide."""
    micro = config.batch_size * config.block_size * dp
    tokens = micro if config.batch_tokens is None else config.batch_tokens
    if tokens < 1 or tokens % micro:
        low, high = tokens // micro * micro, (max(0, tokens) // micro + 1) * micro
        ranks = "ranks" if config.sp == 1 else f"groups of {config.sp} ranks"
        raise ValueError(f"batch_tokens {tokens} is not a multiple of batch_size x block_size x {ranks} = "
                         f"{config.batch_size} x {config.block_size} x {dp} = {micro}: the nearest is "
                         f"--batch-tokens {f'{low} or {high}' if low > 0 else high}")
    return tokens, tokens // micro


def lr_factor(config: TrainConfig, step: int) -> float:
    """The learning rate of `step` (from 0) as a fraction of its peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        fallen = 0.5 * (1 - math.cos(math.pi * done))
    else:
        fallen = max(0.0, 1 - (config.max_steps - step) / max(1.0, config.wsd_decay * config.max_steps))
    return 1 - (1 - config.final_lr) * fallen


def shard(batch: Batch, model: GPT, place: Place) -> Batch:
    """With sequence parallelism this rank's part of each sequence of the batch."""
    if place.sp == 1:
        return batch
    if batch.docs is not None and model.config.by_length:
        batch = batch.count_documents()
    return batch.shard(*model.ring)


@torch.no_grad()
def evaluate(model: GPT, validation: TokenFile | PasskeySet, token_nbytes: np.ndarray, config: TrainConfig,
             place: Place) -> dict:
    """Loss on the fixed validation tokens, summed over all ranks: nats per token and bits per byte of text."""
    nll, tokens, nbytes = 0.0, 0, 0
    args = config.block_size, config.batch_size, config.eval_tokens, place.dp_rank, place.dp
    for batch in validation.eval_batches(*args) if isinstance(validation, PasskeySet) else \
            eval_batches(validation, *args, config.mask_documents):
        batch = shard(batch, model, place)
        on = batch.to(place.device)
        _, loss = model(on.x, on.y, positions=on.positions, docs=on.docs, reduction="sum")
        nll, tokens = nll + loss.item(), tokens + batch.n_valid
        nbytes += int(token_nbytes[batch.y[batch.y >= 0].numpy()].sum())
    if isinstance(model, FSDPModule):  # which keeps them whole for a backward pass
        model.reshard()
    nll, tokens, nbytes = total(place, nll, tokens, nbytes)
    return dict(val_loss=nll / tokens, val_bits_per_byte=nll / math.log(2) / max(1, nbytes), val_tokens=int(tokens))


MODEL_FILES = ("config.json", "model.safetensors")
CHECKPOINT_FILES = (*MODEL_FILES, "optimizer.safetensors", "train.json")


def checkpoints(run: Path, files: tuple = CHECKPOINT_FILES) -> list[Path]:
    """The checkpoints of a run, oldest first: a folder is called step_* only when all of it is on the disk."""
    return sorted(p for p in run.glob("step_*") if all((p / name).is_file() for name in files))


def find_run(config: TrainConfig, stem: str) -> tuple[Path, Path | None]:
    """-> the run's folder, the checkpoint to go on from or None. ValueError naming what there is when it is not."""
    out = Path(config.out)
    if config.name is not None and (config.name == ".." or config.name != Path(config.name).name):
        raise ValueError(f"--name {config.name!r} is not a folder's name; --out says where the runs are")
    if config.resume is None:
        run = out / (config.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        if run.exists():
            raise ValueError(f"{run} exists: go on with it by --resume=auto, or give this run another --name")
        return run, None
    there = sorted(out.glob("*/step_*/train.json"), key=lambda path: path.stat().st_mtime)
    known = "with checkpoints: " + (" ".join(sorted({p.parent.parent.name for p in there})) or f"none in {out}")
    if config.resume == "auto":
        run = out / config.name if config.name else there[-1].parent.parent if there else None
        if run is None or not run.is_dir():
            raise ValueError(f"no such run: {run or 'none at all'}; {known}")
        return run, (checkpoints(run) or [None])[-1]
    folder = Path(os.path.abspath(config.resume))
    if folder not in checkpoints(folder.parent):
        raise ValueError(f"{folder} is no step_* folder with {', '.join(CHECKPOINT_FILES)}; {known}")
    run = out / config.name if config.name else Path(os.path.relpath(folder.parent))
    if run.exists() and checkpoints(run.absolute())[-1:] != [folder]:
        raise ValueError(f"{run} has gone on from {folder.name}: resume its latest by --name={run.name} --resume=auto, "
                         "or give what starts there another --name")
    return run, folder


def open_run(run: Path, config: TrainConfig, step: int, memory: MemoryHandler):
    """Makes or reopens the run's folder: config.json; log.txt, to which `memory` brings the lines so far and from then
    on each at once; metrics.jsonl without what came after `step`."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(asdict(config), indent=2))
    metrics = run / "metrics.jsonl"
    if metrics.exists():
        kept = []
        for line in metrics.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a killed run's last line may be half a line
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        metrics.write_text("".join(kept))
    memory.setTarget(logging.FileHandler(run / "log.txt"))
    memory.capacity = 1
    memory.flush()


def start_wandb(run: Path, config: TrainConfig):
    """Weights & Biases' run, with its files in `run`. ValueError, one line and no folder left, when it cannot start."""
    import wandb
    new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(project="nanolong", name=run.name, dir=str(run), config=asdict(config))
    except wandb.Error as e:
        if new:
            shutil.rmtree(run)
        raise ValueError(f"--wandb: {' '.join(str(e).split())}; without an account: WANDB_MODE=offline") from None


def data_identity(data: Data) -> dict:
    """What a checkpoint keeps of the data, to tell on resume whether they are still the same."""
    sizes = {} if isinstance(data[0], PasskeySet) else dict(train_tokens=len(data[0]), validation_tokens=len(data[1]))
    return dict(**sizes, tokenizer_tag=data[2].tag)


def gather(model: GPT, optimizer: torch.optim.AdamW, carried: list, place: Place) -> tuple[GPT, dict[str, torch.Tensor]]:
    """
    What a checkpoint holds, however many ranks share it: the model, and the optimizer's state with what carry_memory takes
    on. All ranks call it together; what fsdp spreads is in one piece afterwards, on rank 0's CPU, and on no other rank.
    """
    names = {p: name for name, p in model.named_parameters()}
    state = {f"{key}.{names[p]}": x for p, s in optimizer.state.items() for key, x in s.items()}
    if isinstance(model, FSDPModule):
        with torch.device("meta"):
            plain = GPT(model.config)
        weights, state = (in_one_piece(tensors, place) for tensors in (model.state_dict(), state))
        model = plain
        if place.rank == 0:
            model.load_state_dict(weights, assign=True)
    return model, state | gather_memory(carried, place)


def in_one_piece(tensors: dict[str, torch.Tensor], place: Place) -> dict[str, torch.Tensor]:
    """The tensors on rank 0's CPU, gathered one after another; none on the others."""
    kept = {}
    for name, x in tensors.items():
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        if place.rank == 0:
            kept[name] = whole.cpu()
    return kept


def save_checkpoint(run: Path, step: int, model: GPT, state: dict[str, torch.Tensor], config: TrainConfig, progress: dict,
                    tokenizer: Tokenizer):
    """Writes run/step_<step>/, whole in itself, onto the disk, then gives it its name and drops all but `keep`."""
    folder = run / f"step_{step:07d}"
    tmp = run / f".tmp_{folder.name}"
    for stale in run.glob(".tmp_step_*"):  # a process was killed while it wrote
        shutil.rmtree(stale)
    try:
        model.save_pretrained(str(tmp), extra=None if tokenizer.files else {"tokenizer": tokenizer.name})
        save_file(state, tmp / "optimizer.safetensors")
    except SafetensorError as e:  # a full disk
        raise OSError(f"{tmp} cannot be written: {e}") from None
    for name, content in tokenizer.files.items():
        (tmp / name).write_bytes(content)
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    versions = dict(python=platform.python_version(), torch=torch.__version__, triton=triton, numpy=np.__version__)
    (tmp / "train.json").write_text(json.dumps(dict(step=step, tokens=step * config.batch_tokens, **progress,
                                                    versions=versions, config=asdict(config)), indent=2))
    for path in (*tmp.iterdir(), tmp):
        fsync(path)
    os.rename(tmp, folder)
    fsync(run)
    for old in checkpoints(run)[: -config.keep]:  # renamed first: half a folder must not look like a checkpoint
        shutil.rmtree(old.rename(run / f".tmp_{old.name}"))
    log.info(f"saved {folder}")


def fsync(path: Path):
    """Waits until a file's or a folder's content is on the disk."""
    if os.name == "nt":  # Windows opens no folders, and flushes no file that is open for reading
        return
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def load_checkpoint(folder: Path, wanted: GPTConfig, tokenizer: Tokenizer) -> tuple[GPT, dict, dict]:
    """-> model, optimizer's tensors, train.json. ValueError, one line: damaged, or of another model or tokenizer."""
    older = [p for p in checkpoints(folder.parent) if p.name < folder.name]
    hint = f"an older one: --resume={older[-1]} --name=ANOTHER" if older else "there is no older one"
    try:
        train = json.loads((folder / "train.json").read_text())
        for key, kind in (("step", int), ("config", dict), ("data", dict)):
            if not isinstance(train[key], kind):
                raise ValueError(f"train.json says {key} is {train[key]!r}")
        other = load_tokenizer(json.loads((folder / "config.json").read_text()).get("tokenizer", folder))
        model = GPT.from_pretrained(str(folder))
        tensors = load_file(folder / "optimizer.safetensors")
        for name, p in model.named_parameters():
            for key, shape in ((f"step.{name}", ()), (f"exp_avg.{name}", p.shape), (f"exp_avg_sq.{name}", p.shape)):
                if tensors[key].shape != shape or tensors[key].dtype != torch.float32:
                    raise ValueError(f"optimizer.safetensors: {key} is {tensors[key].dtype} "
                                     f"{tuple(tensors[key].shape)}, expected torch.float32 {tuple(shape)}")
    except (ValueError, SafetensorError, KeyError, TypeError, AttributeError) as e:
        why = f"{e} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())
        raise ValueError(f"checkpoint {folder} is damaged: {why}; {hint}") from None
    differ = [("tokenizer", other.tag, tokenizer.tag)]
    differ += [(f.name, getattr(model.config, f.name), getattr(wanted, f.name)) for f in fields(GPTConfig)]
    differ = [d for d in differ if d[1] != d[2]]
    if differ:
        raise ValueError(f"checkpoint {folder} is of another model than these options make: "
                         + ", ".join(f"{name} {there} there, {here} here" for name, there, here in differ))
    return model, tensors, train


def gather_memory(states: list, place: Place) -> dict[str, torch.Tensor]:
    """What carry_memory takes on, of the whole global batch: {memory.layer.name: (sequences, ...)} on every rank."""
    memory = {}
    for i in range(len(states[0].layers) if states else 0):
        for name in states[0].layers[i].memory:
            mine = torch.cat([state.layers[i].memory[name] for state in states]).cpu()
            whole = mine.new_zeros(place.dp, *mine.shape)
            if place.rank % place.sp == 0:  # all that share a sequence have its memory
                whole[place.dp_rank] = mine
            if place.world > 1:
                dist.all_reduce(whole)
            memory[f"memory.{i}.{name}"] = whole.flatten(0, 1)
    return memory


def new_memory(config: TrainConfig, place: Place, model: GPT, tensors: dict | None) -> list:
    """With carry_memory a state for each micro-step of this rank, empty or as a checkpoint's `tensors` have it; else none."""
    n_micro = resolve_batch(config, place.dp)[1]
    states = [model.new_state(config.batch_size) for _ in range(n_micro)] if config.carry_memory else []
    for m, state in enumerate(states):
        first = (place.dp_rank * n_micro + m) * config.batch_size
        for i, layer in enumerate(state.layers):
            for name, x in layer.memory.items():
                saved = (tensors or {}).get(f"memory.{i}.{name}", [])
                if len(saved) == place.dp * n_micro * config.batch_size:
                    x.copy_(saved[first:first + config.batch_size])
    return states


def make_optimizer(model: GPT, config: TrainConfig, tensors: dict | None) -> torch.optim.AdamW:
    """AdamW over the model's groups, each with its own peak learning rate; its state is `tensors` if given."""
    gate_lr = 30.0 if config.gate_lr is None else config.gate_lr
    groups = [group | {"peak_lr": group["lr"]} for group in model.param_groups(config.weight_decay, config.lr, gate_lr)]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    if tensors is not None:
        for name, p in model.named_parameters():
            optimizer.state[p] = {"step": tensors[f"step.{name}"].to(p.device, copy=True)}
            for key in ("exp_avg", "exp_avg_sq"):
                x = tensors[f"{key}.{name}"].to(p.device, copy=True)
                if isinstance(p, DTensor):  # this rank's part
                    x = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
                optimizer.state[p][key] = x
    return optimizer


def spread(model: GPT, config: TrainConfig, place: Place):
    """
    With fsdp each rank keeps its part of the weights, gradients and optimizer's state of every block, and of the rest, by
    FSDP2: a block's weights come together, on the device, while it computes. Gradients are averaged, as by DDP.
    """
    mesh = init_device_mesh(place.device.type, (place.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        if config.compile:
            block.forward = torch.compile(block.forward, dynamic=False)  # what gathers the weights stays outside
    fully_shard(model, mesh=mesh)
    if place.device.type == "cpu":  # gloo's own averages are sums in some versions (pytorch issue 162338)
        for module in (*model.blocks, model):
            module.set_force_sum_reduction_for_comms(True)


def duration(seconds: float) -> str:
    """45s, 2.4m, 3.1h"""
    units = ((3600, "h"), (60, "m"))
    return next((f"{seconds / unit:.1f}{letter}" for unit, letter in units if seconds >= unit), f"{seconds:.0f}s")


def count(n: float) -> str:
    """812, 79.5k, 1.24M"""
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    return next((f"{n / unit:.3g}{letter}" for unit, letter in units if n >= unit), f"{n:.0f}")


# dense bfloat16 FLOP/s from the makers' data sheets; the first key found in the device's name counts
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
              "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def draw(run: Path):
    """The run's pictures, from metrics.jsonl: loss.png, and with infini layers gates.png."""
    if importlib.util.find_spec("matplotlib") is None:
        log.info("no loss.png: pip install matplotlib draws it")
        return
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    draw_curve(run, records)
    if gated := [record for record in records if "gates" in record]:
        draw_gates(run, gated)


def draw_gates(run: Path, records: list[dict]):
    """run/gates.png: at each step a histogram of the infini gates, from exact (0) to memory (1), and the line of each head."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(7, 4), dpi=120)).subplots()
    steps = np.array([record["step"] for record in records])
    gates = np.array([np.ravel(record["gates"]) for record in records])  # (steps, layers * heads)
    counts = np.stack([np.histogram(row, bins=40, range=(0, 1))[0] for row in gates], 1)
    edges = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)
    axes.pcolormesh(edges, np.linspace(0, 1, 41), counts, cmap="Greys", alpha=0.6)
    lines = axes.plot(steps, gates, linewidth=0.8) if gates.shape[1] <= 32 else []
    heads = len(records[0]["gates"][0])
    for i, line in enumerate(lines[:12]):
        line.set_label(f"layer {i // heads} head {i % heads}")
    axes.set(xlabel="step", ylabel="gate: sigmoid(beta), the memory's share", title=run.name, ylim=(0, 1))
    if lines:
        axes.legend(fontsize=7)
    figure.savefig(run / "gates.png", bbox_inches="tight")


def draw_curve(run: Path, records: list[dict]):
    """run/loss.png: training and validation loss against tokens."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(7, 4), dpi=120)).subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(r["tokens"], r[key]) for r in records if key in r and "tokens" in r]
        axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", bbox_inches="tight")


def speed(seconds: float, model: GPT, config: TrainConfig, place: Place) -> dict:
    """A step of `seconds` as ms, tokens/s and, in bfloat16 with a known peak, mfu; on CUDA the most memory so far."""
    record = dict(ms=1e3 * seconds, tokens_per_second=config.batch_tokens / seconds)
    if place.device.type == "cuda":
        name, flops = torch.cuda.get_device_name(place.device), model.flops_per_token(config.block_size)
        peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
        if peak is not None and place.dtype == torch.bfloat16:
            record["mfu"] = record["tokens_per_second"] * flops / (peak * place.world)
        record["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record


def describe(record: dict, config: TrainConfig, eta: float) -> str:
    """A record of metrics.jsonl as one line."""
    columns = dict(loss="loss {:.3f}", val_loss="val {:.3f}", val_bits_per_byte="{:.3f} bits/byte", lr="lr {:.1e}",
                   grad_norm="gnorm {:.2f}", ms="{:.0f} ms", tokens_per_second="{} tok/s", mfu="mfu {:.0%}",
                   memory_gib="{:.1f} GiB")
    shown = {**record, "tokens_per_second": count(record["tokens_per_second"])} if "ms" in record else record
    parts = [text.format(shown[key]) for key, text in columns.items() if key in shown]
    line = " | ".join([f"step {record['step']}/{config.max_steps}", *parts, f"eta {duration(eta)}"])
    return line.replace("e-0", "e-")  # 6.0e-4


def micro_step(forward: torch.nn.Module, batch: Batch, m: int, place: Place, n_valid: float, sync: bool, carried: list):
    """
    Adds the gradient of micro-step m to the parameters' -> its summed nll. The gradient is that of the mean over the
    n_valid targets of the whole global batch; DDP divides by the number of ranks, so the loss is multiplied by it.
    carried: with carry_memory the state of each micro-step, which goes on; no gradient flows into the sequence before.
    sync: whether the ranks' gradients are added up now or, but for fsdp, which would hold all of them, with a later one's.
    """
    on, state = batch.micro(m, place.device), None
    if carried:
        state = carried[m]
        state.position = 0  # infini layers know no positions but those inside a segment
        for layer in state.layers:
            layer.clear(on.begins)
    with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not sync else contextlib.nullcontext():
        _, nll = forward(on.x, on.y, positions=on.positions, docs=on.docs, state=state, reduction="sum")
        (nll * (place.world / n_valid)).backward()
    return nll.detach()


def optimizer_step(forward: torch.nn.Module, optimizer: torch.optim.AdamW, batch: Batch, factor: float, n_valid: float,
                   config: TrainConfig, place: Place, carried: list) -> tuple[torch.Tensor, torch.Tensor]:
    """One step, at `factor` of the peak learning rates -> this rank's summed nll, the gradient's norm."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    last = batch.x.shape[0] - 1
    nll = sum(micro_step(forward, batch, m, place, n_valid, m == last, carried) for m in range(last + 1))
    norm = torch.nn.utils.clip_grad_norm_(forward.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return nll, norm.full_tensor() if isinstance(norm, DTensor) else norm


def finite(model: GPT, place: Place) -> bool:
    """Whether all weights are finite numbers, those that other ranks hold too."""
    mine = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return total(place, not all(p.isfinite().all() for p in mine)) == [0]


def diverged(loss: float, norm: float, finite_weights: bool = True) -> str:
    """What is no finite number after a step, in words: such a step must not be saved. Empty when all is well."""
    for name, value in (("the loss", loss), ("the norm of the gradient", norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    return "" if finite_weights else "the weights are not finite"


def predict(forward: torch.nn.Module, batch: Batch, config: TrainConfig, place: Place, steps: int, carried: list) -> float:
    """Seconds per step, from timed micro-steps on real data; the model and the optimizer stay as they were."""
    times = []
    for _ in range(4):  # the first compiles and warms up
        micro_step(forward, batch, 0, place, batch.y.numel(), False, carried).item()  # waits for the device
        times.append(time.perf_counter())
    forward.zero_grad(set_to_none=True)
    micro = min(times[2] - times[1], times[3] - times[2])
    micro_tokens = config.batch_size * config.block_size * place.dp
    n_evals = 1 + (steps // config.eval_every if config.eval_every else 0)
    evals = n_evals * math.ceil(config.eval_tokens / micro_tokens) / 3  # in micro-steps: no backward pass
    n_micro = config.batch_tokens // micro_tokens
    log.info(f"about {duration((steps * n_micro + evals) * micro)} for {steps} steps")
    return n_micro * micro


def note_signals(world: int) -> list[int]:
    """The list in which SIGTERM and SIGINT are noted, so that training stops at the end of a step. In a process of its
    own the second acts as ever; torchrun forwards the terminal's Ctrl-C, so there it means no more than the first."""
    caught = []

    def catch(number: int, frame):
        caught.append(number)
        if world == 1:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def train(config: TrainConfig, place: Place, run: Path, model: GPT, optimizer: torch.optim.AdamW,
          data: Data, start: int, carried: list, wandb_run) -> tuple[int, str]:
    """Trains from step `start` to max_steps or to a signal, with checkpoints in `run` -> exit code, last words."""
    train_file, validation, tokenizer = data
    steps = range(start, config.max_steps)
    n_micro = resolve_batch(config, place.dp)[1]
    first_sample = place.dp_rank * n_micro * config.batch_size  # of this rank's share of the global batch

    def load(step: int) -> Batch:
        args = config.block_size, config.seed, step, first_sample, n_micro, config.batch_size
        if isinstance(train_file, PasskeySet):
            batch = train_file.train_batch(*args)
        elif carried:
            batch = carried_batch(train_file, *args, n_streams=place.dp * n_micro * config.batch_size)
        elif config.pose_target is not None:
            batch = pose_batch(train_file, *args, config.pose_target, config.pose_chunks or 2,
                               config.pose_content_skip is not False)
        else:
            batch = train_batch(train_file, *args, config.mask_documents)
        batch = shard(batch, model, place)
        return batch.pin() if place.device.type == "cuda" else batch

    forward = model  # what a training step calls; `model` itself is evaluated and saved
    if place.world > 1 and not config.fsdp:
        warnings.filterwarnings("ignore", message="`broadcast_buffers`")  # torch 2.13's new name is not in 2.11
        forward = DistributedDataParallel(model, device_ids=[place.device] if place.device.type == "cuda" else None,
                                          gradient_as_bucket_view=True, broadcast_buffers=False)  # these never change
    seconds = predict(forward, load(start), config, place, len(steps), new_memory(config, place, model, None))  # per step
    began, done, wrong, caught = time.perf_counter(), start, "", note_signals(place.world)
    progress = dict(data=data_identity(data))  # what train.json says besides
    clock = lap = None  # (step, time) of the clock's start and of its last reading
    for step, batch in zip(steps, prefetch(load, steps)):
        next_valid, stopping = total(place, batch.n_valid, bool(caught))
        if stopping:
            if done > start:
                wrong = diverged(total(place, nll.item())[0] / n_valid, norm.item(), finite(model, place))
            break
        n_valid = next_valid
        factor = lr_factor(config, step)
        nll, norm = optimizer_step(forward, optimizer, batch, factor, n_valid, config, place, carried)
        done = step + 1
        if done == start + 3:  # what comes first is not timed: compilation, allocators, caches
            norm.item()  # waits for the device: the clock can be read
            clock = lap = (done, time.perf_counter())
        evaluating, saving, reporting = (done == config.max_steps or every and done % every == 0
                                        for every in (config.eval_every, config.save_every, config.log_every))
        if not (evaluating or saving or reporting):
            continue
        loss = total(place, nll.item())[0] / n_valid
        wrong = diverged(loss, norm.item(), not saving or finite(model, place))
        if wrong:
            break
        record = dict(step=done, tokens=done * config.batch_tokens, loss=loss, lr=config.lr * factor)
        record["grad_norm"] = norm.item()
        if len(gates := model.gates()):
            record["gates"] = (gates.full_tensor() if isinstance(gates, DTensor) else gates).tolist()
        if lap and done > lap[0]:
            now = time.perf_counter()
            record |= speed((now - lap[1]) / (done - lap[0]), model, config, place)
            seconds = (now - clock[1]) / (done - clock[0])  # with evaluation and saving
        if evaluating:
            record |= evaluate(model, validation, tokenizer.token_nbytes, config, place)
        progress |= {key: record[key] for key in ("loss", "val_loss", "val_bits_per_byte") if key in record}
        log.info(describe(record, config, (config.max_steps - done) * seconds))
        kept = gather(model, optimizer, carried, place) if saving else None
        if place.rank == 0:
            with open(run / "metrics.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if wandb_run is not None:
                gates = {f"gate/{i}.{h}": g for i, layer in enumerate(record.get("gates", [])) for h, g in enumerate(layer)}
                wandb_run.log({key: x for key, x in record.items() if key != "gates"} | gates, step=done)
        if saving:
            from_rank0(place, lambda: save_checkpoint(run, done, *kept, config, progress, tokenizer))
        lap = lap and (done, time.perf_counter())
    if wrong:
        return 1, f"{wrong} at step {done}: try a smaller --lr or a longer --warmup-steps"
    if done == config.max_steps:
        if place.rank == 0:
            draw(run)
        return 0, (f"done: {done - start} steps in {duration(time.perf_counter() - began)}, val "
                   f"{record['val_loss']:.4f} nats/token, {record['val_bits_per_byte']:.4f} bits/byte; "
                   f"next: python sample.py {run}")
    if done:
        kept = gather(model, optimizer, carried, place)
        from_rank0(place, lambda: (run / f"step_{done:07d}").exists() or
                   save_checkpoint(run, done, *kept, config, progress, tokenizer))
    number = caught[0] if caught else signal.SIGTERM  # none here: another rank's
    return 128 + number, (f"stopped by {signal.Signals(number).name} after step {done}/{config.max_steps}; to go on, "
                          f"add --name={run.name} --resume=auto to the same command")


def setup(args: list[str], memory: MemoryHandler) -> tuple:
    """Whatever a user's mistake can break breaks here, as a ValueError or OSError in one line -> train's arguments."""
    config, stem = parse(args)
    if config.plan:
        from plan import plan  # not above: it imports this module
        if int(os.environ.get("RANK", 0)) == 0:
            for line in plan(config).splitlines():
                log.info(line)
        sys.exit()
    place = choose_place(config)
    use_triton(torch.empty(0, dtype=place.dtype, device=place.device))  # says which kernels run, or why they cannot
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs a package that is not installed: pip install wandb")
    config, model_config, tokenizer, base = choose_model(config)
    batch_tokens, n_micro = resolve_batch(config, place.dp)
    config = replace(config, batch_tokens=batch_tokens)
    connect(config, place)
    data = open_data(config, place, tokenizer)
    run, checkpoint = from_rank0(place, find_run, config, stem)
    start, tensors, changed = 0, None, []
    if checkpoint is None:
        torch.manual_seed(config.seed)
        model = GPT(model_config) if base is None else GPT.from_pretrained(str(base), **asdict(model_config))
    else:
        model, tensors, saved = load_checkpoint(checkpoint, model_config, tokenizer)
        start = saved["step"]
        if start >= config.max_steps:
            raise ValueError(f"{checkpoint} is at step {start}, --max-steps is {config.max_steps}: nothing is left")
        compared = {"tokenizer"} | {f.name for f in fields(GPTConfig)} - {"block_size"}  # PoSE's model has its target there
        free = FREE_ON_RESUME | compared
        changed = [f"{key} {saved['config'].get(key)} -> {value}" for key, value in asdict(config).items()
                   if key not in free and saved["config"].get(key) != value]
        if config.carry_memory and len(tensors.get("memory.0.M", ())) != batch_tokens // config.block_size:
            changed.append("memories that start empty")
        changed += [f"{key} {saved['data'].get(key)} -> {value}" for key, value in data_identity(data).items()
                    if saved["data"].get(key, value) != value]
    model.compute_dtype = place.dtype if place.dtype != torch.float32 else None
    model.activation_checkpointing = config.activation_checkpointing
    if place.sp > 1:
        model.sequence_parallel(place.group)
    if config.fsdp:
        spread(model, config, place)  # before it is on the device, where it may not fit
    elif config.compile and model.by_segments:
        model._segment_loss = torch.compile(model._segment_loss, dynamic=False)  # the loop over segments stays outside
    elif config.compile:
        model.compile(dynamic=False)  # in place: the names of the weights stay
    model.to(place.device)
    optimizer = make_optimizer(model, config, tensors)
    carried = new_memory(config, place, model, tensors)
    wandb_runs = []  # rank 0's; the run's folder is made last, after all that can fail
    if config.wandb:
        from_rank0(place, lambda: wandb_runs.append(start_wandb(run, config)))
    from_rank0(place, open_run, run, config, start, memory)
    ranks = f"{place.world} rank(s)" if place.sp == 1 else f"{place.dp} group(s) of {place.sp} ranks"
    for line in (f"run: {run}", *place.reasons,
                 *([f"mesh: {place.dp} data-parallel x {place.sp} sequence-parallel, {model.ring.layout}"]
                   if place.sp > 1 else []),
                 *([f"fsdp: {count(sum(p.to_local().numel() for p in model.parameters()))} parameters on this rank"]
                   if config.fsdp else []),
                 f"data: {config.data}, " + ("made as it is read" if is_passkey(config) else
                 f"{count(len(data[0]))} training and {count(len(data[1]))} validation tokens"),
                 f"model: {count(model.num_params())} parameters, {count(model.num_params(embeddings=False))} of them "
                 f"not embeddings; vocabulary {tokenizer.vocab_size} ({config.tokenizer}), in the model "
                 f"{model.config.vocab_size}" + (f"; from {config.init_from}" if config.init_from else ""),
                 f"batch: {batch_tokens} tokens = {ranks} x {n_micro} micro-step(s) x "
                 f"{config.batch_size} sequences x {config.block_size}",
                 *([f"pose: {config.block_size} tokens in {config.pose_chunks or 2} chunk(s) at positions 0 to "
                    f"{config.pose_target - 1}; validation at 0 to {config.block_size - 1}"] if config.pose_target else []),
                 *([f"resume: {checkpoint or 'no checkpoint yet'}, after step {start}"] if config.resume else []),
                 *([f"resume: from here on the curve differs by {', '.join(changed)}"] if changed else [])):
        log.info(line)
    return config, place, run, model, optimizer, data, start, carried, wandb_runs[0] if wandb_runs else None


# what gloo's sockets and timeouts say; NCCL's and the store's errors have types of their own
LOST = re.compile(r"gloo/transport.*(closed|reset|timed ?out|timeout|broken pipe|refused|socket)|timed out waiting", re.I | re.S)


def is_lost(e: RuntimeError) -> bool:
    """Whether this error came from communication: another rank has died, or does not answer."""
    return isinstance(e, dist.DistError) or LOST.search(str(e)) is not None


def give_up(e: RuntimeError, rank: int, run: Path | None, memory: MemoryHandler):
    """Ends this rank with one line about the other that is lost. At once: to close the process groups may take for ever."""
    text = " ".join(str(e).split())
    text = text[text.find("Last error:"):] if "Last error:" in text else text.split(". ")[0]  # NCCL's reason is at the end
    words = f"error on rank {rank}: another rank died or does not answer, or communication failed ({text[:300]})"
    if run is not None:
        words += (f"; the latest checkpoint is {(checkpoints(run) or ['none yet'])[-1]}; to go on, add --name={run.name} "
                  "--resume=auto to the same command")
    log.handlers = [memory]  # log.txt alone
    log.info(words)
    memory.close()
    print(words, file=sys.stderr, flush=True)
    os._exit(1)


class Stdout(logging.StreamHandler):
    """Where the lines go. A reader that has gone (`| head`) ends the run quietly, in training with a checkpoint."""

    def __init__(self):
        super().__init__(sys.stdout)

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            return super().handleError(record)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where all later lines go, Python's last too
        if not callable(signal.getsignal(signal.SIGTERM)):
            sys.exit(128 + signal.SIGPIPE)
        signal.raise_signal(signal.SIGTERM)  # which training notes, to stop at the end of the step


def main(args: list[str] | None = None):
    """One training; `args` default to the command line's. SystemExit unless it reaches max_steps."""
    rank = int(os.environ.get("RANK", 0))
    memory = MemoryHandler(10**6, flushLevel=logging.CRITICAL + 1)  # holds the lines until the run has a folder
    logging.raiseExceptions = False  # a log.txt on a full disk: training matters more
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.handlers = [Stdout(), memory] if rank == 0 else [logging.StreamHandler()]
    try:
        state = setup(sys.argv[1:] if args is None else args, memory)
    except (ValueError, OSError) as e:  # in training a ValueError would be a bug and shows its traceback
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(f"error{f' on rank {rank}' if rank else ''}: {e}")
    except RuntimeError as e:
        if not is_lost(e):
            raise
        give_up(e, rank, None, memory)
    try:
        code, words = train(*state)
        if code == 1 and rank == 0:
            log.handlers = [memory]  # log.txt alone: the same line goes to stderr
        log.info(words)
        if dist.is_initialized():
            total(state[1], 0)  # gloo's threads may abort a process that leaves while others still talk to it
    except (DataError, OSError) as e:  # a full disk; perhaps on this rank alone: torchrun ends the others
        sys.exit(f"error{f' on rank {rank}' if rank else ''}: {e}")
    except RuntimeError as e:
        if not is_lost(e):
            raise
        give_up(e, rank, state[2], memory)
    memory.close()
    if state[-1] is not None:  # wandb's run
        state[-1].finish()
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(f"error: {words}" if code == 1 and rank == 0 else code)


if __name__ == "__main__":
    try:
        from train import main  # config files import TrainConfig from `train`: run that module, not a second copy of it

        main()
    except KeyboardInterrupt:  # before the first step, or the second one
        sys.exit(130)
