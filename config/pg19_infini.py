"""
Infini-attention on PG-19 as its paper trains it (arXiv 2404.07143, section 4.1): 12 layers with 8 heads of 128, segments
of 2048 tokens, sequences of 32,768: 16 segments, through all of which the gradient flows.

    python data/pg19/prepare.py --tokenizer gpt2
    torchrun --nproc-per-node 8 train.py config/pg19_infini.py --name pg19_infini
    python eval.py perplexity pg19_infini --tokens 65536

A layer's memory is 8 x 128 x 129 floats: 1.6M in all, whatever the length, where the keys and values of 65k tokens
would be 1.6 billion. activation_checkpointing recomputes segment by segment: between two of them only the memories are
kept, so the sequence costs the activations of one segment of 2048.
The paper uses Adafactor at 0.01 and SentencePiece's 32k; here AdamW and GPT-2's 50k. Gates start at one half and learn 30
times faster than the rest, without decay, as others who trained it found necessary.
This recipe has not been run by us: nothing in it is tuned.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    tokenizer="gpt2",

    n_layer=12,
    n_head=8,
    n_embd=1024,  # 8 heads of 128
    n_inner=4096,
    block_size=32768,
    attention="infini",
    segment=2048,
    memory_rule="delta",
    gate_lr=30.0,

    batch_size=1,
    batch_tokens=2**21,  # the paper's 64 sequences
    max_steps=10000,
    lr=6e-4,
    warmup_steps=1000,
    final_lr=0.1,

    activation_checkpointing=True,
    eval_every=250,
    eval_tokens=2**22,
    save_every=500,
)
