"""Search a running server from several clients at once, and compare its speed with that of the model alone.

    python benchmarks/serve.py [--json]
    python benchmarks/serve.py --model cocoa-qwen2vl --folder /path/to/photos --clients 16

The images are indexed into a local folder, which ``cocoa-embed serve`` then serves in a separate process. Each client
has one connection and sends one search after the other: texts, and every fourth time an image. The model alone embeds
the same queries in this process, before the server starts: one by one, and as many at once as there are clients. CPU
time (on Linux) says more than wall-clock time on a machine that does other things.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from cocoa_embed.cli.output import silence_libraries
from cocoa_embed.demo.scenes import write_image_folder
from cocoa_embed.encode.encoder import Encoder, ModelInput, make_input
from cocoa_embed.images.find_files import find_images
from cocoa_embed.integrations.qdrant import QdrantIndexer
from cocoa_embed.model.loading import load_model
from shared.measuring import best_device, machine, seconds_of
from shared.models import TOKENIZER, untrained_model
from shared.output import command_line, report

DRAWN_SCENES = 500
WORDS = ("red", "green", "blue", "yellow", "circle", "square", "star", "ring", "large", "small")


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--model", help="a SentenceTransformer folder; by default the demo's backbone")
    parser.add_argument("--folder", help="a folder of images; without it, scenes of the demo are drawn")
    parser.add_argument("--clients", type=int, default=16, help="connections at once")
    parser.add_argument("--searches", type=int, default=50, help="searches of each client")
    parser.add_argument("--device", help="the torch device; by default the fastest")
    return parser.parse_args()


def write_model(folder: Path) -> str:
    untrained_model(folder / "backbone").save(str(folder / "model"))
    return str(folder / "model")


def make_queries(files: Sequence[str], count: int) -> list[tuple[str | None, str | None]]:
    """Return texts and, at every fourth place, the name of an image file."""
    choose = np.random.default_rng(0).choice
    return [
        (None, str(choose(files))) if number % 4 == 3 else (" ".join(choose(WORDS, 4)), None) for number in range(count)
    ]


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Run the server in a separate process; yield its host, its port and its process id."""
    command = [sys.executable, "-m", "cocoa_embed.cli", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if line.startswith("serving at ")), None)
        if line is None:
            raise SystemExit("the server did not start")
        address = urlsplit(line.split()[2])
        yield str(address.hostname), int(address.port or 0), process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(host: str, port: int, bodies: Sequence[str]) -> list[float]:
    """Send one search after the other over one connection; return the seconds of each."""
    connection = HTTPConnection(host, port)

    def search(body: str) -> None:
        connection.request("POST", "/search", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {answer.decode()}")

    return [seconds_of(lambda body=body: search(body)) for body in bodies]  # type: ignore[misc]


def to_body(query: tuple[str | None, str | None]) -> str:
    text, file = query
    uri = None if file is None else f"data:;base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
    return json.dumps({"text": text, "image": uri})


def alone(encoder: Encoder, inputs: Sequence[ModelInput], at_once: int) -> tuple[float, float]:
    """Return the queries per second of the model without a server, and the CPU seconds per query."""
    encoder.embed_queries(inputs[:at_once])
    started, cpu = time.perf_counter(), cpu_seconds(os.getpid())
    for start in range(0, len(inputs), at_once):
        encoder.embed_queries(inputs[start : start + at_once])
    cpu = cpu_seconds(os.getpid()) - cpu
    return len(inputs) / (time.perf_counter() - started), cpu / len(inputs)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = options.model or write_model(folder)
    photos = options.folder or str(folder / "scenes")
    if options.folder is None:
        write_image_folder(folder / "scenes", "train", DRAWN_SCENES, seed=0)
    device = torch.device(options.device) if options.device else best_device()
    encoder = Encoder(load_model(model, str(device)), model)
    with QdrantIndexer(encoder, path=folder / "index") as indexer:
        indexed = indexer.index(photos).indexed
    queries = make_queries([str(path) for path in find_images([photos])], options.clients * options.searches)
    inputs = [make_input(text, file) for text, file in queries]
    model_alone = {"one_by_one": alone(encoder, inputs, 1), "at_once": alone(encoder, inputs, options.clients)}
    bodies = list(map(to_body, queries))
    chosen = ["--device", options.device] if options.device else []
    with server([model, "--path", str(folder / "index"), *chosen]) as (host, port, process):
        one = ask(host, port, bodies[: options.searches])
        shares = [bodies[number :: options.clients] for number in range(options.clients)]
        with ThreadPoolExecutor(options.clients) as pool:
            started, cpu = time.perf_counter(), cpu_seconds(process)
            times = [each for seconds in pool.map(lambda share: ask(host, port, share), shares) for each in seconds]
            rate = len(times) / (time.perf_counter() - started)
            cpu = (cpu_seconds(process) - cpu) / len(times)
    return {
        "model": options.model or TOKENIZER,
        "images": indexed,
        "clients": options.clients,
        "searches": len(times),
        "searches_per_second": rate,
        "p50_milliseconds": 1000 * float(np.percentile(times, 50)),
        "p99_milliseconds": 1000 * float(np.percentile(times, 99)),
        "one_client_p50_milliseconds": 1000 * float(np.percentile(one, 50)),
        "cpu_milliseconds": 1000 * cpu,
        **{f"model_alone_{name}_per_second": each[0] for name, each in model_alone.items()},
        **{f"model_alone_{name}_cpu_milliseconds": 1000 * each[1] for name, each in model_alone.items()},
        "ratio": {name: rate / other for name, (other, _) in model_alone.items()},
        **machine(device),
    }


def main() -> None:
    options = parse()
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        report(compare(options, Path(folder)), show, as_json=options.json)


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {result['images']} images, {result['device']}, {result['cores']} cores")
    print(f"one client      p50 {result['one_client_p50_milliseconds']:.0f} ms")
    p50, p99 = result["p50_milliseconds"], result["p99_milliseconds"]
    print(f"{result['clients']} clients      p50 {p50:.0f} ms, p99 {p99:.0f} ms, {result['searches_per_second']:.0f}/s")
    print(f"CPU time        {result['cpu_milliseconds']:.1f} ms per search")
    for name, ratio in result["ratio"].items():
        speed, cpu = result[f"model_alone_{name}_per_second"], result[f"model_alone_{name}_cpu_milliseconds"]
        print(f"model alone     {speed:.0f}/s {name} (ratio {ratio:.2f}), {cpu:.1f} ms of CPU time per query")


if __name__ == "__main__":
    main()
