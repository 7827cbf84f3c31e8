"""Run a model in mteb 2 as it is, on an image folder of your own: text to image, and image to text.

    pip install 'mteb>=2'
    python examples/mteb_evaluation.py cocoa-qwen2vl path/to/images

The folder holds images and a metadata.jsonl with file_name and text in each line. Nothing of cocoa-embed is needed:
mteb loads the SentenceTransformer itself, and asks it for queries and documents, each with its own prompt. What mteb
cannot see of a local model (it can of one on the hub) is that it takes images: its description, a ModelMeta, says so.
"""

import json
import sys
from pathlib import Path

import mteb
from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

Scores = dict[str, float]
SHOWN = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr_at_10", "ndcg_at_10")


def task_metadata(name: str, category: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="Captions and images of a local folder.",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        type="Any2AnyRetrieval",
        category=category,
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """Return each text with the path of its image."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [(row["text"], str(folder / row["file_name"])) for row in rows]


class LocalRetrieval(AbsTaskRetrieval):
    """A task over pairs that are here already; the base class would fetch them from the hub."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        super().__init__()
        texts = {text: f"text-{number}" for number, text in enumerate(dict.fromkeys(text for text, _ in pairs))}
        images = {path: f"image-{number}" for number, path in enumerate(dict.fromkeys(path for _, path in pairs))}
        text_set = Dataset.from_dict({"id": list(texts.values()), "text": list(texts)})
        image_set = Dataset.from_dict(
            {"id": list(images.values()), "image": list(images)},
            features=Features({"id": Value("string"), "image": Image()}),
        )
        from_text = self.metadata.category == "t2i"
        relevant: dict[str, dict[str, int]] = {}
        for text, path in pairs:
            query, document = (texts[text], images[path]) if from_text else (images[path], texts[text])
            relevant.setdefault(query, {})[document] = 1
        queries, corpus = (text_set, image_set) if from_text else (image_set, text_set)
        split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class LocalTextToImage(LocalRetrieval):
    metadata = task_metadata("LocalTextToImage", "t2i")


class LocalImageToText(LocalRetrieval):
    metadata = task_metadata("LocalImageToText", "i2t")


def describe_model(folder: str) -> ModelMeta:
    return ModelMeta.create_empty(
        {
            "name": str(Path(folder).absolute()),
            "loader": SentenceTransformerEncoderWrapper,
            "modalities": ["text", "image"],
        }
    )


def evaluate(model: str, folder: Path) -> dict[str, Scores]:
    """Return mteb's scores by task."""
    pairs = read_pairs(folder)
    tasks = [LocalTextToImage(pairs), LocalImageToText(pairs)]
    # Without a cache: mteb knows a local model by its path alone, and would take an older model's scores for its own.
    results = mteb.evaluate(describe_model(model), tasks, cache=None, show_progress_bar=False)
    return {result.task_name: result.scores["test"][0] for result in results.task_results}


def main(model: str, folder: str) -> None:
    for task, scores in evaluate(model, Path(folder)).items():
        print(f"{task}: {', '.join(f'{name} {scores[name]:.3f}' for name in SHOWN)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
