"""
From 256 bytes to 4096, on sequences of 256: PoSE (arXiv 2309.10400) with LongRoPE (arXiv 2402.13753), a factor for
each frequency, which search.py finds for this very model. Its result must be there first:

    python train.py config/quickstart.py --name quickstart
    python search.py quickstart --target 4096 --name quickstart        -> search/quickstart.json
    python train.py config/pose_longrope.py --name pose_longrope
    python eval.py lengths pose_longrope

A token at a position below 256 is read by the short factors, as in any text so short, a later one by the long ones;
a step computes attention by both, and takes longer than with the other families.

--rope-scaling search/other.json takes another one. See config/pose_linear.py for what PoSE does.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/sample",
    init_from="runs/quickstart",

    block_size=256,
    pose_target=4096,
    rope_scaling="search/quickstart.json",

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
