"""A SentenceTransformer around a backbone that is loaded already."""

from tempfile import TemporaryDirectory
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import PreTrainedConfig, PreTrainedModel

from cocoa_embed.model.attention import assert_bidirectional
from cocoa_embed.model.backbone import Backbone
from cocoa_embed.model.export import embedding_model


def as_sentence_transformer(
    backbone: Backbone, *, prompts: dict[str, str], bidirectional: bool = True
) -> SentenceTransformer:
    """Return ``normalize(hidden[<EOS>])`` over a backbone, whose weights it shares, as a SentenceTransformer.

    :param prompts: Instructions for ``query`` and ``document``, stored with the model.
    :param bidirectional: False for a backbone that was left causal.
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
    if bidirectional:
        assert_bidirectional(model)
    return embedding_model(module, prompts)
