"""
The trainer: exact resume, ranks and micro-steps that share a batch, checkpoints that survive kill -9 and signals, the
command line, and users' mistakes. Tiny models; most tests call train.main in this process, a few start real ones.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data.loader import pose_batch, train_batch
from data.tokenizer import _byte_level_alphabet, load_tokenizer
from data.tokens import TokenFile, TokenWriter
from model import GPT, GPTConfig
from sample import load

ROOT = Path(train.__file__).resolve().parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NANOLONG_KERNELS": "reference", "TRITON_INTERPRET": "0"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A byte-level set of short documents, something to learn in them."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 60), ("validation", 12)):
        with TokenWriter(folder / f"{split}.byte.tokens", vocab_size=257, tokenizer="byte") as writer:
            for length in rng.integers(5, 100, n):
                writer.add_document([*np.repeat(rng.integers(97, 123, length), 2), 256])
    return folder


@pytest.fixture
def tiny(data, tmp_path):
    """Options of a run of 8 steps that takes a blink; later options win."""
    return ["--data", str(data), "--out", str(tmp_path), "--n-layer=2", "--n-head=2", "--n-embd=32", "--block-size=32",
            "--batch-size=4", "--batch-tokens=256", "--max-steps=8", "--warmup-steps=2", "--log-every=1",
            "--eval-every=3", "--eval-tokens=300", "--save-every=0", "--device=cpu", "--no-compile"]


def records(run, *keys):
    """{step: values of `keys`} of a run's metrics.jsonl; each step is there once, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    keys = keys or ("loss", "grad_norm", "lr", "tokens", "val_loss", "val_bits_per_byte")
    return {line["step"]: tuple(line.get(key) for key in keys) for line in lines}


def fails(*args) -> str:
    """The one line with which a run refuses."""
    with pytest.raises(SystemExit) as exit:
        train.main([*map(str, args)])
    message = exit.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    return message


def place(rank=0, world=1):
    return train.Place(rank, world, CPU, torch.float32, [])


# resume


@pytest.fixture
def whole(tiny, tmp_path):
    """An uninterrupted run with a checkpoint after every second step."""
    train.main([*tiny, "--name=whole", "--save-every=2", "--keep=9"])
    return tmp_path / "whole"


def test_resume_from_every_checkpoint_is_bit_identical(tiny, tmp_path, whole):
    for step in (2, 4, 6):
        train.main([*tiny, f"--name=from{step}", f"--resume={whole}/step_{step:07d}"])
        resumed = records(tmp_path / f"from{step}")
        assert resumed == {s: r for s, r in records(whole).items() if s > step} and len(resumed) == 8 - step
        for name in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(run / "step_0000008" / name) for run in (tmp_path / f"from{step}", whole))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(tiny, tmp_path, whole, monkeypatch, capsys, number, code):
    step, steps = train.optimizer_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(train, "optimizer_step", interrupted)
    with pytest.raises(SystemExit) as exit:
        train.main([*tiny, "--name=cut"])
    monkeypatch.undo()
    cut = tmp_path / "cut"
    assert exit.value.code == code and len(steps) == 5
    assert f"stopped by {number.name} after step 5/8" in capsys.readouterr().out
    assert [p.name for p in train.checkpoints(cut)] == ["step_0000005"]
    with open(cut / "metrics.jsonl", "a") as f:
        f.write(json.dumps(dict(step=6, loss=0.0)) + '\n{"step": 7, "lo')  # as if it had been killed two steps later
    train.main([*tiny, "--resume=auto"])  # no name: the latest run
    assert records(cut) == records(whole)
    log = (cut / "log.txt").read_text()
    assert log.count("step 5/8 ") == log.count("step 6/8 ") == 1 and "after step 5" in log


def test_kill_9_while_a_checkpoint_is_written(tiny, tmp_path, whole):
    script = """
import os, signal, sys, train
save = train.save_file
def killed(tensors, path):
    if "0000004" in str(path):
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path)
train.save_file = killed
train.main(sys.argv[1:])
"""
    args = [*tiny, "--name=killed", "--save-every=2"]
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = tmp_path / "killed"
    assert sorted(p.name for p in run.glob("*step_*")) == [".tmp_step_0000004", "step_0000002"]
    assert (run / ".tmp_step_0000004" / "model.safetensors").is_file()
    assert max(records(run)) == 4
    train.main([*args, "--resume=auto"])
    assert records(run) == records(whole)
    assert sorted(p.name for p in run.glob("*step_*")) == ["step_0000006", "step_0000008"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny, tmp_path, whole, capsys):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    train.main([*tiny, "--name=young", "--resume=auto"])
    assert records(tmp_path / "young") == records(whole)
    assert "no checkpoint yet, after step 0" in capsys.readouterr().out


def test_keep_and_the_files_of_a_run(tiny, tmp_path, capsys):
    train.main([*tiny, "--name=kept", "--save-every=2", "--keep=3"])
    run = tmp_path / "kept"
    assert [p.name for p in train.checkpoints(run)] == ["step_0000004", "step_0000006", "step_0000008"]
    assert not list(run.glob(".tmp*"))
    config = json.loads((run / "config.json").read_text())
    assert config["batch_tokens"] == 256 and config["n_embd"] == 32
    assert (run / "log.txt").read_text() == capsys.readouterr().out
    saved = json.loads((run / "step_0000008" / "train.json").read_text())
    assert saved["step"] == 8 and saved["tokens"] == 8 * 256 and saved["config"] == config
    assert saved["versions"]["torch"] == torch.__version__
    assert (saved["loss"], saved["val_loss"], saved["val_bits_per_byte"]) == records(
        run, "loss", "val_loss", "val_bits_per_byte")[8]
    assert json.loads((run / "step_0000008" / "config.json").read_text())["tokenizer"] == "byte"
    assert GPT.from_pretrained(str(run / "step_0000008")).config.vocab_size == 320  # 257 rounded up


def test_what_may_change_on_resume(tiny, tmp_path, whole, capsys):
    start = f"--resume={whole}/step_0000004"
    train.main([*tiny, "--name=free", start, "--keep=1", "--save-every=1", "--log-every=4", "--eval-every=0",
                "--batch-size=8", "--activation-checkpointing"])
    for ours, theirs in zip(records(tmp_path / "free", "loss")[8], records(whole, "loss")[8]):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert "differs by" not in capsys.readouterr().out
    train.main([*tiny, "--name=other", start, "--lr=0.1", "--max-steps=9"])
    assert "differs by max_steps 8 -> 9, lr 0.002 -> 0.1" in capsys.readouterr().out
    assert records(tmp_path / "other", "loss")[5] == records(whole, "loss")[5]
    assert records(tmp_path / "other", "loss")[6] != records(whole, "loss")[6]


# one batch, however it is shared


def test_micro_steps_do_not_change_the_curve(tiny, tmp_path):
    for name, size in (("one", 8), ("two", 4), ("eight", 1)):
        train.main([*tiny, f"--name={name}", "--mask-documents", f"--batch-size={size}"])
    one = records(tmp_path / "one", "loss", "grad_norm", "val_loss")
    for name in ("two", "eight"):
        for step, values in records(tmp_path / name, "loss", "grad_norm", "val_loss").items():
            assert [v for v in values if v] == pytest.approx([v for v in one[step] if v], rel=1e-6)


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)


def test_two_ranks(tiny, tmp_path):
    train.main([*tiny, "--name=first", "--max-steps=1"])
    args = [*tiny, "--mask-documents", "--eval-tokens=450", "--batch-size=2", f"--init-from={tmp_path}/first",
            "--attention=full,window", "--window=8", "--sinks=2", "--sink-tokens=2", "--sink-logit"]
    done = torchrun("train.py", *args, "--name=two")
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) x 2 micro-step(s) x 2 sequences" in done.stdout
    assert done.stdout.count("step 1/8 ") == 1  # rank 0 alone prints
    train.main([*args, "--name=one"])
    keys = ("loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte", "val_tokens")
    one, two = (records(tmp_path / name, *keys) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for step in one:
        assert [v for v in two[step] if v] == pytest.approx([v for v in one[step] if v], rel=1e-6), step


def test_two_ranks_agree_to_stop_and_each_names_a_mistake(tiny, tmp_path):
    """A signal that only rank 1 gets, in the middle of step 3, and a mistake before that."""
    script = tmp_path / "two.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
rank = int(os.environ["RANK"])
step, steps = train.optimizer_step, []
def interrupted(*args):
    steps.append(1)
    if rank == 1 and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args)
train.optimizer_step = interrupted
for size in (3, 2):
    try:
        train.main([*sys.argv[1:], f"--batch-size={{size}}"])
    except SystemExit as e:
        print(f"rank {{rank}} exits: {{e.code}}", flush=True)
""")
    done = torchrun(script, *tiny, "--name=cut")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in train.checkpoints(tmp_path / "cut")] == ["step_0000003"]
    for rank, where in ((0, "error: "), (1, "error on rank 1: ")):
        assert f"rank {rank} exits: 143" in done.stdout
        assert f"rank {rank} exits: {where}batch_tokens 256 is not a multiple of batch_size x block_size x ranks = " \
               "3 x 32 x 2 = 192: the nearest is --batch-tokens 192 or 384" in done.stdout


def test_a_mistake_that_only_rank_0_sees_ends_all_ranks(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    for args, words in ((["--name=taken"], "taken exists"), ([f"--out={tmp_path}/file"], "Not a directory")):
        done = torchrun("train.py", *tiny, "--batch-size=2", *args)
        assert done.returncode == 1
        ours = [line for line in done.stderr.splitlines() if words in line]
        assert {line.split(": ")[0] for line in ours} <= {"error", "error on rank 1"} and ours
        assert "[rank" not in done.stderr  # where torch puts the ranks' tracebacks


def test_first_step_is_the_mean_gradient_over_the_valid_targets(tiny, tmp_path, data):
    """Against the model called directly on the global batch, documents and all."""
    train.main([*tiny, "--name=direct", "--mask-documents", "--max-steps=1", "--grad-clip=0"])
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=32))
    batch = train_batch(TokenFile(data / "train.byte.tokens"), 32, 1, 0, 0, 1, 8, with_docs=True)
    assert batch.n_valid < 256
    _, nll = model(batch.x[0], batch.y[0], docs=batch.docs[0], reduction="none")
    loss = nll.sum() / batch.n_valid
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    assert records(tmp_path / "direct", "loss", "grad_norm")[1] == pytest.approx((loss.item(), norm), rel=1e-6)


# infini


@pytest.fixture
def books(tmp_path_factory):
    """Two documents of some hundred bytes for training, one for validation."""
    folder, rng = tmp_path_factory.mktemp("books"), np.random.default_rng(0)
    for split, sizes in (("train", (400, 330)), ("validation", (200,))):
        with TokenWriter(folder / f"{split}.byte.tokens", vocab_size=257, tokenizer="byte") as writer:
            for n in sizes:
                writer.add_document([*np.repeat(rng.integers(97, 123, n // 2), 2), 256])
    return folder


@pytest.fixture
def infini(tiny, books):
    return [*tiny, f"--data={books}", "--attention=infini", "--segment=8"]


@pytest.mark.parametrize("recompute", ["--no-activation-checkpointing", "--activation-checkpointing"])
def test_carried_memory_resumes_bit_by_bit(infini, tmp_path, recompute):
    args = [*infini, "--carry-memory", recompute]
    train.main([*args, "--name=whole", "--save-every=3", "--keep=9"])
    train.main([*args, "--name=again", f"--resume={tmp_path}/whole/step_0000003"])
    assert records(tmp_path / "again") == {s: r for s, r in records(tmp_path / "whole").items() if s > 3}
    ours, theirs = (load_file(tmp_path / name / "step_0000008" / "optimizer.safetensors") for name in ("again", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ours["memory.1.M"].shape == (8, 2, 16, 16) and ours["memory.1.z"].any()
    train.main([*infini, "--name=without"])
    assert records(tmp_path / "without", "loss")[8] != records(tmp_path / "whole", "loss")[8]


def test_two_ranks_carry_their_memories(infini, tmp_path):
    args = [*infini, "--carry-memory", "--batch-size=2", "--save-every=4"]
    done = torchrun("train.py", *args, "--name=two")
    assert done.returncode == 0, done.stderr
    train.main([*args, "--name=one"])
    one, two = (load_file(tmp_path / name / "step_0000004" / "optimizer.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5, msg=key)
    train.main([*args, "--name=more", f"--resume={tmp_path}/two/step_0000004", "--batch-size=8"])  # one row each
    for step, (loss,) in records(tmp_path / "more", "loss").items():
        assert loss == pytest.approx(records(tmp_path / "one", "loss")[step][0], rel=1e-5)


def test_recomputing_segments_leaves_the_curve(infini, tmp_path):
    for name, option in (("blocks", "--no-activation-checkpointing"), ("segments", "--activation-checkpointing")):
        train.main([*infini, f"--name={name}", option])
    blocks, segments = (records(tmp_path / name, "loss", "grad_norm", "val_loss") for name in ("blocks", "segments"))
    for step in blocks:
        assert [v for v in segments[step] if v] == pytest.approx([v for v in blocks[step] if v], rel=1e-5), step


def test_a_learnt_memory_does_not_start_anew(infini, tmp_path):
    train.main([*infini, "--name=first", "--max-steps=1", "--memory-norm=4"])
    for option, words in (("--memory-beta=-4", "memory_beta is -4.0"), ("--memory-norm=8", "memory_norm is 8.0")):
        assert f"{words}, but {tmp_path}/first has learnt it, from" in fails(*infini, f"--init-from={tmp_path}/first", option)
    train.main([*infini, "--name=second", "--max-steps=1", "--memory-norm=4", f"--init-from={tmp_path}/first"])


def test_gates_are_logged_drawn_and_learn_at_their_own_rate(infini, tmp_path):
    for name, gate_lr in (("still", 0.0), ("fast", 50.0)):
        train.main([*infini, f"--name={name}", f"--gate-lr={gate_lr}", "--memory-beta=-1"])
        gates = np.array([g for (g,) in records(tmp_path / name, "gates").values()])
        assert gates.shape == (8, 2, 2) and (tmp_path / name / "gates.png").stat().st_size > 1000
        assert (abs(gates - 0.2689) < 1e-4).all() == (name == "still")


def test_the_passkey_task(tiny, tmp_path, capsys):
    """Its loss is that of the key alone; its batches do not depend on how they are shared; and it resumes."""
    args = [*tiny, "--data=data/passkey", "--block-size=320", "--batch-tokens=1280", "--attention=infini"]
    train.main([*args, "--name=whole", "--save-every=4"])
    train.main([*args, "--name=again", f"--resume={tmp_path}/whole/step_0000004", "--batch-size=2"])
    whole, again = (records(tmp_path / name, "loss", "val_loss") for name in ("whole", "again"))
    assert [again[step] for step in (6, 8)] == [pytest.approx(whole[step], rel=1e-5) for step in (6, 8)]
    assert "data: data/passkey, made as it is read" in capsys.readouterr().out
    train.main([*args, "--name=all", "--no-answer-only"])
    assert records(tmp_path / "all", "val_tokens")[8] > records(tmp_path / "whole", "val_tokens")[8]
    assert "block_size is 90: a passkey task takes" in fails(*args, "--block-size=90", "--batch-tokens=360")


@pytest.mark.parametrize("options, words", [
    (["--segment=8"], "segment is 8, but attention full with position rope has no use for it"),
    (["--memory-norm=2"], "memory_norm is 2.0, but attention full"), (["--gate-lr=2"], "gate_lr is 2.0, but attention"),
    (["--window=8"], "window is 8, but attention full"), (["--position=alibi", "--rope-base=5"], "rope_base is 5.0, but"),
    (["--answer-only"], "answer_only is True, but data "),
    (["--attention=infini", "--segment=32"], "segment 32 with block_size 32: no sequence would read its memory; use --segment 2"),
    (["--attention=infini", "--gate-lr=-1"], "gate_lr is -1.0: it must be at least 0"),
    (["--attention=infini", "--memory-beta=nan"], "memory_beta is nan: it must be finite"),
    (["--carry-memory"], "carry_memory with attention full: every layer must be infini"),
    (["--carry-memory", "--attention=infini", "--segment=7"], "carry_memory with block_size 32 and segment 7: sequences"),
    (["--carry-memory", "--attention=infini", "--mask-documents"], "carry_memory with mask_documents"),
    (["--carry-memory", "--attention=infini", "--data=data/passkey"], "carry_memory with data/passkey"),
    (["--mask-documents", "--data=data/passkey"], "mask_documents with data/passkey")])
def test_options_without_a_use_are_refused(tiny, options, words):
    assert words in fails(*tiny, *options)


# PoSE


@pytest.fixture
def pose(tiny):
    return [*tiny, "--pose-target=256", "--rope-scaling=yarn"]


def test_pose_first_step_is_that_of_its_samples(pose, tmp_path, data, capsys):
    """Against the model called directly, with the positions; validation is that of plain windows."""
    train.main([*pose, "--name=direct", "--max-steps=1", "--grad-clip=0", "--pose-chunks=3", "--no-pose-content-skip"])
    torch.manual_seed(1)
    scaling = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=320, block_size=32, rope_scaling=scaling))
    batch = pose_batch(TokenFile(data / "train.byte.tokens"), 32, 1, 0, 0, 1, 8, 256, 3, False)
    _, loss = model(batch.x[0], batch.y[0], positions=batch.positions[0])
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
    assert records(tmp_path / "direct", "loss", "grad_norm")[1] == pytest.approx((loss.item(), norm), rel=1e-6)
    assert "32 tokens in 3 chunk(s) at positions 0 to 255" in capsys.readouterr().out
    learned = GPT.from_pretrained(str(tmp_path / "direct" / "step_0000001"))
    assert (learned.config.rope_scaling, learned.config.block_size) == (scaling, 256)
    config = train.TrainConfig(block_size=32, batch_size=4, eval_tokens=300)
    nbytes = load_tokenizer("byte").token_nbytes
    again = train.evaluate(learned, TokenFile(data / "validation.byte.tokens"), nbytes, config, place())
    assert records(tmp_path / "direct", "val_loss")[1][0] == pytest.approx(again["val_loss"], rel=1e-6)


def test_pose_resumes_bit_by_bit(pose, tmp_path, capsys):
    train.main([*pose, "--name=whole", "--save-every=3", "--keep=9"])
    start = f"--resume={tmp_path}/whole/step_0000003"
    train.main([*pose, "--name=again", start])
    assert records(tmp_path / "again") == {s: r for s, r in records(tmp_path / "whole").items() if s > 3}
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "step_0000008" / name) for run in ("again", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "differs by" not in capsys.readouterr().out
    scaling = '{"rope_type": "yarn", "factor": 8}'  # the same in full
    train.main([*pose, "--name=other", start, f"--rope-scaling={scaling}", "--pose-chunks=3"])
    assert "differs by pose_chunks None -> 3\n" in capsys.readouterr().out
    assert "rope_scaling {'rope_type': 'yarn'" in fails(*pose, "--name=wrong", start, "--rope-scaling=ntk")


def test_pose_is_the_same_however_it_is_shared(pose, tmp_path):
    args = [*pose, "--max-steps=3", "--eval-every=0"]
    done = torchrun("train.py", *args, "--batch-size=2", "--name=two")
    assert done.returncode == 0, done.stderr
    train.main([*args, "--name=one", "--batch-size=8"])
    one, two = (records(tmp_path / name, "loss", "grad_norm", "val_loss") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for step in one:
        assert [v for v in two[step] if v] == pytest.approx([v for v in one[step] if v], rel=1e-6), step


def test_pose_samples_make_a_difference(pose, tmp_path):
    """Each option changes what is trained on, from the first step on."""
    for i, options in enumerate(([], ["--pose-target=128"], ["--pose-chunks=5"], ["--no-pose-content-skip"],
                                 ["--pose-chunks=1"], ["--pose-chunks=32", "--no-pose-content-skip"])):
        scaling = '--rope-scaling={"rope_type": "linear", "factor": 8}'
        train.main([*pose, scaling, f"--name={i}", "--max-steps=1", *options])
    assert len({records(tmp_path / str(j), "loss")[1] for j in range(i + 1)}) == i + 1


def test_rope_scaling_of_what_init_from_was_trained_at(bare, pose, tmp_path, whole):
    """The factor counts from the length before any scaling, whatever a run's own window was."""
    def chosen(**options):
        return train.choose_model(train.TrainConfig(**options))[1]

    yarn = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)
    made = chosen(init_from=str(whole), rope_scaling="yarn", pose_target=256, block_size=16)
    assert (made.rope_scaling, made.block_size) == (yarn, 256)
    train.main([*bare, f"--init-from={whole}", "--name=short", "--block-size=16", "--batch-tokens=64", "--max-steps=1",
                "--pose-target=256", "--rope-scaling=yarn"])
    short = str(tmp_path / "short")
    assert chosen(init_from=short).rope_scaling == yarn and chosen(init_from=short).block_size == 256
    assert chosen(init_from=short, rope_scaling="yarn", pose_target=512).rope_scaling == yarn | {"factor": 16.0}
    config = train.TrainConfig(init_from=short, rope_scaling="yarn", pose_target=512)
    assert train.choose_model(config)[0].block_size == 32  # not what PoSE taught: that is no length to train on
    with pytest.raises(ValueError, match="pose_target 512 with rope_scaling .* which reaches 256 tokens"):
        chosen(init_from=short, pose_target=512)
    assert chosen(init_from=str(whole), rope_scaling="linear", block_size=64).rope_scaling["factor"] == 2  # no PoSE
    assert chosen(block_size=64, rope_scaling="ntk", pose_target=128).rope_scaling == dict(
        rope_type="ntk", factor=2.0, original_max_position_embeddings=64)
    (tmp_path / "found.json").write_text(json.dumps(dict(note="x", rope_scaling=yarn)))
    assert chosen(rope_scaling=str(tmp_path / "found.json")).rope_scaling == yarn
    (tmp_path / "mine.py").write_text(f"from train import TrainConfig\nconfig = TrainConfig(rope_scaling={yarn})\n")
    config = train.parse([str(tmp_path / "mine.py"), "--n-layer=1"])[0]
    assert train.choose_model(config)[1].rope_scaling == yarn
    path = tmp_path / "short" / "step_0000001" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(rope_scaling=dict(rope_type="linear", factor=4))))
    with pytest.raises(ValueError, match="linear lacks its factor"):  # of 16 tokens, or of 32?
        chosen(init_from=short, rope_scaling="linear", pose_target=512)


@pytest.mark.parametrize("options, words", [
    (["--pose-target=31"], ["pose_target 31 with block_size 32", "--pose-target 512", "--block-size 31"]),
    (["--pose-target=0"], ["pose_target is 0", "at least 1"]), (["--pose-chunks=0"], ["pose_chunks is 0", "at least 1"]),
    (["--pose-chunks=33"], ["pose_chunks 33 and block_size 32", "--pose-chunks 32 at most"]),
    (["--block-size=200", "--batch-tokens=800"], ["document has ", "pose_target reads inside one", "= 201: use --block-size"]),
    (["--position=none"], ["pose_target 256 with position none", "--position rope"]),
    (["--position=alibi"], ["pose_target 256 with position alibi"]),
    (["--attention=full,window"], ["pose_target 256 with attention full,window", "--attention full"]),
    (["--attention=infini"], ["pose_target 256 with attention infini"]),
    (["--mask-documents"], ["pose_target 256 with mask_documents"]),
    (["--rope-scaling=dynamic"], ["pose_target 256 with rope_scaling dynamic", "--rope-scaling ntk"]),
    (["--data=data/passkey", "--block-size=320", "--batch-tokens=1280", "--pose-target=640"], ["pose_target 640 with data/pass"]),
    (["--rope-scaling=yarm"], ["rope_scaling yarm", "linear, ntk"]),
    (["--rope-scaling=[1]"], ["rope_scaling [1]", "JSON object"]),
    (["--rope-scaling=llama3"], ["llama3", "low_freq_factor"])])
def test_mistakes_about_pose(tiny, tmp_path, options, words):
    message = fails(*tiny, "--pose-target=256", *options)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, words", [
    (["--pose-chunks=3"], "pose_chunks is 3, but training without pose_target has no use for it"),
    (["--no-pose-content-skip"], "pose_content_skip is False, but training without pose_target"),
    (["--rope-scaling=yarn"], "rope_scaling yarn: 32 tokens are wanted, the model was trained on 32: there is nothing to extend"),
    (["--rope-scaling=linear", "--pose-target=64", "--position=alibi"], "needs position 'rope', it is 'alibi'"),
    (["--alibi-scale=0.5"], "alibi_scale 0.5 needs position 'alibi', it is 'rope'")])
def test_scaling_and_pose_options_without_a_use(tiny, options, words):
    assert words in fails(*tiny, *options)


# init-from


@pytest.fixture
def bare(tiny):
    """`tiny` without the options that make a model."""
    return [arg for arg in tiny if not arg.startswith(("--n-", "--block-size"))]


@pytest.fixture
def llama(data, tmp_path):
    """A Hugging Face folder: a Llama of random weights and a byte-level tokenizer.json, with the data in its ids."""
    folder, G, D, C, V = tmp_path / "llama", 2, 8, 32, 257
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=C, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=D,
        num_key_value_heads=G, vocab_size=V, max_position_embeddings=32, rms_norm_eps=1e-5, hidden_act="silu",
        rope_theta=5000.0, tie_word_embeddings=False)))
    shapes = {"lm_head.weight": (V, C), "model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    for name, shape in {"self_attn.q_proj": (4 * D, C), "self_attn.k_proj": (G * D, C), "self_attn.v_proj": (G * D, C),
                        "self_attn.o_proj": (C, 4 * D), "mlp.gate_proj": (48, C), "mlp.up_proj": (48, C),
                        "mlp.down_proj": (C, 48), "input_layernorm": (C,), "post_attention_layernorm": (C,)}.items():
        shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(2)}
    save_file({name: torch.randn(shape) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    end = dict(id=256, content="<|endoftext|>", single_word=False, lstrip=False, rstrip=False, normalized=False,
               special=True)
    steps = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    vocab = {char: i for char, i in _byte_level_alphabet().items()}
    (folder / "tokenizer.json").write_text(json.dumps(dict(
        version="1.0", truncation=None, padding=None, added_tokens=[end], normalizer=None, pre_tokenizer=steps,
        post_processor=None, decoder=steps, model=dict(type="BPE", vocab=vocab, merges=[]))))
    tag = load_tokenizer(folder / "tokenizer.json").tag
    for split in ("train", "validation"):
        file = TokenFile(data / f"{split}.byte.tokens")
        with TokenWriter(tmp_path / "ids" / f"{split}.{tag}.tokens", vocab_size=V, tokenizer=tag) as writer:
            for start, end in zip(file.doc_offsets, file.doc_offsets[1:]):
                writer.add_document(file.tokens[start:end])
    return folder


def first_loss(model, data):
    """Of `tiny`'s first batch."""
    batch = train_batch(TokenFile(data / "train.byte.tokens"), 32, 1, 0, 0, 1, 8, with_docs=False)
    return model(batch.x[0], batch.y[0])[1].item()


def test_init_from_a_run(bare, tmp_path, whole, data):
    """The run's weights, architecture and tokenizer; what is given changes it, and is what the run then saves."""
    train.main([*bare, "--name=same", f"--init-from={whole}", "--max-steps=2"])
    source = GPT.from_pretrained(str(whole / "step_0000008"))
    assert records(tmp_path / "same", "loss")[1][0] == pytest.approx(first_loss(source, data), rel=1e-6)
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["block_size"], config["tokenizer"]) == (2, 32, 32, "byte")
    assert GPT.from_pretrained(str(tmp_path / "same" / "step_0000002")).config == source.config
    more = dict(attention="full,window", window=8, sinks=2, rope_base=500.0, sink_logit=True, sink_tokens=2)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in more.items() if value is not True]
    train.main([*bare, "--name=other", f"--init-from={whole}/step_0000002", "--max-steps=2", "--sink-logit", *options])
    torch.manual_seed(1)  # of the learned tokens
    changed = GPT.from_pretrained(str(whole / "step_0000002"), **more)
    assert records(tmp_path / "other", "loss")[1][0] == pytest.approx(first_loss(changed, data), rel=1e-6)
    assert first_loss(changed, data) != pytest.approx(first_loss(source, data), rel=1e-3)
    assert GPT.from_pretrained(str(tmp_path / "other" / "step_0000002")).config == changed.config
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert {key: config[key] for key in more} == more and config["position"] == "rope"
    (whole / "step_0000008" / "optimizer.safetensors").unlink()  # weights are all that is needed
    (whole / "step_0000006" / "model.safetensors").unlink()
    assert train.choose_model(train.TrainConfig(init_from=str(whole)))[3] == whole / "step_0000008"
    for options, window in ((dict(block_size=64, sinks=2), 62), (dict(window=8), 8), ({}, 28)):
        config = train.TrainConfig(init_from=str(whole), attention="full,window", **options)
        assert train.choose_model(config)[1].window == window


def test_init_from_a_hugging_face_folder_and_resume(bare, tmp_path, llama, data):
    args = [*bare, f"--data={tmp_path}/ids", f"--init-from={llama}", "--attention=window", "--window=8", "--sinks=2",
            "--sink-tokens=1", "--save-every=4"]
    train.main([*args, "--name=whole"])
    torch.manual_seed(1)
    model = GPT.from_pretrained(str(llama), attention="window", window=8, sinks=2, sink_tokens=1)
    whole = records(tmp_path / "whole")
    assert train.choose_model(train.TrainConfig(init_from=str(llama), attention="window"))[1].window == 28
    assert whole[1][0] == pytest.approx(first_loss(model, data), rel=1e-6) and model.config.rope_base == 5000
    saved = json.loads((tmp_path / "whole" / "step_0000004" / "config.json").read_text())
    assert "tokenizer" not in saved and saved["vocab_size"] == 257
    (llama / "model.safetensors").unlink()  # on resume the checkpoint's weights are all that is read
    for more in ([], ["--init-from=" + str(tmp_path / "whole" / "step_0000008")]):
        name = f"resumed{len(more)}"
        train.main([*args, *more, f"--name={name}", f"--resume={tmp_path}/whole/step_0000004"])
        assert records(tmp_path / name) == {s: r for s, r in whole.items() if s > 4}
        ours, theirs = (load_file(tmp_path / run / "step_0000008" / "model.safetensors") for run in (name, "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    start = tmp_path / "whole" / "step_0000004"
    message = fails(*args, "--name=other", f"--resume={start}", "--window=9")
    assert "window 8 there, 9 here" in message
    llama.rename(tmp_path / "gone")  # a checkpoint needs no other folder
    assert load(str(tmp_path / "whole" / "step_0000008"), {})[1].stop == {256}
    train.main([*args, f"--init-from={start}", "--name=moved", f"--resume={start}"])
    assert records(tmp_path / "moved") == {s: r for s, r in whole.items() if s > 4}
    new = [*bare, f"--data={tmp_path}/ids", "--n-layer=2", "--n-embd=32", "--n-head=4", "--n-kv-head=2", "--head-dim=8",
           "--n-inner=48", "--block-size=32", "--rope-base=5000", "--no-tie-embeddings", "--vocab-multiple=1",
           "--attention=window", "--window=8", "--sinks=2", "--sink-tokens=1", f"--tokenizer={start}"]
    train.main([*new, "--name=named", f"--resume={start}"])
    assert records(tmp_path / "named") == {s: r for s, r in whole.items() if s > 4}
    assert (tmp_path / "named" / "step_0000008" / "tokenizer.json").is_file()


def test_mistakes_about_init_from(bare, tmp_path, whole, llama):
    args = [*bare, f"--init-from={llama}", f"--data={tmp_path}/ids", "--name=wrong"]
    tokens = [*args, "--tokenizer=byte", "--vocab-multiple=1"]  # of the same number of ids
    (tmp_path / "other").mkdir()
    save_file({}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    for options, words in (
            ([*args, "--init-from=nowhere/step_1/x"], ["nowhere/step_1/x", "no such folder"]),
            ([*args, f"--init-from={tmp_path}/other"], ["bert", "llama"]),
            ([*args, f"--data={tmp_path}"], ["no such token file", f"--tokenizer {llama}/tokenizer.json"]),
            (tokens, ["train.byte.tokens", "--tokenizer byte"]),
            ([*args, "--tokenizer=gpt2"], ["gpt2", "50257", "257"]),
            ([*args, "--n-embd=64"], ["do not fit", str(llama)]),
            ([*args, "--vocab-multiple=64"], ["do not fit", "(257, 32)", "(320, 32)"]),
            ([*args, "--attention=window", "--window=1020"], ["sinks 4 + window 1020", "block_size 32", "28"])):
        message = fails(*options)
        assert all(word in message for word in words), message
    (llama / "tokenizer.json").unlink()
    assert "llama/tokenizer.json: no such file" in fails(*args)
    path = whole / "step_0000008" / "config.json"
    path.write_text(path.read_text().replace('"byte"', "3"))
    assert "unknown tokenizer '3'" in fails(*bare, f"--init-from={whole}", "--name=wrong")
    assert not (tmp_path / "wrong").exists()


def test_learned_sinks_and_windows_learn(tiny, tmp_path):
    """A window of 4 of 32 tokens: nearly all of what is there to learn is inside it."""
    train.main([*tiny, "--name=sinks", "--attention=window", "--window=4", "--sinks=4", "--sink-tokens=2",
                "--sink-logit", "--max-steps=60", "--lr=1e-2", "--eval-every=0", "--log-every=10"])
    assert records(tmp_path / "sinks", "loss")[60][0] < 2.4  # without a context each letter costs log(26) = 3.26
    learned = GPT.from_pretrained(str(tmp_path / "sinks" / "step_0000060"))
    assert learned.config.layer_kinds == ["window", "window"]
    assert all((block.attn.sink_logit != 0).all() for block in learned.blocks)
    torch.manual_seed(1)
    assert (learned.sink_embedding != GPT(learned.config).sink_embedding).all()


def test_the_prediction_touches_nothing(tiny, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(train, "predict", lambda *args: 0.0)
    train.main([*tiny, "--name=unpredicted"])
    assert records(tmp_path / "unpredicted") == records(whole)


@pytest.mark.parametrize("mask", [False, True])
def test_evaluation_is_a_sum_over_ranks(data, monkeypatch, mask):
    """Each rank's sums, for 1 to 7 ranks (more than there are batches), against the windows one by one."""
    torch.manual_seed(0)
    model, tokenizer = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=320)), load_tokenizer("byte")
    file = TokenFile(data / "validation.byte.tokens")
    config = train.TrainConfig(block_size=32, batch_size=3, eval_tokens=430, mask_documents=mask)
    stream, nll, counted, nbytes = torch.from_numpy(file.tokens[:431].astype(np.int64)), 0.0, 0, 0
    number = torch.from_numpy(np.searchsorted(file.doc_offsets, np.arange(431), side="right"))
    for start in range(0, 430, 32):
        end = min(start + 32, 430)
        kept = (number[start + 1:end + 1] == number[start:end]) if mask else torch.ones(end - start, dtype=torch.bool)
        docs = number[None, start:end] if mask else None
        with torch.no_grad():
            logits, _ = model(stream[None, start:end], docs=docs)
        losses = torch.nn.functional.cross_entropy(logits[0].double(), stream[start + 1:end + 1], reduction="none")
        nll, counted = nll + losses[kept].sum().item(), counted + int(kept.sum())
        nbytes += int((stream[start + 1:end + 1][kept] != tokenizer.eot).sum())
    total = train.total
    for world in (1, 2, 3, 7):
        sums = np.zeros(3)
        for rank in range(world):
            monkeypatch.setattr(train, "total", lambda place, *values: [float(v) for v in values])
            one = train.evaluate(model, file, tokenizer.token_nbytes, config, place(rank, world)) if rank < 5 else None
            monkeypatch.setattr(train, "total", total)
            if one is not None:
                nll_bits = one["val_loss"] * one["val_tokens"] / math.log(2)
                sums += [nll_bits * math.log(2), one["val_tokens"], nll_bits / one["val_bits_per_byte"]]
        assert sums == pytest.approx([nll, counted, nbytes], rel=1e-6)


# schedule and optimizer


def test_schedules():
    cosine = train.TrainConfig(max_steps=100, warmup_steps=10, final_lr=0.2)
    factors = [train.lr_factor(cosine, step) for step in range(101)]
    assert factors[:10] == pytest.approx([(s + 1) / 10 for s in range(10)]) and factors[10] == 1
    assert factors[55] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    wsd = train.TrainConfig(max_steps=100, warmup_steps=10, final_lr=0.0, schedule="wsd", wsd_decay=0.25)
    factors = [train.lr_factor(wsd, step) for step in range(101)]
    assert set(factors[9:76]) == {1.0}
    assert factors[75:] == pytest.approx([(100 - s) / 25 for s in range(75, 101)])
    assert train.lr_factor(train.TrainConfig(warmup_steps=0), 0) == 1


def test_each_group_keeps_its_multiple_of_the_learning_rate(tiny, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *args: (seen.append([g["lr"] for g in self.param_groups]), step(self, *args))[1])
    train.main([*tiny, "--max-steps=4", "--lr=1e-4", "--attention=infini", "--gate-lr=7"])
    factors = [train.lr_factor(train.TrainConfig(max_steps=4, warmup_steps=2), s) for s in range(4)]
    assert [lr for rates in seen for lr in rates] == pytest.approx([1e-4 * f * m for f in factors for m in (1, 1, 7)])


def test_learns(tiny, tmp_path):
    """Every letter comes twice: half of the text is certain, the other half costs log2(26) bits."""
    train.main([*tiny, "--name=learns", "--max-steps=150", "--lr=1e-2", "--eval-every=0", "--log-every=50"])
    assert records(tmp_path / "learns", "val_bits_per_byte")[150][0] < 3.2


def test_a_loss_that_is_no_number_stops_the_run(tiny, tmp_path, capsys):
    message = fails(*tiny, "--name=wild", "--lr=1e30", "--grad-clip=0", "--max-steps=50")
    assert " at step " in message and "try a smaller --lr" in message
    assert "try a smaller --lr" not in capsys.readouterr().out  # stderr has it
    assert (tmp_path / "wild" / "log.txt").read_text().count("try a smaller --lr") == 1
    assert not train.checkpoints(tmp_path / "wild")


def test_a_diverged_run_saves_nothing_that_is_no_number(tiny, tmp_path):
    message = fails(*tiny, "--name=wild", "--lr=1e30", "--grad-clip=0", "--warmup-steps=0", "--save-every=1",
                    "--keep=1")
    assert " at step 2: " in message or " at step 3: " in message
    (kept,) = train.checkpoints(tmp_path / "wild")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert all(x.isfinite().all() for x in load_file(kept / name).values())


def test_a_diverged_run_that_a_signal_stops_saves_nothing(tiny, tmp_path, monkeypatch):
    step, steps = train.optimizer_step, []

    def broken(forward, *args):
        nll, norm = step(forward, *args)
        steps.append(1)
        if len(steps) == 3:
            next(forward.parameters()).data[0, 0] = math.nan
            os.kill(os.getpid(), signal.SIGTERM)
        return nll, norm

    monkeypatch.setattr(train, "optimizer_step", broken)
    assert "the weights are not finite at step 3" in fails(*tiny, "--name=cut", "--log-every=8", "--eval-every=0")
    assert not train.checkpoints(tmp_path / "cut")
    assert train.diverged(1.0, math.inf) == "the norm of the gradient is inf" and not train.diverged(1.0, 1.0)


# command line and configuration files


@pytest.mark.parametrize("args, expected", [
    (["--batch-size", "32"], dict(batch_size=32)), (["--batch_size=32"], dict(batch_size=32)),
    (["--lr", "1"], dict(lr=1.0)), (["--lr=1"], dict(lr=1.0)), (["--schedule=wsd"], dict(schedule="wsd")),
    (["--no-compile"], dict(compile=False)), (["--compile"], dict(compile=True)),
    (["--resume=auto"], dict(resume="auto")), (["--n-kv-head", "2"], dict(n_kv_head=2)),
    (["--sink-logit"], dict(sink_logit=True)), (["--no-tie-embeddings"], dict(tie_embeddings=False)),
])
def test_command_line_forms(args, expected):
    config, stem = train.parse(args)
    assert stem == "train" and asdict(config) == {**asdict(train.TrainConfig()), **expected}
    assert all(type(getattr(config, key)) is type(value) for key, value in expected.items())


def test_help_and_typos(capsys):
    for args, code, words in ((["--help"], 0, "peak learning rate"), (["--bach-size", "3"], 2, "--batch-size"),
                              (["--lr", "fast"], 2, "could not convert"), (["--schedule=line"], 2, "cosine")):
        with pytest.raises(SystemExit) as exit:
            train.main(args)
        out, err = capsys.readouterr()
        assert exit.value.code == code and words in (err if code else out)


def test_config_file_gives_defaults_that_options_change(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from train import TrainConfig as C\nconfig = C(n_layer=7, lr=1, bias=True, sink_logit=True)\n")
    config, stem = train.parse([str(path), "--n-embd=64", "--no-sink-logit"])
    assert (config.n_layer, config.n_embd, config.lr, stem) == (7, 64, 1, "mine")
    assert (config.bias, config.sink_logit, config.tie_embeddings, config.n_head) == (True, False, None, None)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_load_and_make_a_model(path, llama):
    config = train.load_config(path) if "TrainConfig" in path.read_text() else pytest.skip("another script's recipe")
    if config.init_from is not None:  # the hub's model may be out of reach: a small one of its family
        config = replace(config, init_from=str(llama))
    if (config.rope_scaling or "").endswith(".json"):  # the result of a search
        factors = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 4.0], factor=16.0,
                       original_max_position_embeddings=config.block_size)
        config = replace(config, rope_scaling=json.dumps(dict(rope_type="longrope", **factors)))
    config, wanted = train.choose_model(config)[:2]
    assert wanted.block_size == (config.pose_target or config.block_size)
    assert config.pose_target is None or wanted.rope_scaling["factor"] > 1
    with torch.device("meta"):
        model = GPT(wanted)
    assert train.resolve_batch(config, 1)[1] >= 1 and model.config.n_layer == config.n_layer


def test_bad_config_files(tmp_path):
    assert "no such config file: config/none.py; there are: " in fails("config/none.py")
    for text, words in (("from train import TrainConfig\nconfig = TrainConfig(n_layr=4)\n", "n_layr"),
                        ("x = 1\n", "config = "), ("config = {}\n", "TrainConfig"), ("def\n", "SyntaxError")):
        (tmp_path / "bad.py").write_text(text)
        assert words in fails(tmp_path / "bad.py")


# users' mistakes


def test_a_mistake_is_one_line_and_no_traceback(tiny, tmp_path):
    """As a user meets it: a process of its own, a config file, python train.py."""
    (tmp_path / "mine.py").write_text("from train import TrainConfig\nconfig = TrainConfig(n_embd=30)\n")
    args = [a for a in tiny if not a.startswith("--n-embd")]
    done = subprocess.run([sys.executable, "train.py", tmp_path / "mine.py", *args, "--n-head=4"], cwd=ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "n_embd 30" in done.stderr and "n_head 4" in done.stderr


@pytest.mark.parametrize("args, words", [
    (["--n-embd=30", "--n-head=4"], ["n_embd 30", "n_head 4"]),
    (["--n-kv-head=3", "--n-head=4"], ["n_head 4", "n_kv_head 3"]),
    (["--batch-tokens=200"], ["200", "4 x 32 x 1 = 128", "--batch-tokens 128 or 256"]),
    (["--batch-tokens=100"], ["100", "128", "--batch-tokens 128"]),
    (["--batch-tokens=-5"], ["-5", "--batch-tokens 128"]),
    (["--block-size=100000", "--batch-tokens=400000"], ["100001", "tokens"]),
    (["--tokenizer=gpt2"], ["train.gpt2.tokens", "prepare.py", "--tokenizer gpt2"]),
    (["--tokenizer=gtp2"], ["gtp2", "gpt2"]),
    (["--data=nowhere"], ["nowhere/train.byte.tokens", "prepare.py"]),
    (["--seed=-1"], ["seed is -1", "0"]), ([f"--seed={2**63}"], [f"seed is {2**63}", "2^63"]),
    (["config/quickstart.py"], ["comes first", "config/quickstart.py"]),
    (["--max-steps=0"], ["max_steps is 0", "1"]), (["--lr=nan"], ["lr is nan"]),
    (["--keep=0"], ["keep is 0", "1"]), (["--name=a/b"], ["a/b"]), (["--attention=ful"], ["ful", "full"]),
    (["--vocab-multiple=0"], ["vocab_multiple is 0", "1"]), (["--block-size=0"], ["block_size is 0", "1"]),
    (["--attention=window", "--mask-documents"], ["sinks 4 and sink_tokens 0", "--sinks 0 or --sink-tokens 4"]),
    (["--attention=full,window", "--sink-tokens=5"], ["sinks is 4", "sink_tokens 5"]),
    (["--attention=window", "--window=30"], ["sinks 4 + window 30", "block_size 32", "28"]),
    (["--name=gone", "--resume=auto"], ["no such run", "gone"]), (["--resume=auto"], ["no such run"]),
    (["--resume=nowhere/step_0000001"], ["nowhere/step_0000001", "model.safetensors"]),
])
def test_mistakes(tiny, tmp_path, args, words):
    message = fails(*tiny, *args)
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())  # and no run was begun


def test_the_config_file_is_given_in_other_ways(tiny):
    for name in ("config/quickstart", "quickstart", "config"):
        message = fails(name, *tiny)
        assert f"no such config file: {name}; there are: " in message and "config/quickstart.py" in message


def test_unknown_kernels(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOLONG_KERNELS", "foo")
    assert "NANOLONG_KERNELS='foo'" in fails(*tiny) and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_asked_for_but_absent(tiny):
    message = fails(*tiny, "--device=cuda")
    assert "--device cuda" in message and "--device cpu" in message


def test_damaged_token_file(tiny, tmp_path, data):
    bad = tmp_path / "bad"
    bad.mkdir()
    for split in ("train", "validation"):
        (bad / f"{split}.byte.tokens").write_bytes((data / f"{split}.byte.tokens").read_bytes()[:-5])
    message = fails(*tiny, f"--data={bad}")
    assert "cut short" in message and "train.byte.tokens" in message


@pytest.mark.parametrize("split", ["train", "validation"])
def test_ids_outside_the_vocabulary(tiny, tmp_path, data, split):
    for name in ("train", "validation"):
        raw = bytearray((data / f"{name}.byte.tokens").read_bytes())
        if name == split:
            end = 128 + 2 * TokenFile(data / f"{name}.byte.tokens").n_tokens
            raw[128:end] = b"\xff" * (end - 128)
        (tmp_path / f"{name}.byte.tokens").write_bytes(raw)
    message = fails(*tiny, f"--data={tmp_path}", "--name=ids")
    assert all(word in message for word in (f"{split}.byte.tokens", "65535", "257", "prepare it again")), message


def test_a_run_is_not_overwritten(tiny, whole):
    assert "--resume=auto" in fails(*tiny, "--name=whole")
    message = fails(*tiny, f"--resume={whole}/step_0000004")
    assert "has gone on from step_0000004" in message and "--name" in message
    message = fails(*tiny, "--name=whole", "--resume=auto")
    assert "step 8" in message and "--max-steps is 8" in message
    message = fails(*tiny, "--name=wole", "--resume=auto")
    assert "no such run" in message and "whole" in message


def test_another_model_or_tokenizer_is_refused_on_resume(tiny, whole):
    more = ["--name=other", f"--resume={whole}/step_0000004"]
    message = fails(*tiny, *more, "--n-layer=3", "--mlp=gelu")
    assert "n_layer 2 there, 3 here" in message and "mlp swiglu there, gelu here" in message and "n_embd" not in message
    assert "vocab_size 320 there, 384 here" in fails(*tiny, *more, "--vocab-multiple=128")
    path = whole / "step_0000004" / "config.json"
    path.write_text(path.read_text().replace('"byte"', '"gpt2"'))
    assert "tokenizer gpt2 there, byte here" in fails(*tiny, *more)


def test_the_path_of_a_tokenizer_and_the_size_of_the_data_on_resume(tmp_path, whole, data, tiny, monkeypatch, capsys):
    start = whole / "step_0000004"
    path = start / "config.json"
    path.write_text(path.read_text().replace('"byte"', '"moved/tokenizer.json"'))
    monkeypatch.setattr(train, "load_tokenizer", lambda name: load_tokenizer("byte"))  # two names of one tokenizer
    saved = json.loads((start / "train.json").read_text())
    files = [TokenFile(data / f"{split}.byte.tokens") for split in ("train", "validation")]
    assert saved["data"] == dict(train_tokens=len(files[0]), validation_tokens=len(files[1]), tokenizer_tag="byte")
    saved["data"]["train_tokens"] = 7
    (start / "train.json").write_text(json.dumps(saved))
    train.main([*tiny, "--name=other", f"--resume={start}", "--max-steps=5"])
    out = capsys.readouterr().out
    assert f"differs by max_steps 8 -> 5, train_tokens 7 -> {len(files[0])}\n" in out


@pytest.mark.parametrize("name, text", [
    ("train.json", "[]"), ("train.json", "{}"), ("train.json", "null"), ("train.json", '{"step": "8"}'),
    ("config.json", "[]"), ("config.json", "{}"), ("config.json", '{"model_type": "nanolong", "n_layer": "2"}')])
def test_json_of_another_shape_is_one_line(tiny, whole, name, text):
    (whole / "step_0000008" / name).write_text(text)
    message = fails(*tiny, "--name=whole", "--resume=auto", "--max-steps=9")
    assert "step_0000008" in message and "damaged" in message and "step_0000006" in message


def test_odd_lines_in_the_metrics_are_dropped(tiny, whole):
    path = whole / "metrics.jsonl"
    path.write_text('{}\n[]\n3\n{"step": "x"}\n' + path.read_text())
    train.main([*tiny, "--name=whole", "--resume=auto", "--max-steps=9"])
    assert list(records(whole)) == list(range(1, 10))


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.double(), lambda x: None])
def test_an_optimizer_that_does_not_fit_is_one_line(tiny, whole, change):
    """torch's fused AdamW would read and write beyond such tensors."""
    path = whole / "step_0000008" / "optimizer.safetensors"
    tensors = load_file(path)
    tensors["exp_avg_sq.wte.weight"] = change(tensors["exp_avg_sq.wte.weight"])
    save_file({key: x for key, x in tensors.items() if x is not None}, path)
    message = fails(*tiny, "--name=whole", "--resume=auto", "--max-steps=9")
    assert "damaged" in message and "exp_avg_sq.wte.weight" in message and "step_0000006" in message


@pytest.mark.parametrize("name", train.CHECKPOINT_FILES)
def test_a_checkpoint_cut_short_is_one_line(tiny, whole, name):
    path = whole / "step_0000008" / name
    raw = path.read_bytes()
    for size in (0, len(raw) // 2, len(raw) - 3):
        path.write_bytes(raw[:size])
        message = fails(*tiny, "--name=whole", "--resume=auto", "--max-steps=9")
        assert "step_0000008" in message and "damaged" in message and "step_0000006" in message


def test_a_closed_pipe_ends_the_run_quietly_with_a_checkpoint(tiny, tmp_path):
    command = [sys.executable, "train.py", *tiny, "--name=piped", "--max-steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while b"step 3/" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=60) == 143 and process.stderr.read() == b""
    assert len(train.checkpoints(tmp_path / "piped")) == 1


# wandb


def test_wandb_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*tiny, "--name=logged", "--wandb", "--max-steps=2"])
    logged = list((tmp_path / "logged" / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 30  # another process writes it
    while b"grad_norm" not in logged[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"grad_norm" in logged[0].read_bytes() and len(logged) == 1


def test_wandb_that_does_not_start_is_one_line(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**kwargs):
        raise wandb.errors.UsageError("no API key\nconfigured")

    monkeypatch.setattr(wandb, "init", init)
    message = fails(*tiny, "--wandb")
    assert "no API key configured" in message and "WANDB_MODE=offline" in message
    assert not list(tmp_path.iterdir())


def test_wandb_absent(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install" in fails(*tiny, "--wandb")


# what people read


def test_the_line_of_a_step(monkeypatch):
    """The columns that only CUDA has, from made-up measurements."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7.2 * 2**30)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=320))
    monkeypatch.setattr(model, "flops_per_token", lambda T: 0.38 * 989e12 * 2 / 795e3)
    config = train.TrainConfig(batch_tokens=32595, max_steps=2000)
    gpu = train.Place(0, 2, torch.device("cuda", 0), torch.bfloat16, [])
    record = dict(step=120, loss=3.4118, val_loss=3.5, val_bits_per_byte=1.2, lr=6e-4, grad_norm=0.81)
    record |= train.speed(0.041, model, config, gpu)
    assert train.describe(record, config, 78) == (
        "step 120/2000 | loss 3.412 | val 3.500 | 1.200 bits/byte | lr 6.0e-4 | gnorm 0.81 | 41 ms | 795k tok/s | "
        "mfu 38% | 7.2 GiB | eta 1.3m")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An unknown GPU")
    assert "mfu" not in train.speed(0.041, model, config, gpu)
    assert [train.count(n) for n in (812, 79500, 1.24e6)] == ["812", "79.5k", "1.24M"]
    assert [train.duration(s) for s in (45, 144, 11160)] == ["45s", "2.4m", "3.1h"]
