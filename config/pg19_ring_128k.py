"""
GPT-2 small's shape on PG-19 at 131,072 tokens: 8 GPUs share every sequence by ring attention, 16,384 tokens each.

    python data/pg19/prepare.py --tokenizer gpt2
    python train.py config/pg19_ring_128k.py --sp 8 --plan                          first: does it fit, is the ring hidden?
    torchrun --nproc-per-node 8 train.py config/pg19_ring_128k.py --sp 8            one node
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py config/pg19_ring_128k.py --sp 8                                    four: the ring stays inside a node

From new weights, or, which is much cheaper, from those of config/pg19_124m.py, trained on 1,024 tokens: --init-from
runs/pg19_124m. The base of the rotary frequencies goes up with the length, as in Code Llama. A micro-step is one
sequence of a book's length per 8 GPUs; --batch-tokens keeps half a million tokens per step on 8, 16 or 32 of them.
This recipe has not been run by us.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    tokenizer="gpt2",

    n_layer=12,
    n_head=12,
    n_embd=768,
    block_size=131072,
    rope_base=1e6,

    batch_size=1,
    batch_tokens=4 * 131072,
    activation_checkpointing=True,  # keeps what attention gave, so that nothing is sent twice
    max_steps=1000,
    lr=1e-4,
    warmup_steps=20,
    weight_decay=0.1,

    log_every=1,
    eval_every=100,
    eval_tokens=2**20,
    save_every=100,
)
