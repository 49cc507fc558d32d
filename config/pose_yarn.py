"""
From 256 bytes to 4096, on sequences of 256: PoSE (arXiv 2309.10400) with YaRN (arXiv 2309.00071).

    python train.py config/quickstart.py --name quickstart
    python train.py config/pose_yarn.py --name pose_yarn
    python eval.py lengths pose_yarn

Dims that turn more than 32 times in the trained length stay, those that turn less than once slow down 16 times, and
the logits grow by (0.1 ln 16 + 1)^2 = 1.63, as there is more to choose from. The one to begin with. See
config/pose_linear.py for what PoSE does.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",
    init_from="runs/quickstart",

    block_size=256,
    pose_target=4096,
    rope_scaling="yarn",

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
