"""
From 256 bytes to 4096, on sequences of 256: PoSE (arXiv 2309.10400) with NTK-aware scaling.

    python train.py config/quickstart.py --name quickstart
    python train.py config/pose_ntk.py --name pose_ntk
    python eval.py lengths pose_ntk

A larger base: the fastest dims turn as before, the slowest one 16 times slower, exactly as linear scaling has it.
Those in between are slowed less than that and see some angles that are new. See config/pose_linear.py for what PoSE
does.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",
    init_from="runs/quickstart",

    block_size=256,
    pose_target=4096,
    rope_scaling="ntk",

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
