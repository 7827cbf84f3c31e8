import numpy as np
import pytest
import torch
from fake_model import FakeModel, colour_image
from sentence_transformers import SentenceTransformer

from cocoa_embed.encode.document_model import DocumentModel, document_prompt


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, None),
        ({"query": "q: ", "document": "d: "}, None, "d: "),
        ({"corpus": "c: ", "passage": "p: "}, None, "p: "),
        ({"corpus": "c: "}, "query", "c: "),
        ({"query": "q: "}, "query", "q: "),
        ({"document": ""}, "query", ""),
        ({"query": "q: "}, None, None),
    ],
)
def test_the_document_prompt_is_the_one_that_encode_document_takes(
    prompts: dict[str, str], default: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    model.prompts, model.default_prompt_name = prompts, default

    def preprocess(inputs: list[str], prompt: str | None, task: str) -> None:
        raise KeyError(prompt)

    monkeypatch.setattr(model, "preprocess", preprocess)
    with pytest.raises(KeyError) as taken:
        model.encode_document(["x"])
    assert taken.value.args == (expected,)
    assert document_prompt(model) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("truncate_dim", [None, 12])
def test_a_batch_is_embedded_as_encode_document_embeds_it(dtype: torch.dtype, truncate_dim: int | None) -> None:
    class Typed(FakeModel):
        def __call__(self, features: dict, task: str | None = None) -> dict:
            embedded = super().__call__(features, task)
            return {"sentence_embedding": embedded["sentence_embedding"].to(dtype)}

    model = Typed(prompts={"document": "on white: "})
    model.truncate_dim = truncate_dim
    images = [colour_image(colour) for colour in ("red", "green", "blue")]
    document_model = DocumentModel(model)
    vectors = document_model.launch(document_model.prepare(images)).fetch()
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, truncate_dim or 48)
    expected = FakeModel().encode_document([{"image": image} for image in images], 32, False)[:, :truncate_dim]
    np.testing.assert_allclose(vectors, expected, rtol=0 if dtype == torch.float32 else 0.01)
    assert model.document_prompts == {"on white: "}


def test_the_model_is_put_into_evaluation_mode() -> None:
    model = SentenceTransformer(modules=[torch.nn.Dropout()], device="cpu").train()
    DocumentModel(model)
    assert not model.training
