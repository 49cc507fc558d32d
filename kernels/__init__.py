"""nanoLong's kernels: one file each, a Triton implementation with its plain torch reference beside it. See backend.py for which runs."""

from kernels.attention import attention, merge_attention
from kernels.norm import rms_norm
