"""Write texts with a causal vision-language backbone, in batches."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from sentence_transformers.util import get_device_name

from cocoa_embed.captioning.prompts import Answer, Prompts, Request
from cocoa_embed.errors import UsageError
from cocoa_embed.model.backbone import limit_images, load_backbone, read_config, read_processor
from cocoa_embed.model.families.registry import family_of_images
from cocoa_embed.model.template import render


class BackboneWriter:
    """Writes with a backbone's ``generate``; the weights are loaded for the first image.

    A backbone whose chat template opens no turn for an answer, such as ``scene-captioner``, follows no prompts: it
    answers whatever it says about an image, and further wordings are sampled.
    """

    threads = 1

    def __init__(self, name: str, prompts: Prompts, max_pixels: int, batch_size: int, device: str | None) -> None:
        """Read the config and the processor.

        :raises CocoaError: If there is no such backbone.
        :raises UsageError: If its family is not supported, it is bidirectional, or ``max_pixels`` are too few.
        """
        if read_config(name).get_text_config().to_dict().get("is_causal") is False:
            raise UsageError(f"{name} is bidirectional: training has made it an embedding model, which writes no text; "
                             "give the backbone that its training began with.")  # fmt: skip
        self._processor: Any = read_processor(name)
        self._family = family_of_images(self._processor)
        limit_images(self._processor, min(max_pixels, self._family.most_pixels(self._processor)))
        self._processor.tokenizer.padding_side = "left"
        self.name, self.images_at_once = name, batch_size
        self.follows_prompts = "add_generation_prompt" in (self._processor.chat_template or "")
        self._prompts, self._device = prompts, device or get_device_name()

    def tokens(self, width: int, height: int, prompt: str) -> int:
        """Return how many tokens a request takes, as the processor counts them."""
        count = self._family.visual_tokens(self._processor, width, height)
        return len(self._processor.tokenizer(self._family.markers.expanded(self._render(prompt), [count]))["input_ids"])

    def write(self, images: Sequence[Image.Image], requests: Sequence[Sequence[Request]]) -> list[list[Answer]]:
        """Return the answers to the requests about each image; each request is answered for all images at once."""
        answers = [self._generate(images, of_all, seed) for seed, of_all in enumerate(zip(*requests, strict=True))]
        return [list(of_image) for of_image in zip(*answers, strict=True)]

    @torch.inference_mode()
    def _generate(self, images: Sequence[Image.Image], requests: Sequence[Request], seed: int) -> list[Answer]:
        model, drawn = self._model, requests[0].is_drawn
        texts = [self._render(request.prompt) for request in requests]
        inputs = self._processor(images=list(images), text=texts, padding=True, return_tensors="pt")
        options = self._prompts.sampling if drawn else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=self._prompts.max_tokens,
                                 do_sample=drawn, **options)[:, inputs["input_ids"].shape[1] :]  # fmt: skip
        ends = torch.tensor(model.generation_config.eos_token_id, device=ids.device)
        is_cut = (~torch.isin(ids, ends).any(dim=1)).tolist()
        return list(map(Answer, self._processor.batch_decode(ids, skip_special_tokens=True), is_cut))

    def _render(self, prompt: str) -> str:
        if not self.follows_prompts:
            return render(text=None, images=1, markers=self._family.markers)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @cached_property
    def _model(self) -> Any:  # noqa: ANN401
        dtype = torch.bfloat16 if self._device.startswith("cuda") else torch.float32
        model: Any = load_backbone(self.name, bidirectional=False).model.eval()
        return model.to(device=self._device, dtype=dtype)
