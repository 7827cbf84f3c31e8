"""Serve an exported model with vLLM and compare ten of its embeddings with those of sentence-transformers.

    python benchmarks/serve_vllm.py cocoa-qwen2vl [--json]
    python benchmarks/serve_vllm.py cocoa-qwen2vl --url http://localhost:8000

The command ``vllm`` is started on a free port of this machine, unless ``--url`` names a running server. It is sent
texts, images, and images with a text, as queries and as documents, in the form of messages. For each, the two numbers
of tokens are compared, and the cosine of the two embeddings is checked. Exit status 1: they differ, or there is no vLLM
or no GPU here.
"""

import argparse
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import httpx
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from cocoa_embed.demo.scenes import captions, distinct_scenes, draw
from cocoa_embed.images.data_uri import data_uri
from cocoa_embed.model.loading import load_model
from shared.measuring import best_device, machine
from shared.output import command_line, report

LEAST_COSINE = 0.99
"""Both sides compute in bfloat16, but with different kernels."""


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("model", help="a folder that cocoa-embed export wrote")
    parser.add_argument("--url", help="a running vLLM server that serves it")
    parser.add_argument("--dtype", default="bfloat16", help="the dtype of both sides")
    parser.add_argument("--patience", type=int, default=600, help="the maximum seconds that vLLM may take to start")
    return parser.parse_args()


def inputs() -> list[tuple[str, dict[str, Any]]]:
    """Return ten inputs, each with the name of its prompt."""
    generator = random.Random(0)
    scenes = list(islice(distinct_scenes(generator, "held-out"), 4))
    texts = [{"text": captions(scene)[0]} for scene in scenes]
    images = [{"image": draw(scene, generator)} for scene in scenes]
    both = [images[0] | texts[1], images[1] | texts[0]]
    return [("query", item) for item in [*texts, both[0]]] + [("document", item) for item in [*images, both[1]]]


def messages(prompt: str, item: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an input as messages of vLLM's embeddings API, with the prompt as the system message."""
    content: list[dict[str, Any]] = []
    if "image" in item:
        content.append({"type": "image_url", "image_url": {"url": data_uri(item["image"])}})
    if "text" in item:
        content.append({"type": "text", "text": item["text"]})
    system = [{"role": "system", "content": prompt}] if prompt else []
    return [*system, {"role": "user", "content": content}]


@contextmanager
def vllm_server(model: str, dtype: str, patience: int) -> Iterator[str]:
    """Start vLLM for a model and return its address once it answers; stop it afterwards."""
    if not shutil.which("vllm"):
        raise SystemExit("vLLM is not installed here: pip install vllm, or name a running server with --url")
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here, which vLLM needs; name a running server with --url")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm", "serve", model, "--runner", "pooling", "--chat-template-content-format", "openai"]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.5"]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + patience
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"vLLM does not serve {model}: see its messages above")
                time.sleep(2)
            yield url
        finally:
            process.terminate()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def compare(url: str, model: SentenceTransformer) -> dict[str, Any]:
    """Return the cosines between the embeddings of both sides, and the numbers of tokens of each input."""
    served = httpx.get(f"{url}/v1/models", timeout=60).raise_for_status().json()["data"][0]["id"]
    cosines, tokens, tokens_of_vllm = [], [], []
    for name, item in inputs():
        prompt = model.prompts.get(name) or ""
        request = {"model": served, "messages": messages(prompt, item), "encoding_format": "float"}
        answer = httpx.post(f"{url}/v1/embeddings", json=request, timeout=300).raise_for_status().json()
        theirs, ours = np.array(answer["data"][0]["embedding"]), model.encode(item, prompt_name=name)
        cosines.append(float(theirs @ ours / np.linalg.norm(theirs) / np.linalg.norm(ours)))
        tokens.append(model.preprocess([item], prompt=prompt or None)["input_ids"].shape[1])
        tokens_of_vllm.append(answer["usage"]["prompt_tokens"])
    return {"cosines": cosines, "tokens": tokens, "tokens_of_vllm": tokens_of_vllm}


def main() -> None:
    options = parse()
    if options.url:
        found = compare(options.url, load_model(options.model, dtype=options.dtype))
    else:
        with vllm_server(options.model, options.dtype, options.patience) as url:
            found = compare(url, load_model(options.model, dtype=options.dtype))
    least = min(found["cosines"])
    result = {"model": options.model, "least_cosine": least, **found, **machine(best_device())}
    report(result, show, as_json=options.json)
    if found["tokens"] != found["tokens_of_vllm"]:
        raise SystemExit(f"the numbers of tokens differ: {found['tokens']} here, {found['tokens_of_vllm']} in vLLM")
    if least < LEAST_COSINE:
        raise SystemExit(f"the embeddings differ: a cosine of {least:.4f} is below {LEAST_COSINE}")


def show(result: dict[str, Any]) -> None:
    print(f"least cosine {result['least_cosine']:.4f} of {len(result['cosines'])} embeddings")


if __name__ == "__main__":
    main()
