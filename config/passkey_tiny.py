"""
Retrieval far beyond the window, learnt from nothing on a laptop: a byte-level model of 0.23M parameters finds a five-digit
number in a text 64 times as long as any that it was trained on. Three runs, each from the one before, on sequences of
2, 4 and 8 segments of 64 bytes:

    python train.py config/passkey_tiny.py --name passkey-2
    python train.py config/passkey_tiny.py --name passkey-4 --init-from runs/passkey-2 --block-size 256 --batch-size 24
    python train.py config/passkey_tiny.py --name passkey-8 --init-from runs/passkey-4 --block-size 512 --batch-size 16
    python eval.py passkey passkey-8 --lengths 512 2048 8192 32768 --diagnose

What makes it work, in the order in which it was found:
- memory_norm. A read is a mean over all that was ever written, weighted by sigma(q) . sigma(k), so the filler drowns the
  number unless its weight is nearly zero. ELU + 1 is that small only at very negative arguments. RMSNorm with a large
  weight has them from the first step: -16 is a weight of 1e-7. The answer's loss leaves chance after 100 steps (without:
  1,200), and the reach grows with the weight.
- two window layers in front, and one memory. Windows give a digit's key its place in the number; memories in several
  layers learn a short cut, the bag of the digits, which does not carry over to other lengths.
- short sequences first. With two segments the windows just reach from the answer to the number: there the model
  learns to say digits in order, and with four and eight the memory takes over where the windows end.
- the loss of the key alone (data/passkey's answer_only). Learning the filler by heart on the way is slower.
"""

from train import TrainConfig

config = TrainConfig(
    data="data/passkey",
    tokenizer="byte",

    n_layer=3,
    n_head=2,  # 2 heads of 64 learn it much faster than 4 of 32
    n_embd=64,
    head_dim=64,
    block_size=128,
    attention="window,window,infini",
    window=32,
    sinks=0,
    segment=64,
    memory_norm=32.0,
    gate_lr=10.0,

    batch_size=32,
    max_steps=300,
    lr=3e-3,
    warmup_steps=100,
    schedule="wsd",
    wsd_decay=0.3,
    final_lr=0.1,
    weight_decay=0.0,
    beta2=0.98,

    log_every=20,
    eval_every=0,
    eval_tokens=8192,
    save_every=0,
)
