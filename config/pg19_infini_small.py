"""
Infini-attention on PG-19 for one GPU: 8 layers of 512, segments of 512 tokens, sequences of 16 segments.

    python data/pg19/prepare.py --tokenizer gpt2
    python train.py config/pg19_infini_small.py

51.5M parameters where config/pg19_infini.py has 252.9M. Sequences read each book on and on and find the memory of
the one before (carry_memory), so that reads are trained on far more than the 16 segments that the gradient goes
through. This recipe has not been run by us: nothing in it is tuned.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    tokenizer="gpt2",

    n_layer=8,
    n_head=4,
    n_embd=512,  # 4 heads of 128
    block_size=8192,
    attention="infini",
    segment=512,
    gate_lr=30.0,
    carry_memory=True,

    batch_size=8,
    batch_tokens=2**18,
    max_steps=5000,
    lr=1e-3,
    warmup_steps=500,
    final_lr=0.1,

    eval_every=250,
    eval_tokens=2**20,
    save_every=500,
)
