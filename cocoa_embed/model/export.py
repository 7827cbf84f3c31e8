"""Export a checkpoint as a SentenceTransformer folder with a model card; servers can load it, too."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Module
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.sentence_transformer.modules.pooling import PoolingMode
from transformers import AutoModelForImageTextToText, PreTrainedModel

from cocoa_embed.errors import CocoaError, UsageError, one_line, printable
from cocoa_embed.folders import claim_folder, only_writer, refuse_checkpoint
from cocoa_embed.model.attention import TRANSFORMERS_FLOOR, assert_bidirectional, is_causal
from cocoa_embed.model.card import matryoshka_dimensions, model_card
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.template import append_eos, chat_template, eos_settings, eos_tokens
from cocoa_embed.model.training_record import TRAINING_FILE, read_training, vectors_of, write_training

REQUIREMENTS = {
    "transformers": {
        "specifier": f">={TRANSFORMERS_FLOOR}",
        "reason": "Earlier ones attend causally or misplace images, without an error.",
    },
    "sentence-transformers": {
        "specifier": ">=6.2",
        "reason": "Earlier ones fail on batches that mix texts and images.",
    },
    "torchvision": {"specifier": ">=0.21", "reason": "The image processor needs it."},
}
"""What sentence-transformers verifies before it loads an export."""

POOLING_MODES: Mapping[str, PoolingMode] = MappingProxyType({"eos": "lasttoken", "mean": "mean"})
"""The mode of sentence-transformers for each ``pooling``; the mean is over all tokens, also visual ones and prompts."""

OLD_MODULES = "sentence_transformers.models."
"""The modules' path in sentence-transformers before 5.4, which newer versions still resolve."""

POOLING_FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
"""Each is a key ``pooling_mode_...`` in a pooling config of sentence-transformers before 5.4."""


class EosVectors(Module):
    """Pools a sequence to the normalised states of its last tokens, concatenated, starting with the last token's.

    :param dimension: The length of a vector.
    :param count: The number of vectors.
    """

    def __init__(self, dimension: int, count: int) -> None:
        super().__init__()
        self.dimension, self.count = dimension, count

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding``, float ``[B, count * dimension]``; padding may be on either side."""
        states, mask = features["token_embeddings"], features["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(dim=1, keepdim=True)
        positions = last - torch.arange(self.count, device=states.device)
        vectors = states.gather(1, positions[:, :, None].expand(-1, -1, self.dimension))
        return {**features, "sentence_embedding": torch.nn.functional.normalize(vectors, dim=2).flatten(1)}

    def get_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self.dimension

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Refuse: a folder that names this class would need this package."""
        raise NotImplementedError("save_sentence_transformer writes a model of several vectors")


def count_vectors(model: SentenceTransformer) -> int:
    """Return how many vectors an embedding concatenates."""
    return next((module.count for module in model if isinstance(module, EosVectors)), 1)


def build_sentence_transformer(
    checkpoint: Path,
    *,
    prompts: dict[str, str],
    bidirectional: bool = True,
    pooling: str = "eos",
    vectors: int | None = None,
    device: str | None = None,
    model_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> SentenceTransformer:
    """Return a SentenceTransformer over the backbone in ``checkpoint``.

    :param prompts: The prompts for ``query`` and ``document``, stored with the model.
    :param bidirectional: False for a checkpoint that was trained causal, as a baseline.
    :param pooling: One of ``POOLING_MODES``.
    :param vectors: How many vectors an embedding concatenates: 1, or all ``eos_tokens``, which is the default.
    :param device: The torch device; None takes the fastest.
    :param model_kwargs: More keyword arguments for transformers, such as ``dtype``.
    :raises CocoaError: If it cannot be loaded, or is causal although it should be bidirectional.
    """
    try:
        transformer = Transformer(str(checkpoint), model_kwargs={"attn_implementation": "sdpa", **model_kwargs})
    except (OSError, SafetensorError) as error:
        raise CocoaError(f"{checkpoint} cannot be loaded ({one_line(error)}): the checkpoint is incomplete.") from error
    processor = transformer.processor
    # A checkpoint may be older than this template.
    processor.chat_template = chat_template(processor.tokenizer, family_of_images(processor).markers)
    append_eos(processor.tokenizer)
    if bidirectional:
        assert_bidirectional(transformer.auto_model)
    count = len(eos_tokens(processor.tokenizer)) if vectors is None else vectors
    return embedding_model(transformer, prompts, pooling, device, count)


def embedding_model(
    transformer: Transformer, prompts: dict[str, str], pooling: str, device: str | None = None, vectors: int = 1
) -> SentenceTransformer:
    """Return the model that embeds as the normalised last hidden state of ``<EOS>``, or the mean of all tokens'.

    :param pooling: One of ``POOLING_MODES``.
    :param vectors: If there are several ``<EOS>``, how many of their vectors an embedding concatenates.
    """
    width = transformer.get_embedding_dimension()
    pooled = [Pooling(width, pooling_mode=POOLING_MODES[pooling]), Normalize()]
    return SentenceTransformer(
        modules=[transformer, *(pooled if vectors == 1 else [EosVectors(width, vectors)])],
        prompts=prompts,
        similarity_fn_name="cosine",
        device=device,
    )


def save_sentence_transformer(model: SentenceTransformer, out: Path, training: dict[str, Any]) -> Path:
    """Write ``model`` to ``out`` with its model card, in a form that sentence-transformers and vLLM load.

    A model of several vectors is written as a ``MultiVectorEncoder``.

    :param training: The training record, written to ``TRAINING_FILE`` and shown in the model card.
    :raises CocoaError: If ``out`` holds something else, is a checkpoint of a run, or another export writes to it.
    """
    refuse_checkpoint(out)
    with only_writer(out, marker=TRAINING_FILE):
        claim_folder(out, marker=TRAINING_FILE)
        _write_model(model, out, training)
    return out


def _write_model(model: SentenceTransformer, out: Path, training: dict[str, Any]) -> None:
    transformer = model[0]
    assert isinstance(transformer, Transformer)
    base_model = transformer.model
    transformer.model = as_generation_model(
        base_model, matryoshka_dimensions(training, model.get_embedding_dimension())
    )
    vectors = count_vectors(model)
    saved: SentenceTransformer | MultiVectorEncoder = model
    if vectors > 1:
        saved = as_multi_vector_encoder(transformer, model.prompts)
    try:
        saved.save(str(out), create_model_card=False)
    finally:
        transformer.model = base_model
    _make_readable_by_servers(out, eos_settings(model.tokenizer))
    if len(eos_tokens(model.tokenizer)) > 1:
        training = {**training, "vectors": vectors}
    write_training(out, training)
    (out / "README.md").write_text(model_card(out.resolve().name, model, training), encoding="utf-8")


def as_multi_vector_encoder(transformer: Transformer, prompts: Mapping[str, str | None]) -> MultiVectorEncoder:
    """Return a stock model of the vectors of all ``eos_tokens``, in the order of the sequence: vector 1 is the last.

    The mask's list of tokens to keep applies to documents only; for queries, it takes a list of tokens to drop.
    """
    tokenizer: Any = transformer.tokenizer
    keep = eos_tokens(tokenizer)
    mask = MultiVectorMask(
        skiplist_words=sorted(tokenizer.get_vocab().keys() - {*keep}),
        skiplist_tasks="query",
        keep_only_token_ids=[tokenizer.convert_tokens_to_ids(token) for token in keep],
    )
    return MultiVectorEncoder(
        modules=[transformer, mask, Normalize("token_embeddings")],
        prompts={name: prompt or "" for name, prompt in prompts.items()},
        similarity_fn_name="meanmaxsim",
    )


def as_generation_model(base_model: PreTrainedModel, matryoshka_dims: list[int]) -> PreTrainedModel:
    """Return the ``...ForConditionalGeneration`` around a base model: servers know its config and its weights' names.

    It adds no weights: an embedding needs no language-model head, so the head is tied to the token embeddings.
    vLLM decides on chunked prefill and prefix caching by ``is_causal`` at the top of the config, and on attention by
    the one of the language model.

    :param matryoshka_dims: The dimensions that embeddings can be cut to, largest first; recorded in the config.
    """
    config = copy.deepcopy(base_model.config)
    config.is_causal = is_causal(base_model)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    if matryoshka_dims:
        config.is_matryoshka, config.matryoshka_dimensions = True, matryoshka_dims
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    model.model = base_model
    model.tie_weights()
    return model


def _make_readable_by_servers(out: Path, eos: Mapping[str, Any]) -> None:
    """Change the files that sentence-transformers has written so that servers can read them.

    Servers look for the pooling under the names of sentence-transformers before 5.4, and take ``<EOS>`` from the
    template; only sentence-transformers, which truncates, has the tokenizer append it. Several ``<EOS>`` are appended
    by the tokenizer's file: a server that takes them from the template then has to tokenize without special tokens.

    :param eos: The arguments that make the tokenizer append ``<EOS>``.
    """
    if "add_eos_token" in eos:
        _rewrite(out / "tokenizer.json", lambda tokenizer: {**tokenizer, "post_processor": None})
    _rewrite(
        out / "tokenizer_config.json",
        lambda settings: {name: value for name, value in settings.items() if name not in eos},
    )
    _rewrite(out / "sentence_bert_config.json", lambda settings: {**settings, "processor_kwargs": dict(eos)})
    _rewrite(out / "config_sentence_transformers.json", lambda settings: {**settings, "requirements": REQUIREMENTS})
    if not (out / "1_Pooling").is_dir():  # a model of several vectors, which no server takes
        return
    _rewrite(
        out / "modules.json",
        lambda modules: [{**each, "type": OLD_MODULES + each["type"].rpartition(".")[2]} for each in modules],
    )
    # Servers take the first flag that is true, so these come before ``include_prompt``.
    _rewrite(out / "1_Pooling" / "config.json", lambda settings: {**_pooling_flags(settings), **settings})


def _pooling_flags(settings: Mapping[str, Any]) -> dict[str, bool]:
    return {f"pooling_mode_{flag}": flag.removesuffix("_tokens") == settings["pooling_mode"] for flag in POOLING_FLAGS}


def _rewrite(path: Path, change: Callable[[Any], object]) -> None:
    document = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_model(checkpoint: str | Path, out: str | Path, vectors: int | None = None) -> Path:
    """Export the checkpoint of any stage to ``out``, a folder that plain sentence-transformers loads.

    :param vectors: 1 exports only the first vector of a model of several, as a ``SentenceTransformer``; None, all.
    :raises CocoaError: If ``checkpoint`` is not a checkpoint, or ``out`` holds something else.
    :raises UsageError: If ``vectors`` is neither 1 nor the checkpoint's number of vectors.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    training = read_training(checkpoint)
    recipe = training["recipe"]
    if vectors not in (None, 1, found := vectors_of(training)):
        numbers = "1" if found == 1 else f"1 or {found}"
        raise UsageError(f"--vectors is {vectors}, but {printable(checkpoint)} has {found}; give {numbers}")
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise CocoaError(f"{out} is or holds the checkpoint itself; give another folder to export to.")
    model = build_sentence_transformer(
        checkpoint,
        prompts=recipe["prompts"],
        bidirectional=recipe["bidirectional"],
        pooling=recipe["pooling"],
        vectors=vectors,
    )
    return save_sentence_transformer(model, out, training)
