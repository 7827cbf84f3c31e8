"""Several vectors of an input: the last hidden states of all ``<EOS>``, in one model or as a MultiVectorEncoder."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from cocoa_embed.model.template import eos_tokens


class EosVectors(Module):
    """Pools a sequence to the normalised states of its last tokens, side by side and the last token's first.

    :param dimension: The length of a vector.
    :param count: How many vectors.
    """

    def __init__(self, dimension: int, count: int) -> None:
        super().__init__()
        self.dimension, self.count = dimension, count

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Add ``sentence_embedding``, float ``[B, count * dimension]``; padding may be on either side."""
        states, mask = features["token_embeddings"], features["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(dim=1, keepdim=True)
        positions = last - torch.arange(self.count, device=states.device)
        vectors = states.gather(1, positions[:, :, None].expand(-1, -1, self.dimension))
        return {**features, "sentence_embedding": normalize(vectors, dim=2).flatten(1)}

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self.dimension

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Refuse: a folder that names this class would need this package."""
        raise NotImplementedError("save_sentence_transformer writes a model of several vectors")


def count_vectors(model: SentenceTransformer) -> int:
    """Return how many vectors are side by side in an embedding."""
    return next((module.count for module in model if isinstance(module, EosVectors)), 1)


def as_multi_vector_encoder(transformer: Transformer, prompts: dict[str, str]) -> MultiVectorEncoder:
    """Return a stock model of the vectors of all ``eos_tokens``, in the order of the sequence: vector 1 is the last.

    The mask's list of tokens to keep is for documents only; for queries there is one of tokens to drop.
    """
    tokenizer: PreTrainedTokenizerBase = transformer.tokenizer
    keep = eos_tokens(tokenizer)
    mask = MultiVectorMask(
        skiplist_words=sorted(tokenizer.get_vocab().keys() - {*keep}),
        skiplist_tasks="query",
        keep_only_token_ids=[tokenizer.convert_tokens_to_ids(token) for token in keep],
    )
    return MultiVectorEncoder(
        modules=[transformer, mask, Normalize("token_embeddings")], prompts=prompts, similarity_fn_name="meanmaxsim"
    )
