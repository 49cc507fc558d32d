"""
GPT-2 small's shape on PG-19, Project Gutenberg's books from before 1919: the baseline that long context starts from.

    python data/pg19/prepare.py --tokenizer gpt2
    torchrun --nproc-per-node 8 train.py config/pg19_124m.py      8 GPUs
    python train.py config/pg19_124m.py                           one GPU: the same curve, more micro-steps

12 layers of 768, with what has become usual since GPT-2: RMSNorm, SwiGLU, rotary positions, no biases. A step is half a
million tokens, as GPT-3 small's; 10,000 steps are 5 billion tokens, about 40 per parameter and not quite two passes
over PG-19. The batch is given in tokens, so ranks and micro-batch size change the speed alone.
This recipe has not been run to its end by us: the numbers in it are the literature's, not tuned.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    tokenizer="gpt2",

    n_layer=12,
    n_head=12,
    n_embd=768,
    block_size=1024,

    batch_size=32,  # sequences per GPU and micro-step: halve it if memory runs out, the curve stays
    batch_tokens=524288,
    max_steps=10000,
    lr=6e-4,  # GPT-3 small's
    warmup_steps=700,  # 0.37 billion tokens, also GPT-3's
    schedule="cosine",
    final_lr=0.1,
    weight_decay=0.1,

    log_every=10,
    eval_every=250,
    eval_tokens=2**22,
    save_every=500,
    keep=3,
)
