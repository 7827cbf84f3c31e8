"""The language-model head on hidden positions alone, against full logits: time and peak memory of one training step.

    python benchmarks/hidden_head.py [--json]

Ours: logits at the hidden tokens. The plain way: ``labels=`` on the stock class, and so logits ``[B, L, V]``. Same
random weights, same batch, Qwen2-VL's own vocabulary size, text only. Each side runs in a process of its own, so that
each peak is its own; times are medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from cocoa_embed.attention import bidirectional_mask, make_bidirectional
from cocoa_embed.train.losses import mntp_loss
from cocoa_embed.train.reconstruction import hidden_token_logits, last_hidden_states, model_mask, position_ids

VOCABULARY = 151_936
BATCH, LENGTH, MASK_RATIO = 8, 128, 0.2


def build_model() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    width = 128
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": width},
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    make_bidirectional(model)
    return model


def measure(side: str, repeats: int) -> dict[str, float]:
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    hidden = torch.rand(BATCH, LENGTH, generator=generator) < MASK_RATIO
    hidden[:, 0] = False
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    batch["mm_token_type_ids"] = torch.zeros_like(input_ids)

    def ours() -> torch.Tensor:
        mask = model_mask(model, bidirectional_mask(batch["attention_mask"]))
        states = last_hidden_states(model, batch, mask, position_ids(model, batch))
        return mntp_loss(hidden_token_logits(model, states, hidden), input_ids[hidden])

    def plain() -> torch.Tensor:
        labels = input_ids.masked_fill(~hidden, -100)
        return model(input_ids=input_ids, attention_mask=batch["attention_mask"], labels=labels, use_cache=False).loss

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, loss = [], torch.tensor(0.0)
    for _ in range(repeats + 1):
        started = time.perf_counter()
        loss = {"ours": ours, "plain": plain}[side]()
        loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds[1:]), "peak_above_model_bytes": peak - before, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.repeats)))
        return
    sides = {}
    for side in ("ours", "plain"):
        command = [sys.executable, __file__, "--side", side, "--repeats", str(options.repeats)]
        sides[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ours, plain = sides["ours"], sides["plain"]
    if abs(ours["loss"] - plain["loss"]) > 1e-3 * plain["loss"]:
        raise SystemExit(f"the two sides do not compute the same loss: {ours['loss']} and {plain['loss']}")
    document = {
        "ours": ours,
        "plain": plain,
        "ratio": {
            "steps_per_second": plain["seconds"] / ours["seconds"],
            "peak_above_model_bytes": ours["peak_above_model_bytes"] / plain["peak_above_model_bytes"],
        },
        "batch": BATCH,
        "length_tokens": LENGTH,
        "vocabulary": VOCABULARY,
        "threads": torch.get_num_threads(),
    }
    if options.json:
        print(json.dumps(document, indent=2))
        return
    for side in ("ours", "plain"):
        memory = sides[side]["peak_above_model_bytes"] / 2**20
        print(f"{side:6} {sides[side]['seconds'] * 1000:8.0f} ms a step  {memory:8.0f} MiB above the model")
    ratio = document["ratio"]
    print(f"ours: {ratio['steps_per_second']:.2f} times the steps, {ratio['peak_above_model_bytes']:.2f} of the memory")


if __name__ == "__main__":
    main()
