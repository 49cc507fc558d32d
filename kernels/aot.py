"""
Ahead-of-time compilation: what the kernels would launch, for a GPU that is not here, and what it costs there.

    with compile_for(90) as kernels:          # 80, 89, 90, 100 (NVIDIA compute capability) or "gfx" (AMD gfx942)
        rms_norm(x, weight, 1e-5)             # or its launchers; CPU tensors: compiled and recorded, not run
    kernels[0].registers, kernels[0].spill, kernels[0].shared, ...

The specialisation (pointer types, divisibility by 16, constexprs, tile, warps, stages) is that of a real launch,
because it is one, up to the last step. Outputs stay uninitialised: only shapes, strides and dtypes count.
Needs Triton and no TRITON_INTERPRET; works alike on Triton 3.6 to 3.9.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from unittest import mock

import torch

from kernels import backend


@dataclasses.dataclass(frozen=True)
class GPU:
    """The limits of one streaming multiprocessor (AMD: compute unit) that decide how many programs share it."""

    target: tuple  # backend, architecture, threads per warp
    shared: int  # bytes of shared memory one program may use
    warps: int
    programs: int


GPUS = {  # by key of the tile tables (backend.arch)
    80: GPU(("cuda", 80, 32), 166912, 64, 32),
    89: GPU(("cuda", 89, 32), 101376, 48, 24),
    90: GPU(("cuda", 90, 32), 232448, 64, 32),
    100: GPU(("cuda", 100, 32), 232448, 64, 32),
    "gfx": GPU(("hip", "gfx942", 64), 65536, 32, 32),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel. `spill` is bytes of stack per thread (0: nothing spilled); `shared` is bytes per program."""

    name: str
    arch: int | str
    constexprs: dict
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spill: int
    shared: int
    wgmma: int  # wgmma.mma_async on sm_90, tcgen05.mma on sm_100
    mma: int  # mma.sync; MFMA on AMD
    cp_async: int  # cp.async and cp.async.bulk (TMA); loads straight into LDS on AMD
    has_f64: bool
    occupancy: int  # programs per multiprocessor by registers, shared memory, warps; 0: one does not fit

    @property
    def tile(self) -> str:
        """The block sizes and launch options, e.g. "128x64 w8 s3"."""
        blocks = [str(v) for k, v in self.constexprs.items() if k.startswith("BLOCK")]
        return f"{'x'.join(blocks)} w{self.num_warps} s{self.num_stages}"


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread. ptxas puts spilled registers on the stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: max(map(int, re.findall(rf"\b{key}:(\d+)", text))) for key in ("REG", "STACK", "LOCAL")}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _occupancy(arch: int | str, registers: int, shared: int, num_warps: int) -> int:
    gpu = GPUS[arch]
    if arch == "gfx":  # 4 SIMDs of 512 registers a lane, given out by 8; 8 waves each
        warps = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
        by_shared = gpu.shared // max(shared, 1)
    else:  # 4 partitions of 16384 registers, given out by 256 a warp; each program also takes 1 KiB of shared memory
        warps = 4 * (16384 // (-(-max(registers, 1) * 32 // 256) * 256))
        by_shared = (gpu.shared + 1024) // (shared + 1024)
    return min(gpu.programs, by_shared, min(gpu.warps, warps) // num_warps)


def _measure(compiled, arch: int | str) -> Kernel:
    meta, asm = compiled.metadata, compiled.asm
    if arch == "gfx":
        text, counts = asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size")
        registers, spill = (int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in counts)
        wgmma, mma = 0, len(re.findall(r"\bv_mfma_", text))
        cp_async = len(re.findall(r"(?:buffer|global)_load_.*\blds\b|global_load_lds_", text))
        has_f64 = "_f64" in text
    else:
        text = asm["ptx"]
        registers, spill = _nvidia_usage(asm["cubin"])
        wgmma = len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b", text))
        mma = len(re.findall(r"\bmma\.sync\b", text))
        cp_async = len(re.findall(r"\bcp\.async\.(?:c[ag]|bulk\.(?:tensor|shared)[^;]*?)\b", text))
        has_f64 = ".f64" in text
    names = compiled.src.fn.arg_names
    constexprs = {names[path[0]]: value for path, value in compiled.src.constants.items() if len(path) == 1}
    occupancy = _occupancy(arch, registers, meta.shared, meta.num_warps)
    return Kernel(compiled.name, arch, constexprs, meta.num_warps, meta.num_stages, registers, spill, meta.shared,
                  wgmma, mma, cp_async, has_f64, occupancy)


class _AbsentDriver:
    """What Triton asks of its driver while it compiles. The device separates the architectures in Triton's caches."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target, self.device = GPUTarget(*GPUS[arch].target), f"aot {arch}"

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def compile_for(arch: int | str):
    """
    Within the `with`, a launched Triton kernel is compiled for `arch` (a key of GPUS) instead of run, and the public
    functions take their Triton path for CPU tensors. Yields the list that fills with one Kernel per distinct compiled
    kernel. ValueError for an unknown `arch`, without Triton and with TRITON_INTERPRET=1.
    """
    if arch not in GPUS:
        raise ValueError(f"compile_for: arch {arch!r} is unknown, it must be one of {list(GPUS)}")
    if not backend.HAVE_TRITON:
        raise ValueError("compile_for: Triton is not installed: pip install triton")
    if backend.INTERPRET:
        raise ValueError("compile_for: TRITON_INTERPRET=1 makes the kernels Python functions: unset it to compile them")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels, seen, run = [], [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not any(compiled is other for other in seen):
            seen.append(compiled)
            kernels.append(_measure(compiled, arch))
        return compiled

    before = driver._active  # reset_active() would look for a GPU
    driver.set_active(_AbsentDriver(arch))
    try:
        with mock.patch.multiple(backend, aot_arch=arch, _decide=lambda device_type, dtype: True), \
                mock.patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver.set_active(before)
