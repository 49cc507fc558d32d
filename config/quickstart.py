"""
Two minutes on two CPU cores: a byte-level model of two novels, and the first thing to run.

    python train.py config/quickstart.py
    python sample.py

So little time is best spent on a narrow model and many small steps. A byte is 1/4 of a word, so 256 of them is a short
paragraph: enough for spelling, quotation marks and the sound of a sentence, not for a plot. The two books are read less
than twice; much longer runs need more text (data/pg19) before they need a larger model.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",  # prepared on first use, without a download
    tokenizer="byte",

    n_layer=4,
    n_head=4,
    n_embd=128,  # 0.9M parameters; 192 reads too few bytes in the same time: 2.61 bits/byte where this reaches 2.52
    block_size=256,

    batch_size=8,  # 2048 bytes a step: small batches make more progress per byte read
    max_steps=880,
    lr=4e-3,  # narrow models take large learning rates
    warmup_steps=50,
    final_lr=0.02,
    beta2=0.99,  # small batches have noisy gradients: average their squares longer

    log_every=20,
    eval_every=220,
    eval_tokens=65536,  # of the validation novel, by another author
    save_every=440,
)
