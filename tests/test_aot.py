"""
Every kernel, at every entry of its tile table, compiled for GPUs that are not here: nothing spills, the matrix and copy
units are used, it fits. The compiler needs kernels that are not interpreted, so it runs in processes of its own.

By default: sm_80, 90 and 100, without the variants that ask less of a tile than another one (FEWER); float32, and
Infini-attention without documents, on sm_90 only. With -m slow: all of bench.static_cases, also for sm_89 and gfx942.
"""

import collections
import concurrent.futures
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import aot
from kernels.attention import TILES

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANOLONG_KERNELS")}
ARCHS = [*(pytest.param(arch, False, id=str(arch)) for arch in (80, 90, 100)),
         *(pytest.param(arch, True, id=f"{arch} whole", marks=pytest.mark.slow) for arch in aot.GPUS)]
FEWER = (" full", " window, sinks", " linear, documents", " lse, xpos")  # "", "window, sinks, alibi" ... are in their place
COMPILE = f"""
import dataclasses, json, sys
import torch
from kernels import aot, bench, bench_ring
arch, whole = json.loads(sys.argv[1])
for kernel, label, thunk in bench.static_cases(arch):
    only_90 = "float32" in label and kernel != "merge_attention" or label.endswith("N64 bfloat16")
    if not whole and (label.endswith({FEWER}) or only_90 and arch != 90):
        continue
    with aot.compile_for(arch) as built:
        thunk()
    for row in built:
        print("ROW", json.dumps(dict(dataclasses.asdict(row), kernel=kernel, label=label), default=str))
for D in (64, 128, 256):
    q, k = (torch.zeros(1, 256, heads, D, dtype=torch.bfloat16) for heads in (2, 1))
    with aot.compile_for(arch) as built:
        bench_ring.emulated_ring(q, k, k, 2, "zigzag", q)
    for row in built:
        label = f"B1 T256 H2 G1 D{{D}} bfloat16 ring"
        print("ROW", json.dumps(dict(dataclasses.asdict(row), kernel="ring", label=label), default=str))
"""
_pool = concurrent.futures.ThreadPoolExecutor(2)


def _python(program, *args, cwd=ROOT):
    command = [sys.executable, "-c", program, *args]
    run = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@functools.cache
def _compilation(arch, whole):
    return _pool.submit(_python, COMPILE, json.dumps([arch, whole]))


@pytest.fixture
def rows(arch, whole):
    """What aot.Kernel holds, as dicts, of the kernels that the launchers launch on `arch`: all, or those of every run."""
    for first in () if whole else (90, 100, 80):
        _compilation(first, False)  # two at a time
    lines = _compilation(arch, whole).result().splitlines()
    return [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]


def assert_all(rows, condition):
    shown = ("registers", "spill", "shared", "wgmma", "mma", "cp_async", "occupancy", "has_f64")
    bad = [f"{row['name']} {row['label']}: {', '.join(f'{key} {row[key]}' for key in shown)}"
           for row in rows if not condition(row)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("arch", "whole"), ARCHS)
class TestEveryKernel:
    def test_every_entry_of_the_tables_is_compiled(self, rows, arch, whole):
        names = collections.defaultdict(set)
        for row in rows:
            names[row["label"]].add(row["name"])
        parts = {f"_attention_{part}_kernel" for part in ("fwd", "dq", "dkdv")}
        memory = parts | {f"_{name}_kernel" for name in ("outer", "scan", "read_fwd", "read_bwd", "write_bwd")}
        tables = {f"D{block_d} {'bfloat16' if element == 2 else 'float32'}" for key_arch, element, block_d in TILES
                  if key_arch == arch and (whole or element == 2 or arch == 90)}
        assert {f"D{block_d} bfloat16" for block_d in (64, 128, 256)} <= tables
        for tile in tables:
            for variant in ("", " full", " docs, lse", " window, sinks", " window, sinks, alibi", " segment, lookback",
                            " xpos", " docs, lse, xpos", " window, sinks, xpos"):
                if whole or not variant.endswith(FEWER):
                    assert names[f"B1 T256 H2 G1 {tile}{variant}"] == parts, (tile, variant)
            head_dim, dtype = tile.split()
            for variant in ("", " documents", " linear, documents"):
                if whole or variant not in FEWER and (variant or arch == 90):
                    expected = memory | (set() if "linear" in variant else {"_delta_bwd_kernel"})
                    assert names[f"B1 T256 H2 G1 {head_dim} N64 {dtype}{variant}"] == expected, (tile, variant)
            assert names[f"B1 N512 H8 G2 {tile}"] >= {"_decode_kernel"}, tile
            assert names[f"B1 T256 H2 G1 {head_dim} bfloat16 ring"] == parts | {"_merge_into_kernel"}
        assert {row["kernel"] for row in rows} == {
            "ring", "attention", "infini_attention", "decode_attention", "merge_attention", "apply_sink_logit", "rope",
            "rms_norm", "swiglu", "linear_cross_entropy"}

    def test_nothing_spills(self, rows):
        """Scalar float32 products: ptxas trades a few bytes for occupancy; with xPos the smallest tile of D 256 is too large."""
        def allowed(row):
            return "float32" in row["label"] and (48 if "D256" in row["label"] and "xpos" in row["label"] else 16)

        assert_all(rows, lambda row: row["spill"] <= allowed(row))

    def test_no_float64(self, rows):
        assert_all(rows, lambda row: not row["has_f64"])

    def test_fits(self, rows, arch):
        assert_all(rows, lambda row: row["shared"] <= aot.GPUS[arch].shared and row["occupancy"] >= 1)
        if arch != "gfx":
            assert_all(rows, lambda row: row["registers"] * 32 * row["num_warps"] <= 65536)

    def test_attention_uses_the_matrix_and_copy_units(self, rows, arch):
        half = [row for row in rows if row["kernel"] == "attention" and "bfloat16" in row["label"]]
        assert_all(half, lambda row: row["wgmma"] + row["mma"] > 0)
        if arch in (90, 100):  # no product falls back to the old instruction; the sinks' and D 256's small tiles may
            assert_all(half, lambda row: row["mma"] == 0 or " D256 " in row["label"] or row["constexprs"].get("SPLIT"))
        if arch != "gfx":
            def single(row):  # with two stages every tile that keeps wgmma spills there
                return arch == 100 and row["name"] == "_attention_dkdv_kernel" and {"D128", "xpos"} <= set(
                    row["label"].replace(",", "").split())

            assert_all(half, lambda row: row["cp_async"] > 0 or single(row))

    def test_memory_uses_the_matrix_and_copy_units(self, rows, arch):
        half = [row for row in rows if row["kernel"] == "infini_attention" and "bfloat16" in row["label"]
                and not row["name"].startswith("_attention")]
        assert {row["name"] for row in half} == {
            f"_{name}_kernel" for name in ("outer", "scan", "read_fwd", "read_bwd", "delta_bwd", "write_bwd")}
        products = [row for row in half if row["name"] != "_scan_kernel" or row["shared"]]  # the other scans are elementwise
        assert_all(products, lambda row: row["wgmma"] + row["mma"] > 0 and (row["cp_async"] > 0 or arch == "gfx"))

    def test_decoding_uses_the_matrix_and_copy_units(self, rows, arch):
        half = [row for row in rows if row["name"] == "_decode_kernel" and "bfloat16" in row["label"]]
        assert len(half) == 9  # three head dims: with and without positions, with xPos and segments
        assert_all(half, lambda row: row["mma"] > 0 and (row["cp_async"] > 0 or arch == "gfx"))


PROBE = '''
import torch, triton, triton.language as tl
from kernels import aot
from kernels.norm import rms_norm
from triton.runtime import driver
from triton.runtime.jit import JITFunction

@triton.jit(do_not_specialize=["K"])
def matmul(X, Y, OUT, K, stride, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, 64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, 64):
        x = tl.load(X + m[:, None] * stride + (start + k)[None, :])
        y = tl.load(Y + n[:, None] * stride + (start + k)[None, :])
        acc = tl.dot(x, tl.trans(y), acc)
    if DOUBLE:
        acc = (acc.to(tl.float64) * 1.1).to(tl.float32)
    tl.store(OUT + m[:, None] * BLOCK_N + n[None, :], acc)

def build(arch, stride=1024, double=False, block_m=64, block_n=64):
    x, out = torch.empty(2**20, dtype=torch.bfloat16), torch.empty(2**20)
    with aot.compile_for(arch) as built:
        for _ in range(2):
            matmul[(1,)](x, x, out, 1024, stride, DOUBLE=double, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
                         num_stages=3)
    assert len(built) == 1  # the second launch is the same kernel
    return built[0]

run = JITFunction.run
plain = build(90)
assert plain.tile == "64x64 w4 s3" and plain.arch == 90
assert plain.spill == 0 and plain.wgmma > 0 and plain.mma == 0 and plain.cp_async > 0 and not plain.has_f64, plain
assert plain.shared == 3 * 2 * 64 * 64 * 2 and plain.occupancy == (232448 + 1024) // (plain.shared + 1024), plain
assert build(90, stride=1023).cp_async == 0  # a stride that is not divisible by 16
assert build(90, double=True).has_f64
spilled = build(90, block_m=256, block_n=128)
assert spilled.registers == 255 and spilled.spill > 0 and spilled.occupancy == 1, spilled
old = build(80)
assert old.wgmma == 0 and old.mma > 0 and old.cp_async > 0, old  # compiled anew for the other architecture
assert build(100).wgmma > 0
amd = build("gfx")
assert amd.mma > 0 and amd.spill == 0 and 0 < amd.registers <= 512, amd
assert build("gfx", block_m=256, block_n=128).occupancy == 0  # more shared memory than there is

x, w = torch.randn(4, 32, requires_grad=True), torch.ones(32, requires_grad=True)
with aot.compile_for(90) as built:
    rms_norm(x, w, 1e-5).sum().backward()  # the public function, on CPU tensors
assert [k.name for k in built] == ["_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"]
assert built[0].constexprs["C"] == 32 and built[0].constexprs["EPS"] == 1e-5
assert driver._active is None and JITFunction.run is run  # all is as before
torch.testing.assert_close(rms_norm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (32,), w, 1e-5))
try:
    aot.compile_for(75).__enter__()
except ValueError as e:
    assert "75" in str(e) and "[80, 89, 90, 100, 'gfx']" in str(e)
else:
    raise AssertionError("an unknown architecture was accepted")
'''


def test_what_is_counted(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)  # Triton reads a kernel's source from its file
    _python(f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import probe", cwd=tmp_path)


def test_the_interpreter_is_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"), aot.compile_for(90):
        pass
