"""
Does a model need its first tokens, and can it be given one to need? Three small byte-level models, trained from scratch:

    python train.py config/sinks.py --name plain
    python train.py config/sinks.py --name token --sink-tokens 1       a learned vector in front of every sequence
    python train.py config/sinks.py --name logit --sink-logit          a learned logit in each head's softmax
    python eval.py perplexity plain --attention 0+256 1+255 2+254 4+252 8+248

They attend fully to 256 bytes. The evaluation streams a book through a window of the same size, with more and more of the
first tokens kept as sinks (for `token` the learned vector is the first of them, so it starts at 1+255).
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",
    tokenizer="byte",

    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=256,

    batch_size=8,
    max_steps=3000,  # sinks come late: after 880 steps, the quickstart's, no head attends to the first bytes at all
    lr=4e-3,
    warmup_steps=50,
    final_lr=0.02,
    beta2=0.99,

    log_every=50,
    eval_every=1000,
    eval_tokens=65536,
    save_every=1000,
)
