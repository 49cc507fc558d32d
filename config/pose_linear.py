"""
From 256 bytes to 4096, on sequences of 256: PoSE (arXiv 2309.10400) with linear scaling, Position Interpolation
(arXiv 2306.15595).

    python train.py config/quickstart.py --name quickstart
    python train.py config/pose_linear.py --name pose_linear
    python eval.py lengths pose_linear

Each sequence is two pieces of a book, and the second one's positions skip up to 3840 ahead: attention meets all
distances below 4096 at the cost of 256. Linear scaling divides every frequency by 16, so that no angle is new; but
neighbours are 16 times closer than the model has learnt to tell apart, and it must learn that anew.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",
    init_from="runs/quickstart",

    block_size=256,
    pose_target=4096,
    rope_scaling="linear",

    batch_size=32,  # 8192 bytes a step
    max_steps=100,
    lr=2e-3,  # half the quickstart's; the paper's 2e-5 is for 7B weights
    warmup_steps=10,
    final_lr=0.1,
    weight_decay=0.0,
    beta2=0.99,

    log_every=20,
    eval_every=0,  # at the end: plain windows of 256, is the old length still as good?
    eval_tokens=65536,
    save_every=0,
)
