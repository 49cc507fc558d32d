"""nanoLong's kernels: one file each, a Triton implementation with its plain torch reference beside it. See backend.py for which runs."""

from kernels.attention import attention, merge_attention
from kernels.loss import linear_cross_entropy
from kernels.norm import rms_norm
from kernels.rope import rope, rope_frequencies, rope_turns
from kernels.swiglu import swiglu
