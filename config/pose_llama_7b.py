"""
The paper's own run (PoSE, arXiv 2309.10400): LLaMA-7B from 2k tokens to 16k on sequences of 2k, 1000 steps of 64 of
them, AdamW at 2e-5 with 10 steps of warm-up and a linear decay. It reports 4.60 for the perplexity of GovReport at
16k, against 4.59 for training at the full length. Its texts are the Pile's, here they are PG-19's.

    python data/pg19/prepare.py --tokenizer PATH/tokenizer.json        the model's own
    torchrun --nproc-per-node 8 train.py config/pose_llama_7b.py --tokenizer PATH/tokenizer.json

The scaling is linear; --rope-scaling ntk and yarn are the paper's other two. Every GPU holds the weights, their
gradient and AdamW's two moments in float32, 16 bytes for each of 6.7e9 weights: 108 GB, so 8 GPUs of 141 GB or more.
This recipe has not been run by us.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    init_from="huggyllama/llama-7b",

    block_size=2048,
    pose_target=16384,
    rope_scaling="linear",  # factor 8

    batch_size=1,
    batch_tokens=64 * 2048,
    max_steps=1000,
    lr=2e-5,
    warmup_steps=10,
    schedule="wsd",
    wsd_decay=1.0,  # linear to 0, from the warm-up on
    final_lr=0.0,
    weight_decay=0.0,
    beta2=0.999,

    activation_checkpointing=True,
    eval_every=100,
    eval_tokens=2**20,
    save_every=500,
    keep=1,
)
