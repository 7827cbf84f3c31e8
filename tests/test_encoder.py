import numpy as np
import pytest

from cocoa_embed.encoder import Encoder, Item, make_item
from cocoa_embed.errors import CocoaError, UsageError
from fake_model import IMAGE_TOKEN, FakeModel, colour_image


def test_an_item_is_a_text_an_image_or_both() -> None:
    assert make_item("red") == {"text": "red"}
    assert make_item("red", colour_image("red")).keys() == {"text", "image"}
    assert make_item("", colour_image("red")).keys() == {"image"}
    with pytest.raises(UsageError):
        make_item("")


@pytest.mark.parametrize("text", ["\ud83e", "\udd93\ud83e", "caf\udce9"])
def test_a_text_that_is_no_valid_unicode_is_wrong_usage(text: str) -> None:
    for image in (None, colour_image("red")):
        with pytest.raises(UsageError, match="not valid Unicode") as caught:
            make_item(text, image)
        assert str(caught.value).isascii()


@pytest.mark.parametrize("text", ["🦓", "café", "\0", "\ufffd"])
def test_a_text_of_any_characters_is_an_item(text: str) -> None:
    assert make_item(text) == {"text": text}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"image": colour_image("red", (1, 20_000))}, "absolute aspect ratio must be smaller than 200"),
        ({"text": f"red {IMAGE_TOKEN}"}, "image features and image tokens do not match"),
    ],
)
def test_a_query_that_the_model_refuses_is_one_sentence_that_names_the_model(item: Item, reason: str) -> None:
    model = FakeModel()
    with pytest.raises(ValueError, match=reason):
        model.encode_query([item], batch_size=1, show_progress_bar=False)
    with pytest.raises(CocoaError, match=reason) as caught:
        Encoder(model, "cocoa-tiny").embed_queries([item])
    assert not isinstance(caught.value, UsageError)
    assert str(caught.value) == f"cocoa-tiny does not take the query ({reason})"


def test_a_reason_of_several_lines_becomes_one() -> None:
    class Wordy(FakeModel):
        def _embed(self, item: object) -> np.ndarray:
            raise ValueError("too long:\n  9 tokens,\n  at most 8")

    with pytest.raises(CocoaError, match=r"\(too long: 9 tokens, at most 8\)$"):
        Encoder(Wordy()).embed_queries([{"text": "red"}])


def test_the_encoder_goes_on_after_a_query_it_refused() -> None:
    encoder = Encoder(FakeModel())
    with pytest.raises(CocoaError):
        encoder.embed_queries([{"text": IMAGE_TOKEN}])
    assert encoder.embed_queries([{"text": "red"}, {"text": "blue"}]).shape == (2, 48)
