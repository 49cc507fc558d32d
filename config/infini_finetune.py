"""
A pretrained Llama-family model gets a memory: SmolLM2-135M, attention inside segments of 1024 tokens, and what came before
in a matrix per head.

    python data/pg19/prepare.py --tokenizer PATH/tokenizer.json        the model's own
    python train.py config/infini_finetune.py --tokenizer PATH/tokenizer.json
    python train.py config/infini_finetune.py --init-from FOLDER_OR_HUB_ID ...     any Llama, Mistral or Qwen2

Gates start at sigmoid(-4) = 0.018: the model is nearly what it was, inside a segment, and the gradient of beta still lives
(at -100 it would be 0 exactly). They learn 100 times faster than the pretrained weights. 16 segments to a sequence:
sequences are longer than the model was trained at and need no scaling of its rotations, as no distance in a segment is.
This recipe has not been run by us: nothing in it is tuned.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/pg19",
    init_from="HuggingFaceTB/SmolLM2-135M",

    block_size=16384,
    attention="infini",
    segment=1024,
    memory_beta=-4.0,
    gate_lr=100.0,
    carry_memory=True,

    batch_size=1,
    batch_tokens=2**19,
    max_steps=1000,
    lr=3e-5,
    warmup_steps=50,
    final_lr=0.1,
    weight_decay=0.0,

    activation_checkpointing=True,
    eval_every=100,
    eval_tokens=2**20,
    save_every=100,
)
