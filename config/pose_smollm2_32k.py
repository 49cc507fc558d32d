"""
SmolLM2-135M from 8k tokens to 32k, on sequences of 2048: PoSE (arXiv 2309.10400) with YaRN (arXiv 2309.00071).

    python data/pg19/prepare.py --tokenizer PATH/tokenizer.json        the model's own
    python train.py config/pose_smollm2_32k.py --tokenizer PATH/tokenizer.json
    python train.py config/pose_smollm2_32k.py --init-from FOLDER_OR_HUB_ID ...     any Llama, Mistral or Qwen2

YaRN's factor is 4, from the 8192 tokens that the model was trained at; the sequences may be shorter than that, as
PoSE's first to last position is 32768 all the same. The paper trains at 2048, too. This recipe has not been run by
us: nothing in it is tuned.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    init_from="HuggingFaceTB/SmolLM2-135M",

    block_size=2048,
    pose_target=32768,
    rope_scaling="yarn",

    batch_size=8,
    batch_tokens=64 * 2048,  # 64 sequences, as in the paper
    max_steps=1000,
    lr=1e-4,  # 135M weights bear more than the 2e-5 of 7B
    warmup_steps=10,
    schedule="wsd",
    wsd_decay=1.0,  # linear to 0, from the warm-up on
    final_lr=0.0,
    weight_decay=0.0,
    beta2=0.999,

    eval_every=100,
    eval_tokens=2**20,
    save_every=250,
)
