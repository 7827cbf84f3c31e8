import pytest
import torch
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
