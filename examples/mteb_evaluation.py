"""Run an exported model in mteb 2 on your own image folder: text to image, and image to text.

    pip install 'mteb>=2'
    python examples/mteb_evaluation.py cocoa-qwen2vl path/to/images

The folder holds images and a metadata.jsonl with file_name and text in each line. cocoa-embed is not needed: mteb loads
the SentenceTransformer itself and applies its prompts for queries and documents. mteb cannot detect that a local model
embeds images, so this script says so in a ModelMeta.
"""

import hashlib
import json
import sys
from pathlib import Path

import mteb
from datasets import Dataset, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

Scores = dict[str, float]
SHOWN = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr_at_10", "ndcg_at_10")


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """Return each text with the path of its image; files with the same content are one image."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8-sig").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    first: dict[bytes, str] = {}
    pairs = []
    for row in rows:
        path = folder / row["file_name"]
        digest = hashlib.sha256(path.read_bytes()).digest()
        pairs.append((row["text"], first.setdefault(digest, str(path))))
    return pairs


class LocalRetrieval(AbsTaskRetrieval):
    """A task over local pairs; the base class would download them."""

    def __init__(self, name: str, category: str, pairs: list[tuple[str, str]]) -> None:
        self.metadata = TaskMetadata(
            name=name,
            description="Captions and images of a local folder.",
            dataset={"path": "local", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )
        super().__init__()
        texts = {text: f"text-{number}" for number, text in enumerate(dict.fromkeys(text for text, _ in pairs))}
        images = {path: f"image-{number}" for number, path in enumerate(dict.fromkeys(path for _, path in pairs))}
        text_set = Dataset.from_dict({"id": list(texts.values()), "text": list(texts)})
        image_set = Dataset.from_dict({"id": list(images.values()), "image": list(images)}).cast_column(
            "image", Image()
        )
        relevant: dict[str, dict[str, int]] = {}
        for text, path in pairs:
            query, document = (texts[text], images[path]) if category == "t2i" else (images[path], texts[text])
            relevant.setdefault(query, {})[document] = 1
        queries, corpus = (text_set, image_set) if category == "t2i" else (image_set, text_set)
        split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def evaluate(model: str, folder: Path) -> dict[str, Scores]:
    """Return mteb's scores by task."""
    pairs = read_pairs(folder)
    tasks = [LocalRetrieval("LocalTextToImage", "t2i", pairs), LocalRetrieval("LocalImageToText", "i2t", pairs)]
    name, loader = str(Path(model).absolute()), SentenceTransformerEncoderWrapper
    description = ModelMeta.create_empty({"name": name, "loader": loader, "modalities": ["text", "image"]})
    # No cache: mteb identifies a local model by its path only, and would reuse the scores of an older one.
    results = mteb.evaluate(description, tasks, cache=None, show_progress_bar=False)
    return {result.task_name: result.scores["test"][0] for result in results.task_results}


def main(model: str, folder: str) -> None:
    for task, scores in evaluate(model, Path(folder)).items():
        print(f"{task}: {', '.join(f'{name} {scores[name]:.3f}' for name in SHOWN)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
