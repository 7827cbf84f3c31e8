"""The model card: how a model was trained and on what, what was measured, and how to use it."""

import json
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import ProcessorMixin

from cocoa_embed.model.attention import TRANSFORMERS_FLOOR
from cocoa_embed.model.families.registry import family_of_images

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

A multimodal embedding model: texts, images, and images with text become {vectors} of {dimension} dimensions in one
space; {comparison} compares them. A vision-language model ({backbone}) was {attention} and trained
{pooled} {holds} the content.

## Use

```python
from PIL import Image
from sentence_transformers import {kind}

model = {kind}("{name}")
queries = model.encode_query([{{"text": "what to look for"}}])
documents = model.encode_document([
    {{"image": Image.open("photo.jpg")}},
    {{"text": "a text"}},
    {{"image": Image.open("photo.jpg"), "text": "an image with a text"}},
])
print(model.similarity(queries, documents))
```

It needs sentence-transformers 6.2 and transformers {transformers_floor}, or newer, and refuses older ones. It has no
custom code.

{several}Prompts are stored with the model: `encode_query` puts {query_prompt} before a query, `encode_document` puts
{document_prompt} before a document. Sequences are cut at {max_length} tokens, but never their images or their `{eos}`;
larger images are scaled down to {max_pixels} pixels.

## Training

{training}

Data: {data}. Seed {seed}. The whole recipe is in `cocoa_training.json`.

## Results

{results}
"""

POOLED = {
    "eos": "with [CoCoA](https://arxiv.org/abs/2603.01471) so that the last hidden state of `{eos}`",
    "mean": "so that the mean of the last hidden states of all tokens",
}
"""What the model was trained for, for each ``pooling``: the words before "holds the content"."""

_SEVERAL = """\
Open it with `MultiVectorEncoder`. A `SentenceTransformer` opens it, too, without an error, but its embedding is then
the mean of all tokens, which the model is not trained for. Of the {count} vectors of an input the last, the state of
`{eos}`, is an embedding by itself; so are the last two together, and so on. `cocoa-embed export CHECKPOINT OUT
--vectors 1` writes the model of this one vector, as a `SentenceTransformer`.

"""

_METRICS = ("recall@1", "recall@5", "recall@10", "mrr")


def model_card(name: str, model: SentenceTransformer, training: dict[str, Any]) -> str:
    """Return the README of an exported model, in Markdown.

    :param training: ``backbone`` and its ``origin``, ``recipe``, ``data``, ``stages`` (a list of ``stage``, ``steps``,
        ``batch_size``, ``learning_rate``, ``final``, ``adapter``, and optionally ``description`` and
        ``matryoshka_dims``), and optionally ``results`` (the metrics of each evaluation) and the number of ``vectors``.
    """
    # A trained model has its backbone's licence, which is unknown unless the backbone is built in.
    hub = f"base_model: {json.dumps(training['backbone'])}\n"
    origin_lines = {"hub": hub, "built-in": "license: apache-2.0\n", "folder": ""}
    recipe = training["recipe"]
    processor: ProcessorMixin = model.processor
    count, eos = training.get("vectors", 1), processor.tokenizer.eos_token
    before = f" and of the {count - 1} tokens before it" if count > 1 else ""
    return _CARD.format(
        name=name,
        backbone=training["backbone"],
        attention="made bidirectional" if recipe["bidirectional"] else "left causal, for comparison,",
        transformers_floor=TRANSFORMERS_FLOOR,
        origin=origin_lines[training["origin"]],
        dimension=model.get_embedding_dimension(),
        vectors="unit vectors" if count == 1 else f"{count} unit vectors each",
        comparison="cosine similarity"
        if count == 1
        else "the mean, over a query's vectors, of the best cosine to one of a document's",
        kind="SentenceTransformer" if count == 1 else "MultiVectorEncoder",
        several="" if count == 1 else _SEVERAL.format(count=count, eos=eos),
        pooled=POOLED[recipe["pooling"]].format(eos=eos) + before,
        holds="holds" if count == 1 else "hold",
        eos=eos,
        query_prompt=_quoted(recipe["prompts"]["query"]),
        document_prompt=_quoted(recipe["prompts"]["document"]),
        max_length=model.max_seq_length,
        max_pixels=family_of_images(processor).most_pixels(processor),
        training=_training_text(name if count == 1 else None, training["stages"], model.get_embedding_dimension()),
        data=training["data"],
        seed=recipe["seed"],
        results=_result_table(training.get("results", {})),
    )


def _quoted(prompt: str) -> str:
    return f'"{prompt}"' if prompt else "nothing"


def _training_text(name: str | None, stages: list[dict[str, Any]], dimension: int | None) -> str:
    if not stages:
        return "No stage was run: these are the backbone's weights."
    rows = [
        (
            *(stage[name] for name in ("stage", "steps", "batch_size")),
            f"{stage['learning_rate']:g}",
            f"{stage['final']['loss']:.3f}",
        )
        for stage in stages
    ]
    adapters = [
        f"{stage['stage']} {adapter['kind']} (r {adapter['r']}, alpha {adapter['alpha']})"
        for stage in stages
        if (adapter := stage["adapter"])
    ]
    parts = [
        _table(("stage", "steps", "batch", "learning rate", "final loss"), rows),
        f"Adapters, merged into the weights at the end of their stage: {', '.join(adapters)}." if adapters else "",
        *(stage.get("description", "") for stage in stages),
        *(_matryoshka_text(name, stage.get("matryoshka_dims") or [], dimension) for stage in stages),
    ]
    return "\n\n".join(filter(None, parts))


def matryoshka_dimensions(training: dict[str, Any], dimension: int | None) -> list[int]:
    """Return the dimensions that embeddings can be cut to, largest first; an empty list if none were trained.

    :param training: The training record.
    :param dimension: The dimension of whole embeddings.
    """
    trained = {dim for stage in training["stages"] for dim in stage.get("matryoshka_dims") or []}
    return sorted(trained | ({dimension} if trained and dimension else set()), reverse=True)


def _matryoshka_text(name: str | None, matryoshka_dims: list[int], dimension: int | None) -> str:
    dims = [f"{dim}" for dim in sorted(matryoshka_dims, reverse=True) if dim != dimension]
    if not dims:
        return ""
    if name is None:
        return f"The first {' or '.join(dims)} values of the last vector, normalised again, are an embedding too."
    return (
        f"The first {' or '.join(dims)} values of an embedding, normalised again, are an embedding too: load the model "
        f'with `SentenceTransformer("{name}", truncate_dim={dims[0]})` and encode with `normalize_embeddings=True`.'
    )


def _result_table(results: dict[str, dict[str, float]]) -> str:
    if not results:
        return "Nothing was measured when this model was exported."
    rows = [(name, *(f"{metrics[metric]:.3f}" for metric in _METRICS)) for name, metrics in results.items()]
    return _table(("evaluation", *_METRICS), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows))
