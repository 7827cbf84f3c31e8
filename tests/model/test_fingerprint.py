from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from cocoa_embed.model.fingerprint import SAMPLED_VALUES, model_fingerprint, tensor_digest, weights_digest


@pytest.fixture
def model(tiny_export: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_export), device="cpu")


def test_a_model_has_one_fingerprint_in_float32_and_bfloat16(tiny_export: Path, model: SentenceTransformer) -> None:
    half = SentenceTransformer(str(tiny_export), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    assert (model.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert model_fingerprint(half) == model_fingerprint(model)


def test_a_step_of_training_and_settings_that_change_embeddings_change_the_fingerprint(
    model: SentenceTransformer,
) -> None:
    processor, seen = model[0].processor, [model_fingerprint(model)]
    for target, name, value in (
        (model, "prompts", {"query": "another prompt: "}),
        (processor, "chat_template", f"{processor.chat_template} "),
        (model[1], "pooling_mode", "mean"),
        (model.config.get_text_config(), "is_causal", True),
        (model, "max_seq_length", 7),
        (processor.image_processor, "image_mean", [0.0, 0.0, 0.0]),
    ):
        setattr(target, name, value)
        seen.append(model_fingerprint(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3)
    seen.append(model_fingerprint(model))
    assert len(set(seen)) == len(seen)


def test_the_names_and_the_order_of_weights_do_not_matter() -> None:
    one, other = torch.randn(3, 4), torch.randn(5)
    assert weights_digest({"a": one, "b": other}) == weights_digest({"x.b": other, "x.a": one})
    assert weights_digest({"a": one, "b": other}) != weights_digest({"a": one, "b": one})


@pytest.mark.parametrize("shape", [(), (0,), (3,), (SAMPLED_VALUES + 1,), (7, 3 * SAMPLED_VALUES)])
def test_a_digest_depends_on_the_shape_and_on_values_all_over_a_tensor(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert tensor_digest(tensor) != tensor_digest(tensor[None])
    if tensor.numel():
        assert tensor_digest(tensor) != tensor_digest(tensor + 1)
        last = tensor.clone().reshape(-1)
        last[-len(last) // 4 :] += 1
        assert tensor_digest(last.reshape(shape)) != tensor_digest(tensor)
