"""``benchmarks/serve_vllm.py`` against a stand-in for vLLM, which renders, tokenizes and pools as vLLM does."""

import base64
import io
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from exported import write_checkpoint
from PIL import Image
from tiny_backbones import every_qwen
from transformers import AutoProcessor

from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import export_model
from cocoa_embed.model.families.registry import FAMILIES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_vllm

    return serve_vllm


@pytest.fixture
def exported(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    return export_model(write_checkpoint(tiny_backbone, tmp_path / "checkpoint"), tmp_path / "model")


class StandIn(BaseHTTPRequestHandler):
    """Embeds messages with the class that ``config.json`` names: no special tokens added, the last token normalised."""

    folder: Path
    family: str

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "the-model"}]})

    @torch.no_grad()
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["model"] == "the-model"
        processor, images = AutoProcessor.from_pretrained(self.folder), []
        for message in request["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url":
                    encoded = part.pop("image_url")["url"].partition(",")[2]
                    part["type"] = "image"
                    images.append(Image.open(io.BytesIO(base64.b64decode(encoded))))
        prompt = processor.apply_chat_template(request["messages"], tokenize=False)
        batch = processor(text=[prompt], images=images or None, add_special_tokens=False, return_tensors="pt")
        model = FAMILIES[self.family].model_class.from_pretrained(self.folder)
        state = model.model(**batch).last_hidden_state[0, -1]
        embedding = torch.nn.functional.normalize(state, dim=0).tolist()
        usage = {"prompt_tokens": batch["input_ids"].shape[1]}
        self.answer({"data": [{"embedding": embedding}], "usage": usage})

    def answer(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url(exported: Path, family: str) -> Iterator[str]:
    handler = type("Handler", (StandIn,), {"folder": exported, "family": family})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", *map(str, arguments)])
    script.main()


@every_qwen
def test_ten_embeddings_and_their_tokens_are_those_of_sentence_transformers(
    script: ModuleType,
    url: str,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (exported, "--url", url, "--dtype", "float32", "--json")
    run(script, monkeypatch, *options)
    report = json.loads(capsys.readouterr().out)
    assert len(report["cosines"]) == 10
    assert report["least_cosine"] > 0.9999
    template = exported / "chat_template.jinja"
    template.write_text(template.read_text().partition("{%- if not sep_token")[0])
    with pytest.raises(SystemExit, match="numbers of tokens differ"):
        run(script, monkeypatch, *options)


@pytest.mark.skipif(bool(shutil.which("vllm")), reason="vLLM is installed")
def test_a_missing_vllm_is_reported(script: ModuleType, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"vLLM is not installed here: pip install vllm, or .* --url"):
        run(script, monkeypatch, exported)
