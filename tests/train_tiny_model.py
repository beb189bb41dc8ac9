"""Train the tiny model: a small Llama that must look thousands of tokens back to answer.

    python -m tests.train_tiny_model --out DIR [--seconds 110]

Writes to DIR what lies in perf/tiny_model: weights in bfloat16 (7 MB), configuration and tokenizer.
The model here: 4,690 steps in 110 s on one H200 (torch 2.11, transformers 5.17), by an earlier form
of this program. Questions answered right by it in float32, of 192 each: 100 % where the fact lies
500 to 3,000 tokens back, 99.5 % at 3,000 to 4,000 and 100 % at 4,000 to 4,800.

The codecs there (codec-PRESET.safetensors), from documents of other seeds than the tests', each a
sequence:

    python -c "
    import random
    from perf.tiny_model.recall import write_document
    rng = random.Random(2026)
    for _ in range(8):
        print(*write_document(rng, 4095, rng.randint(50, 100)))" > recall.txt
    python -m spectral_kernels.calibrate --model perf/tiny_model --text recall.txt \
        --tokens 32768 --device cpu --preset quality balanced small --out perf/tiny_model
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perf.tiny_model.recall import BOS, EOS, IDS, NAMES, PAD, SPECIAL, VALUES, write_document

THETA = 1e6
SHAPE = {
    "vocab_size": -(-len(IDS) // 64) * 64, "hidden_size": 256, "intermediate_size": 640,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 8192, "initializer_range": 0.04, "tie_word_embeddings": True,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
# Short documents first: with two or three facts among 64 tokens, looking a name up is learned in
# under 1,000 steps; it did not come within 170 s of training that began with 256 tokens.
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 5120)
TOKENS = 32768  # of a step
WINDOW, PROMOTE = 40, 0.9  # of so many steps that share of the answers must be right
RATE, WARMUP, DECAY = 1e-3, 100, 0.05  # learning rate, its first steps, weight decay
FALL = 0.6  # share of the time after which the rate falls, linearly, to a fiftieth


class Documents(IterableDataset):
    """Documents without end: int64 [length], <s> first."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        n, worker = self.length, get_worker_info()
        rng = random.Random(worker.seed if worker else 0)
        facts = (2, max(2, n // 20)) if n < 512 else (n // 100, min(n // 20, 200))
        while True:
            words = write_document(rng, n - 1, rng.randint(*facts))
            yield torch.tensor([BOS, *(IDS[word] for word in words)])


def loss_of(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss on documents [B, T], and [answers right, answers] without a synchronisation. It is
    the answers' and half of that of all else, where names and values count little, as nothing
    foretells them."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    target = tokens[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    losses = losses.view_as(target)
    answer = F.pad(tokens[:, :-3] == IDS["recall"], (2, 0))  # recall : NAME VALUE
    chance = (target >= IDS[NAMES[0]]) & (target <= IDS[VALUES[-1]])
    weight = torch.where(chance, 0.05, 1.0) * ~answer
    rest = 0.5 * (losses * weight).sum() / weight.sum()
    right = (logits.argmax(2) == target) & answer
    loss = (losses * answer).sum() / answer.sum().clamp(min=1) + rest
    return loss, torch.stack((right.sum(), answer.sum()))


def train(model: Any, seconds: float) -> None:
    """Train in place: documents of one length until most answers are right, then longer ones."""
    cuda = model.device.type == "cuda"
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not x for x in matrices)]
    groups: Any = [{"params": matrices, "weight_decay": DECAY}, {"params": others}]
    optimiser = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.95), weight_decay=0, fused=cuda)
    workers = min(8, os.cpu_count() or 1)
    begin, step = time.monotonic(), 0
    for length in LENGTHS:
        counts = torch.zeros(2, device=model.device)
        rows = max(1, TOKENS // length)
        for i, tokens in enumerate(DataLoader(Documents(length), rows, num_workers=workers), 1):
            used = (time.monotonic() - begin) / seconds
            if used >= 1:
                print(f"{step} steps")
                return
            step += 1
            rate = RATE * min(1.0, step / WARMUP, max(0.02, (1 - used) / (1 - FALL)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast(model.device.type, torch.bfloat16, enabled=cuda):
                loss, found = loss_of(model, tokens.to(model.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            counts += found
            if i % WINDOW == 0:
                right, asked = counts.tolist()
                counts.zero_()
                text = f"{used * seconds:6.1f} s  step {step}  length {length}  loss {loss:.3f}"
                print(f"{text}  recall {right / asked:.4f}", flush=True)
                if right / asked >= PROMOTE and length < LENGTHS[-1]:
                    break


def export(model: Any, folder: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    words = Tokenizer(models.WordLevel(IDS, unk_token=names["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin = names["bos_token"]
    words.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", **names,
        model_max_length=SHAPE["max_position_embeddings"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    # What transformers 4 reads: 5 writes rope_parameters, and a class of its own.
    older: Any = {"config": {"rope_theta": THETA}}
    older["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, more in older.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=110.0, help="training time")
    args = parser.parse_args()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": THETA}
    config = LlamaConfig(**SHAPE, rope_theta=THETA, rope_parameters=rope)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # far too slow to learn anything
    model = LlamaForCausalLM(config).to(device)
    train(model, args.seconds)
    export(model, args.out)


if __name__ == "__main__":
    main()
