import numpy as np
import pytest
import torch
from fake_model import FakeModel, colour_image
from sentence_transformers import SentenceTransformer

from cocoa_embed.encode.document_model import DocumentModel, document_prompt
from cocoa_embed.encode.processor_lock import ProcessorLock


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({}, None, None),
        ({"query": "q: ", "document": "d: "}, None, "d: "),
        ({"corpus": "c: ", "passage": "p: "}, None, "p: "),
        ({"corpus": "c: "}, "query", "c: "),
        ({"query": "q: "}, "query", "q: "),
        ({"document": ""}, "query", ""),
    ],
)
def test_the_document_prompt_is_that_of_encode_document(
    prompts: dict[str, str], default: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SentenceTransformer(modules=[torch.nn.Dropout()], device="cpu").train()
    model.prompts, model.default_prompt_name = prompts, default

    def preprocess(inputs: list[str], prompt: str | None, task: str) -> None:
        raise KeyError(prompt)

    monkeypatch.setattr(model, "preprocess", preprocess)
    with pytest.raises(KeyError) as caught:
        model.encode_document(["x"])
    assert caught.value.args == (expected,)
    assert document_prompt(model) == expected
    model.train()
    DocumentModel(model, ProcessorLock())
    assert not model.training, "it is in evaluation mode, as encode puts it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("truncate_dim", [None, 12])
def test_a_batch_is_embedded_as_encode_document_embeds_it(dtype: torch.dtype, truncate_dim: int | None) -> None:
    class Typed(FakeModel):
        def __call__(self, features: dict, task: str | None = None) -> dict:
            return {"sentence_embedding": super().__call__(features, task)["sentence_embedding"].to(dtype)}

    model = Typed(prompts={"document": "on white: "})
    model.truncate_dim = truncate_dim
    images = [colour_image(colour) for colour in ("red", "green", "blue")]
    document_model = DocumentModel(model, ProcessorLock())
    vectors = document_model.launch(document_model.prepare(images))()
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, truncate_dim or 48))
    expected = FakeModel().encode_document([{"image": image} for image in images], 32, False)[:, :truncate_dim]
    np.testing.assert_allclose(vectors, expected, rtol=0 if dtype == torch.float32 else 0.01)
    assert model.document_prompts == {"on white: "}
