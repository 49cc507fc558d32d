"""The benchmark without a GPU: the command prints its table; a wrong kernel is refused, in whatever way it is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import bench, norm

ROOT = Path(__file__).resolve().parent.parent


def _bench(*args):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANOLONG_KERNELS")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "kernels.bench", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_checks_and_prints_the_table():
    pytest.importorskip("triton")
    run = _bench("rms_norm", "--arch", "90")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("right  rms_norm  N33 C100  float16")
    header = "gpu kernel shape tile registers spilled B shared B wgmma mma cp.async programs/SM"
    assert lines[1].split() == header.split()
    assert len(lines) == 2 + 2 * 3 and all(line.startswith("90   rms_norm_") for line in lines[2:])


def test_the_command_refuses_unknown_names():
    run = _bench("norm")
    assert run.returncode == 2 and "rms_norm" in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def _wrong_output(x, weight, eps):
    return norm.rms_norm_ref(x, weight, eps) * 1.01


def _wrong_gradient(x, weight, eps):
    return norm.rms_norm_ref(x.detach(), weight, eps) + 0 * x


def _nan(x, weight, eps):
    return norm.rms_norm_ref(x, weight, eps) * torch.nan


@pytest.mark.parametrize("kernel", [_wrong_output, _wrong_gradient, _nan])
def test_a_wrong_kernel_is_refused(kernel, monkeypatch, capsys, triton_kernels):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(("rms_norm",))
    assert capsys.readouterr().out.startswith("right  rms_norm")
    monkeypatch.setattr(bench, "rms_norm", kernel)
    with pytest.raises(SystemExit, match="wrong, so not timed: rms_norm"):
        bench.main(("rms_norm",))
    assert capsys.readouterr().out.startswith("WRONG  rms_norm")


@pytest.mark.parametrize("kernel", bench.CASES)
def test_every_kernel_is_checked(kernel, triton_kernels):
    """Each is right against float64 and, as at the timed shapes, float32; half of each gradient is wrong."""
    for case in {(case.kernel, case.name): case for case in bench.cases((kernel,))}.values():
        assert bench.check(case, "cpu", case.tiny) == ""
        if kernel != "attention":  # SDPA in float32 without T x T needs a GPU
            assert bench.check(case, "cpu", case.tiny, torch.float32) == ""
        halve, off = _half_gradient, "gradient 1 is off by 5.0"
        if kernel == "decode_attention":  # it has no gradient
            halve, off = lambda out: out / 2, "output is off by 5.0"
        half = bench.dataclasses.replace(case, ours=lambda *inputs, ours=case.ours: halve(ours(*inputs)))
        assert off in bench.check(half, "cpu", case.tiny)


def _half_gradient(out):
    return (out + out.detach()) / 2


def test_the_gpu_path_refuses_and_does_not_time(monkeypatch, capsys):
    """bench_gpu with the device calls replaced: what is wrong at its small shape, or at a timed one, is not timed."""
    timed, saved = [], []
    monkeypatch.setattr(bench, "measure_ceilings", lambda device: {"GB/s": 1.0, "TFLOP/s": 1.0})

    def check(case, device, shape, exact=torch.float64):
        wrong = case.kernel == "swiglu" or shape == dict(N=16384, C=2048)
        return "gradient 1 is off" if wrong else ""

    monkeypatch.setattr(bench, "check", check)
    monkeypatch.setattr(bench, "time_case", lambda case, shape, *_: timed.append((case.kernel, shape)) or [])
    monkeypatch.setattr(bench, "save", lambda rows, ceilings: saved.extend(rows))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.backend, "HAVE_TRITON", True)
    with pytest.raises(SystemExit, match="wrong, so not timed: rms_norm, swiglu"):
        bench.main(("rms_norm", "swiglu"))
    assert timed == [("rms_norm", dict(N=16384, C=C)) for C in (768, 4096, 8192)]
    assert saved == [dict(kernel="rms_norm", shape="N16384 C2048", stage="all", wrong="gradient 1 is off")]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rms_norm", "N16384", "C2048", "all", "WRONG"] in printed


def test_without_triton(monkeypatch):
    monkeypatch.setattr(bench.backend, "HAVE_TRITON", False)
    with pytest.raises(SystemExit, match="Triton is not installed.*pip install triton"):
        bench.main(("rms_norm",))


def test_results_are_kept_by_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    bench.save([dict(kernel="rope", ms=1.0), dict(kernel="swiglu", ms=2.0)], {"GB/s": 1.0})
    path = bench.save([dict(kernel="rope", ms=3.0)], {"GB/s": 5.0})
    assert path == tmp_path / "results" / "nvidia-h200-sxm.json"
    results = json.loads(path.read_text())
    assert results["gpu"] == "NVIDIA H200 (SXM)"
    assert results["kernels"]["swiglu"]["rows"] == [dict(kernel="swiglu", ms=2.0)]
    entry = results["kernels"]["rope"]
    assert entry["rows"] == [dict(kernel="rope", ms=3.0)] and entry["ceilings"] == {"GB/s": 5.0}
    assert entry["versions"]["torch"] == torch.__version__


def test_rows_hold_rates_peers_and_reasons(capsys):
    """time_case, on the CPU: the rate is work over time, a peer that fails or disagrees is n/a with its reason."""
    case = bench.cases(("rms_norm",))[0]

    def fails(x, weight):
        raise RuntimeError("not on\nthis machine")

    peers = {"same": case.plain, "fails": fails, "disagrees": lambda x, weight: 2 * case.plain(x, weight)}
    case = bench.dataclasses.replace(case, ours=case.plain, peers=peers)
    rows = bench.time_case(case, dict(N=64, C=128), "cpu", {"GB/s": 2.0})
    assert [row["stage"] for row in rows] == ["fwd", "bwd"]
    for row, tensors in zip(rows, (2, 3)):
        assert row["rate"] == pytest.approx(tensors * 64 * 128 * 2 / (row["ms"] * 1e6))
        assert row["of_ceiling"] == row["rate"] / 2.0
        assert row["peers"]["same"]["ms"] > 0
        assert row["peers"]["fails"]["reason"] == "RuntimeError: not on this machine"
        assert "differs from ours by 1.0e+00" in row["peers"]["disagrees"]["reason"]
    bench.print_measured(rows)
    out = capsys.readouterr().out
    assert out.count("fails n/a, disagrees n/a") == 2
    assert "n/a  fails, rms_norm N64 C128: RuntimeError: not on this machine" in out


def test_the_plain_model_is_the_same_model():
    """The model that `bench model` measures against: same logits as model.py from the same weights, in float64."""
    from model import GPT, GPTConfig

    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=50, block_size=16)
    ours, plain = GPT(config).double(), bench.PlainGPT(config).double()
    plain.load_state_dict(ours.state_dict())
    idx, targets = torch.randint(50, (2, 2, 16))
    loss, plain_loss = ours(idx, targets)[1], plain(idx, targets)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    grads = (torch.autograd.grad(a, list(model.parameters())) for a, model in ((loss, ours), (plain_loss, plain)))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
