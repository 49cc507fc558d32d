"""
Which implementation of a kernel runs, and for which GPU its tiles are chosen.

CUDA and ROCm tensors run the Triton kernels, everything else the plain torch references. With TRITON_INTERPRET=1 (set
before the first import) the Triton kernels run on CPU tensors, slowly: that is how they are tested without a GPU.
NANOLONG_KERNELS=triton|reference forces one or the other.
"""

import functools
import logging
import os

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 turns fused multiply-add off by default; we want it
try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the references serve, and the kernels below them are never called

    class _MissingTriton:
        """Stands in for `triton` and `tl` while kernels are being defined; each of them becomes this object too."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    triton = tl = _MissingTriton()
    HAVE_TRITON = False
else:
    HAVE_TRITON = True

log = logging.getLogger("nanolong")
INTERPRET = HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined


@functools.cache
def _log_once(message: str):
    log.info(message)


@torch.compiler.assume_constant_result
def _decide(device_type: str, dtype: torch.dtype) -> bool:
    """True for the Triton kernels, False for the references; logs the choice and its reason once."""
    forced = os.environ.get("NANOLONG_KERNELS", "")
    if forced not in ("", "triton", "reference"):
        raise ValueError(f"NANOLONG_KERNELS={forced!r} is unknown: set it to 'triton' or 'reference', or unset it")
    if forced == "reference":
        use, why = False, "NANOLONG_KERNELS=reference"
    elif device_type == "cuda" and HAVE_TRITON and not INTERPRET:
        use, why = True, "the tensors are on a GPU"
    elif device_type == "cpu" and INTERPRET:
        use, why = True, "TRITON_INTERPRET=1"
    elif forced == "triton":
        need = "use a CUDA or ROCm device, or set TRITON_INTERPRET=1 for the CPU" if HAVE_TRITON else "pip install triton"
        raise ValueError(f"NANOLONG_KERNELS=triton, but Triton cannot run on {device_type!r} here: {need}")
    elif device_type == "cuda":
        use, why = False, "TRITON_INTERPRET=1 is for CPU tensors" if INTERPRET else "Triton is not installed"
    else:
        use, why = False, f"the tensors are on {device_type!r}"
    if use and INTERPRET and dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float16, float32 or float64 with it")
    _log_once(f"kernels: {'triton' if use else 'plain torch reference'} ({why})")
    return use


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel. ValueError when NANOLONG_KERNELS asks for what cannot be."""
    return _decide(x.device.type, x.dtype)


aot_arch: int | str | None = None  # set by kernels.aot, which compiles for a GPU that is not here


def arch(x: torch.Tensor) -> int | str:
    """The key of the tile tables: 80, 89, 90 or 100 on NVIDIA (89 also for 86 and 120: 99 KiB of shared memory), "gfx" on
    AMD, "cpu" in the interpreter. A newer or unlisted GPU takes the nearest older entry."""
    if aot_arch is not None:
        return aot_arch
    if not x.is_cuda:
        return "cpu"
    return _cuda_arch(x.device.index)


@functools.cache
def _cuda_arch(index: int) -> int | str:
    if torch.version.hip:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise ValueError(f"the kernels need compute capability 8.0 (Ampere) or newer, this GPU has {major}.{minor}: "
                         "set NANOLONG_KERNELS=reference")
    if (major, minor) in ((8, 6), (8, 7), (8, 9)) or major >= 12:
        return 89
    return {8: 80, 9: 90}.get(major, 100)


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision for `dtype`: float32 products follow torch.set_float32_matmul_precision, so "highest" (the
    default) is exact float32 and anything else allows TF32; other dtypes ignore it."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def register(name: str, schema: str, launcher, fake):
    """
    Makes `launcher` the operator torch.ops.nanolong.<name> on CPU and GPU tensors, opaque to torch.compile, with `fake`
    giving the outputs' shapes and dtypes. The first argument is a tensor: Triton launches on the current device, so its
    device is made that.
    """
    def on_its_device(x, *args):
        with torch.cuda.device_of(x):
            return launcher(x, *args)

    torch.library.define(f"nanolong::{name}", schema)
    torch.library.impl(f"nanolong::{name}", ("cpu", "cuda", "mps"), on_its_device)
    torch.library.register_fake(f"nanolong::{name}", fake)
