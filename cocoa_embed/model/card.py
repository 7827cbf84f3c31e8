"""The model card: how a model was trained, on what, what was measured, how to use it."""

import json
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import ProcessorMixin

from cocoa_embed.model.attention import TRANSFORMERS_FLOOR
from cocoa_embed.model.backbone import Origin
from cocoa_embed.model.training_record import is_bidirectional

_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- multimodal
- feature-extraction
- cocoa
{origin}---

# {name}

A multimodal embedding model: texts, images, and images with text become unit vectors of {dimension} dimensions in one
space; cosine similarity compares them. It was made with [CoCoA](https://arxiv.org/abs/2603.01471): a vision-language
model ({backbone}) {attention} and trained so that the last hidden state of `{eos}` holds the content.

## Use

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query([{{"text": "what to look for"}}])
documents = model.encode_document([
    {{"image": Image.open("photo.jpg")}},
    {{"text": "a text"}},
    {{"image": Image.open("photo.jpg"), "text": "an image with a text"}},
])
print(model.similarity(queries, documents))
```

It needs transformers {transformers_floor} or newer: earlier ones load it without a word and may embed wrongly.

Prompts are stored with the model: `encode_query` puts {query_prompt} before a query, `encode_document` puts
{document_prompt} before a document. Sequences are cut at {max_length} tokens, but never their images or their `{eos}`;
larger images are scaled down to {max_pixels} pixels.

## Training

{training}

Data: {data}. Seed {seed}. The whole recipe is in `cocoa_training.json`.

## Results

{results}
"""

_KINDS = {"lora": "LoRA", "dora": "DoRA"}

_METRICS = ("recall@1", "recall@5", "recall@10", "mrr")


def model_card(name: str, model: SentenceTransformer, training: dict[str, Any]) -> str:
    """Return the README of an exported model, in Markdown.

    :param training: ``backbone`` and its ``origin``, ``recipe`` (as saved),
        ``stages`` (list of ``stage``, ``steps``, ``batch_size``, ``learning_rate``, ``final``, ``adapter`` and, where
        a stage has them, ``description`` and ``matryoshka_dims``), and ``results`` (name of the evaluation to its
        metrics) where something was measured.
    """
    recipe = training["recipe"]
    processor: ProcessorMixin = model.processor
    return _CARD.format(
        name=name,
        backbone=training["backbone"],
        attention="made bidirectional" if is_bidirectional(training) else "left causal, for comparison,",
        transformers_floor=TRANSFORMERS_FLOOR,
        origin=_origin_line(training["backbone"], training["origin"]),
        dimension=model.get_embedding_dimension(),
        eos=processor.tokenizer.eos_token,
        query_prompt=_quoted(recipe["prompts"]["query"]),
        document_prompt=_quoted(recipe["prompts"]["document"]),
        max_length=model.max_seq_length,
        max_pixels=processor.image_processor.size["longest_edge"],
        training="\n\n".join(_training_parts(name, training, model.get_embedding_dimension())),
        data=training.get("data", "not recorded"),
        seed=recipe["seed"],
        results=_result_table(training.get("results", {})),
    )


def _origin_line(backbone: str, origin: Origin) -> str:
    """Return the front matter's line for a backbone on the hub, or the licence of one that ships with this package.

    A trained model's licence is its backbone's: of one from elsewhere it is not known here.
    """
    lines = {"hub": f"base_model: {json.dumps(backbone)}\n", "built-in": "license: apache-2.0\n", "folder": ""}
    return lines[origin]


def _quoted(prompt: str) -> str:
    return f'"{prompt}"' if prompt else "nothing"


def _training_parts(name: str, training: dict[str, Any], dimension: int | None) -> list[str]:
    stages, recipe = training["stages"], training["recipe"]
    parts = [_stage_table(stages), _adapter_text(stages, recipe)]
    for stage in stages:
        parts += [stage.get("description", ""), _matryoshka_text(name, stage.get("matryoshka_dims"), dimension)]
    return [part for part in parts if part]


def _stage_table(stages: list[dict[str, Any]]) -> str:
    if not stages:
        return "No stage was run: these are the backbone's weights."
    lines = ["| stage | steps | batch | learning rate | loss at its end |", "|---|---|---|---|---|"]
    lines += [
        f"| {stage['stage']} | {stage['steps']} | {stage['batch_size']} | {stage['learning_rate']:g} "
        f"| {_loss(stage['final'])} |"
        for stage in stages
    ]
    return "\n".join(lines)


def _loss(final: dict[str, float]) -> str:
    """Return the last loss that was logged; weights kept before the first line have none."""
    return f"{final['loss']:.3f}" if "loss" in final else "–"


def _adapter_text(stages: list[dict[str, Any]], recipe: dict[str, Any]) -> str:
    """Return which stages trained adapters; a stage's own record comes before the recipe, which is the last run's."""
    adapters = [
        f"{stage['stage']} {_KINDS[adapter['kind']]} (r {adapter['r']}, alpha {adapter['alpha']})"
        for stage in stages
        if (adapter := stage.get("adapter", (recipe.get(stage["stage"]) or {}).get("adapter")))
    ]
    if not adapters:
        return ""
    return f"Adapters, merged into the weights at the end of their stage: {', '.join(adapters)}."


def _matryoshka_text(name: str, given: list[int] | None, dimension: int | None) -> str:
    dims = [f"{dim}" for dim in sorted(given or [], reverse=True) if dim != dimension]
    if not dims:
        return ""
    return (
        f"The first {' or '.join(dims)} values of an embedding, normalised again, are an embedding too: load the model "
        f'with `SentenceTransformer("{name}", truncate_dim={dims[0]})` and give `normalize_embeddings=True` where you '
        "encode."
    )


def _result_table(results: dict[str, dict[str, float]]) -> str:
    if not results:
        return "Nothing was measured when this model was exported."
    lines = [f"| evaluation | {' | '.join(_METRICS)} |", f"|---|{'---|' * len(_METRICS)}"]
    lines += [
        f"| {name} | {' | '.join(f'{metrics[metric]:.3f}' for metric in _METRICS)} |"
        for name, metrics in results.items()
    ]
    return "\n".join(lines)
