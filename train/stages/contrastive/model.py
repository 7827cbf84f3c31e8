"""The model of stage 3: a SentenceTransformer around a loaded backbone, and its probe."""

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.data.rows import Item, Row
from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import EosVectors, embedding_model
from cocoa_embed.train.loop.trainer import Measure
from cocoa_embed.train.settings import RunSettings
from cocoa_embed.train.stages.contrastive.inputs import normalise_patches, prepare_forward, preprocess_items
from cocoa_embed.train.stages.probe import geometry_probe


def as_sentence_transformer(backbone: Backbone, run: RunSettings) -> SentenceTransformer:
    """Return the embedding model over a backbone, whose weights it shares, with the run's prompts and pooling.

    With several ``eos_tokens``, it embeds as ``EosVectors`` does; a saved model has no hooks, and gives vector 1.
    """
    model: Any = backbone.model.base_model

    class Loaded(Transformer):
        """The stock module, which would load config and weights from its folder."""

        def _load_config(self, *args: Any, **kwargs: Any) -> tuple[PreTrainedConfig, bool]:
            return model.config, False

        def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
            return model

    with TemporaryDirectory() as folder:
        backbone.processor.save_pretrained(folder)
        module = Loaded(folder)
    object.__setattr__(module, "__class__", Transformer)  # a saved model names the classes of its modules
    module.register_forward_pre_hook(partial(normalise_patches, backbone.processor))
    module.register_forward_pre_hook(prepare_forward, with_kwargs=True)
    if run.bidirectional:
        assert_bidirectional(model)
    embedding = embedding_model(module, run.prompts.model_dump(), run.pooling)
    if run.eos_tokens > 1:
        vectors = EosVectors(module.get_embedding_dimension(), run.eos_tokens)
        embedding[-1].register_forward_hook(partial(_pool, vectors))
    return embedding


def _pool(vectors: EosVectors, module: nn.Module, args: Any, features: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    return vectors(features)  # type: ignore[no-any-return]


def embedding_probe(model: SentenceTransformer, rows: Sequence[Row], batch_size: int) -> Measure:
    """Return a probe of the geometry of a SentenceTransformer's embeddings, with its own prompts.

    If a model has several vectors, the probe measures the first.

    :param rows: Two rows or more.
    :param batch_size: Items to run at once.
    """
    width = model.get_embedding_dimension()

    def collate(items: Sequence[Item], is_document: bool) -> dict[str, Any]:
        prompt = model.prompts.get("document" if is_document else "query") or None
        module: Any = model[0]  # may be that of a loaded checkpoint, which lacks the hook
        return normalise_patches(module.processor, module, (preprocess_items(model, items, prompt=prompt),))[0]

    def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        embeddings: Tensor = model(batch)["sentence_embedding"]
        return embeddings[:, :width]

    return geometry_probe(collate, embed, rows, batch_size)
