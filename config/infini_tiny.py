"""
Infini-attention for a laptop: a byte-level model of two novels, segments of 128 bytes, 16 to a sequence.

    python train.py config/infini_tiny.py --name infini_tiny
    python sample.py infini_tiny

The quickstart's width with two heads of 64, since a memory holds as much as its head is wide. runs/<name>/gates.png shows
what the gates do: near 0 a head looks at its segment, near 1 at its memory.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",
    tokenizer="byte",

    n_layer=4,
    n_head=2,
    n_embd=128,
    block_size=2048,
    attention="infini",
    segment=128,
    memory_norm=16.0,  # RMSNorm on what goes to the memory: sigma becomes sharp, see config/passkey_tiny.py
    gate_lr=10.0,

    batch_size=4,  # 8192 bytes a step
    max_steps=500,
    lr=4e-3,
    warmup_steps=50,
    final_lr=0.02,
    beta2=0.99,

    log_every=10,
    eval_every=250,
    eval_tokens=65536,
    save_every=250,
)
