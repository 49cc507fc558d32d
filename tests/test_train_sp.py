"""
Training on a mesh of ranks: sequences shared by ring attention (--sp), weights by --fsdp, ranks that die or hang.

The runs that most tests look at are JOBS, made together by one pool of four processes, for a process takes seconds to
start. A job names the pool's processes that take part, so that runs of one process go on side by side.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from data.loader import IGNORE, train_batch
from data.tokens import TokenFile, TokenWriter
from helpers import run_ranks
from kernels.ring import shard_sequence

ROOT = Path(train.__file__).resolve().parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NANOLONG_KERNELS": "reference", "TRITON_INTERPRET": "0"}
TINY = ["--n-layer=2", "--n-head=2", "--n-kv-head=1", "--n-embd=32", "--block-size=64", "--batch-tokens=256",
        "--max-steps=20", "--warmup-steps=4", "--log-every=1", "--eval-every=10", "--eval-tokens=400", "--save-every=10",
        "--keep=9", "--device=cpu", "--no-compile", "--timeout=60"]
SIZES = {1: 2, 2: 1, 4: 1}  # data-parallel groups: sequences per group, so that 1 and 2 of them take two micro-steps
SHORT = ["--max-steps=4", "--save-every=4"]
WINDOW = ["--window=20", "--sinks=3"]
VARIANTS = {
    "full": ["--attention=full"],
    "window": ["--attention=window", *WINDOW, *SHORT],
    "infini": ["--attention=infini", "--segment=16", *SHORT],
    "carried": ["--attention=infini", "--segment=16", "--memory-rule=linear", "--carry-memory"],
    "hybrid": ["--attention=window,full", "--window=20", "--sinks=0", "--mask-documents", "--sink-logit"],
    "mixed": ["--attention=infini,full,window", "--n-layer=3", "--segment=8", *WINDOW, "--activation-checkpointing", *SHORT],
    "pose": ["--attention=full", "--pose-target=256", "--rope-scaling=yarn", *SHORT],
    "lengths": ["--attention=full", "--mask-documents", *SHORT, "--rope-scaling=" + json.dumps(dict(
        rope_type="longrope", factor=2, original_max_position_embeddings=32, short_factor=[1.0] * 8,
        long_factor=[1.0 + i / 4 for i in range(8)]))],
    # so few targets that one of 4 ranks has none
    "passkey": ["--data=data/passkey", "--block-size=320", "--batch-tokens=1280", "--attention=full", *SHORT]}
MESHES = [(1, 2), (1, 4), (2, 2), (4, 1)]


def on(variant, dp, sp, *more, ranks=None, name=None):
    """A job: (the pool's processes, the run's name, its options)."""
    name = name or f"{variant}-{dp}x{sp}"
    options = [f"--batch-size={SIZES[dp]}", f"--sp={sp}", *VARIANTS[variant], f"--name={name}", *more]
    return ranks or range(dp * sp), name, options


def resumed(variant, dp, sp, of, *more):
    name = f"{variant}-{dp}x{sp}-from-{of}"
    return on(variant, dp, sp, f"--resume={{out}}/{variant}-{of}/step_0000010", *more, name=name)


SHOWN = [("hybrid", 1, 2), ("hybrid", 1, 4), ("hybrid", 2, 2), ("hybrid", 4, 1), ("full", 1, 4), ("window", 1, 4),
         ("infini", 1, 4), ("carried", 2, 2), ("mixed", 2, 2), ("pose", 2, 2), ("lengths", 1, 2), ("passkey", 1, 4)]
RESUMED = [("hybrid", 1, 1), ("hybrid", 1, 4), ("carried", 1, 1)]
JOBS = [*(on(variant, 1, 1, ranks=[i % 4]) for i, variant in enumerate(VARIANTS)), *(on(*case) for case in SHOWN),
        *(resumed(variant, dp, sp, "2x2") for variant, dp, sp in RESUMED),
        on("hybrid", 2, 2, "--fsdp", name="hybrid-fsdp"),
        on("infini", 2, 1, "--fsdp", "--activation-checkpointing", name="infini-fsdp"),
        on("hybrid", 1, 2, "--fsdp", "--resume={out}/hybrid-1x4/step_0000010", name="hybrid-fsdp-from-1x4"),
        on("hybrid", 1, 1, "--resume={out}/hybrid-fsdp/step_0000010", name="hybrid-1x1-from-fsdp")]
LONG = [on(variant, *mesh, "--max-steps=20", "--save-every=10", ranks=ranks, name=f"{variant}-long-{mesh[0]}x{mesh[1]}")
        for variant in VARIANTS for mesh, ranks in (((1, 1), [0]), *((mesh, None) for mesh in MESHES))]


def _work(process, n, out, jobs, ports):
    """The jobs of one of run_ranks' processes, each with a process group of its own -> the words with which any failed."""
    dist.destroy_process_group()
    words, sys.stdout, train.draw = {}, open(os.devnull, "w"), lambda run: None
    for (ranks, name, options), port in zip([*jobs, (range(n), None, [])], ports):
        if process not in ranks:
            continue
        rank = list(ranks).index(process)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(ranks)), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        try:
            if name is not None:
                train.main([*TINY, f"--data={out}/data", f"--out={out}", *(x.replace("{out}", str(out)) for x in options)])
        except SystemExit as e:
            words[name] = e.code
    dist.init_process_group("gloo")  # run_ranks wants one back
    return words


def make(out, jobs, n=4):
    """Runs the jobs by n processes, and checks that each ended well."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(len(jobs) + 1)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    assert run_ranks(n, _work, out, jobs, ports, timeout=300) == [{}] * n


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The runs' folder, with a byte-level set of documents of 5 to 400 bytes, and all of JOBS run."""
    out, rng = tmp_path_factory.mktemp("out"), np.random.default_rng(0)
    (out / "data").mkdir()
    for split, n in (("train", 30), ("validation", 8)):
        with TokenWriter(out / "data" / f"{split}.byte.tokens", vocab_size=257, tokenizer="byte") as writer:
            for length in rng.integers(5, 200, n):
                writer.add_document([*np.repeat(rng.integers(97, 123, length), 2), 256])
    make(out, JOBS)
    return out


def records(run):
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def same(ours, theirs, rel=2e-6):
    """Losses, gradients, evaluations and, at the end, weights of two runs are equal, but for float32's order of sums."""
    one, two = records(ours), records(theirs)
    assert set(one) <= set(two) and max(one) == max(two) >= 4
    for step in one:
        for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte", "val_tokens", "tokens"):
            assert (key in one[step]) == (key in two[step])
            if key in one[step]:
                assert one[step][key] == pytest.approx(two[step][key], rel=rel), (step, key)
    one, two = (load_file(train.checkpoints(run)[-1] / "model.safetensors") for run in (ours, theirs))
    assert one.keys() == two.keys()
    one, two = (torch.cat([tensors[name].flatten() for name in sorted(two)]) for tensors in (one, two))
    assert (one - two).norm() <= rel * two.norm()


@pytest.mark.parametrize("variant, dp, sp", SHOWN)
def test_a_mesh_trains_as_one_process(out, variant, dp, sp):
    same(out / f"{variant}-{dp}x{sp}", out / f"{variant}-1x1")


@pytest.mark.parametrize("variant, dp, sp", RESUMED)
def test_a_checkpoint_of_one_mesh_goes_on_on_another(out, variant, dp, sp):
    same(out / f"{variant}-{dp}x{sp}-from-2x2", out / f"{variant}-1x1")
    assert "differs by" not in (out / f"{variant}-{dp}x{sp}-from-2x2" / "log.txt").read_text()


@pytest.mark.slow
def test_every_variant_on_every_mesh(out):
    make(out, LONG)
    for _, name, _ in LONG:
        same(out / name, out / f"{name.rsplit('-', 1)[0]}-1x1")


def test_the_log_says_how_ranks_share(out):
    for name, mesh, batch in (("full-1x4", "mesh: 1 data-parallel x 4 sequence-parallel, zigzag\n", "1 group(s) of 4 ranks x 2"),
                              ("window-1x4", "mesh: 1 data-parallel x 4 sequence-parallel, contiguous\n", " x 2 sequences x 64"),
                              ("hybrid-4x1", "", "4 rank(s) x 1 micro-step(s) x 1 sequences x 64")):
        log = (out / name / "log.txt").read_text()
        assert mesh in log and batch in log and ("mesh" in log) == (mesh != "")
    assert load_file(out / "carried-2x2" / "step_0000010" / "optimizer.safetensors")["memory.1.M"].shape == (4, 1, 16, 16)


# fsdp


def test_fsdp_trains_saves_and_goes_on_as_one_process(out):
    for name in ("hybrid-fsdp", "infini-fsdp", "hybrid-fsdp-from-1x4", "hybrid-1x1-from-fsdp"):
        same(out / name, out / f"{name.split('-')[0]}-1x1")
    gates = [[line.get("gates") for line in records(out / name).values()] for name in ("infini-fsdp", "infini-1x1")]
    assert np.allclose(*gates, atol=1e-6) and np.shape(gates[0]) == (4, 2, 2)
    for name in ("model.safetensors", "optimizer.safetensors"):  # the same files
        one, two = (load_file(out / run / "step_0000010" / name) for run in ("hybrid-fsdp", "hybrid-1x1"))
        assert {key: (x.shape, x.dtype) for key, x in one.items()} == {key: (x.shape, x.dtype) for key, x in two.items()}
    n = sum(x.numel() for x in load_file(out / "hybrid-1x1" / "step_0000010" / "model.safetensors").values())
    assert f"fsdp: {train.count(n / 4)} parameters on this rank" in (out / "hybrid-fsdp" / "log.txt").read_text()


# what a shard is


def test_shards_keep_targets_documents_and_places(out):
    whole = train_batch(TokenFile(out / "data" / "train.byte.tokens"), 64, 1, 0, 0, 2, 3, with_docs=True).count_documents()
    assert (whole.positions[..., 0] == 0).all()
    starts = whole.docs[..., 1:] != whole.docs[..., :-1]
    assert ((whole.positions[..., 1:] == 0) == starts).all()
    assert ((whole.positions[..., 1:] == whole.positions[..., :-1] + 1) == ~starts).all()
    for layout in ("contiguous", "zigzag"):
        groups = [SimpleNamespace(size=lambda: 4, rank=lambda r=r: r) for r in range(4)]
        parts = [whole.shard(group, layout) for group in groups]
        at = torch.cat([shard_sequence(torch.arange(64), group, layout, dim=0) for group in groups])
        for name in ("x", "y", "docs", "positions"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], -1), getattr(whole, name)[..., at])
        assert sum(part.n_valid for part in parts) == whole.n_valid == (whole.y != IGNORE).sum()
        assert all(part.n_valid == (part.y != IGNORE).sum() for part in parts)


@pytest.mark.parametrize("world, options, words", [
    (6, ["--sp=4"], "sp is 4, which does not divide 6 rank(s): use --sp 3, or torchrun --nproc-per-node 8"),
    (4, ["--sp=4", "--block-size=36"], "36 tokens with 4 ranks per sequence"),
    (4, ["--sp=4", "--block-size=48", "--attention=infini", "--segment=8"], "48 tokens with 4 ranks per sequence"),
    (4, ["--sp=2", "--batch-size=3"], "batch_size x block_size x groups of 2 ranks = 3 x 64 x 2 = 384: the nearest is "
                                      "--batch-tokens 384"),
    (2, ["--sp=2", "--attention=infini", "--segment=8", "--carry-memory", "--activation-checkpointing"],
     "carry_memory with activation_checkpointing, sp 2"),
    (1, ["--fsdp"], "fsdp with 1 rank"), (1, ["--sp=0"], "sp is 0"), (1, ["--timeout=0"], "timeout is 0")])
def test_mistakes(world, options, words, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(SystemExit) as exit:
        train.main([*TINY, f"--out={tmp_path}", *options])
    assert words in exit.value.code and "\n" not in exit.value.code


# ranks that are lost


def lose(out, tmp_path, number, dp, *more):
    """The command's end that runs hybrid on dp x 2 ranks, as `lost`; its rank 1 gets a signal at step 13."""
    script = tmp_path / "lose.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
step, steps = train.optimizer_step, []
def lost(*args):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 13:
        os.kill(os.getpid(), {int(number)})
    return step(*args)
train.optimizer_step = lost
train.main(sys.argv[1:])
""")
    _, _, options = on("hybrid", dp, 2, name="lost")
    return [str(script), *TINY, f"--data={out}/data", f"--out={tmp_path}", *options, *more]


def check_words(words, run):
    (line,) = re.findall("error on rank 0: .*", words)
    assert "another rank died or does not answer" in line and f"the latest checkpoint is {run}/step_0000010" in line
    assert line.endswith("to go on, add --name=lost --resume=auto to the same command")
    assert line in (run / "log.txt").read_text()


def test_a_killed_rank_ends_the_job_and_the_run_goes_on_bit_by_bit(out, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           *lose(out, tmp_path, signal.SIGKILL, 1)], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    check_words(done.stderr, tmp_path / "lost")
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
    (tmp_path / "data").symlink_to(out / "data")
    make(tmp_path, [on("hybrid", 1, 2, "--resume=auto", name="lost")], 2)
    keys = ("loss", "grad_norm", "lr", "tokens", "val_loss", "val_bits_per_byte")
    lost, whole = ([[line.get(key) for key in keys] for line in records(run).values()]
                   for run in (tmp_path / "lost", out / "hybrid-1x2"))
    assert lost == whole and len(lost) == 20


def test_a_rank_that_hangs_ends_the_others(out, tmp_path):
    """Rank 0 waits for it in their ring, the other two for both."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        env = {**ENV, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    command = [sys.executable, *lose(out, tmp_path, signal.SIGSTOP, 2, "--timeout=5")]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True) for r in range(4)]
    try:
        words = [ranks[r].communicate(timeout=120)[1] for r in (0, 2, 3)]
        assert [process.poll() for process in ranks] == [1, None, 1, 1]
        check_words(words[0], tmp_path / "lost")
        assert all(f"error on rank {r}: another rank died or does not answer" in text for r, text in zip((2, 3), words[1:]))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_only_errors_of_communication_mean_a_lost_rank():
    for text in ("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [::1]:2: Connection reset by peer",
                 "[/x/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete",
                 "[/x/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31"):
        assert train.is_lost(RuntimeError(text))
    assert train.is_lost(torch.distributed.DistBackendError("NCCL error"))
    for text in ("mat1 and mat2 shapes cannot be multiplied", "CUDA out of memory",
                 "[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"):
        assert not train.is_lost(RuntimeError(text))
