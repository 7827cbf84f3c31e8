"""The vision encoder's own stage: it learns the words of captions, and a teacher's features of an image."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from cocoa_embed.demo.pretrain.data import Example
from cocoa_embed.errors import CocoaError

WORD = re.compile(r"\w+")
MOST_WORDS = 4096


class Words:
    """The frequent words of captions, as binary labels of images.

    :param texts: All captions of each image.
    :param images: The minimum number of images of a word.
    :raises CocoaError: If no word is that frequent.
    """

    def __init__(self, texts: Iterable[str], images: int) -> None:
        counts = Counter(word for text in texts for word in words_in(text))
        frequent = sorted(
            (word for word, count in counts.items() if count >= images), key=lambda word: (-counts[word], word)
        )
        if not frequent:
            raise CocoaError(f"No word is in the captions of {images} images; lower vision.word_images, or add images.")
        self.places = {word: place for place, word in enumerate(frequent[:MOST_WORDS])}

    def __len__(self) -> int:
        return len(self.places)

    def __call__(self, rows: Sequence[Example]) -> Tensor:
        """Return which words the captions of each row contain, float ``[rows, words]``."""
        found = torch.zeros(len(rows), len(self))
        for number, row in enumerate(rows):
            found[number, [self.places[word] for word in words_in(row["words"]) if word in self.places]] = 1
        return found


def words_in(text: str) -> set[str]:
    """Return the different words of a text, in lower case."""
    return {*WORD.findall(text.lower())}


class VisionTraining(nn.Module):
    """A captioner's vision encoder with linear heads, for words and features, which are discarded after the stage.

    :param channels: The channels of a teacher's features; 0 if there is no teacher.
    :param word_weight: The weight of the words' loss relative to that of the features.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration, words: int, channels: int, word_weight: float) -> None:
        super().__init__()
        config: Any = model.config.vision_config
        self.visual = model.model.visual
        self.merge_size, self.word_weight = config.spatial_merge_size, word_weight
        self.words = nn.Linear(config.hidden_size, words)
        self.features = nn.Linear(config.hidden_size, channels) if channels else None

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor, words: Tensor, features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss of images that all have the same size.

        The words are predicted from the mean of an image's visual tokens: binary cross-entropy, summed over the words.
        The features are predicted from each token: mean squared error.

        :param words: From ``Words``.
        :param features: ``[images, h, w, channels]``; the tokens are resized to this grid if theirs differs.
        """
        height, width = (image_grid_thw[0, 1:] // self.merge_size).tolist()
        tokens = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
        tokens = tokens.view(len(image_grid_thw), height, width, -1)
        logits = self.words(tokens.mean(dim=(1, 2))).float()
        loss = functional.binary_cross_entropy_with_logits(logits, words, reduction="sum") / len(words)
        loss = loss * self.word_weight
        if features is not None and self.features is not None:
            if features.shape[1:3] != (height, width):
                resized = functional.interpolate(tokens.float().movedim(3, 1), features.shape[1:3], mode="bilinear")
                tokens = resized.movedim(1, 3)
            loss = loss + functional.mse_loss(self.features(tokens).float(), features.float())
        return {"loss": loss}


@dataclass(frozen=True)
class VisionCollator:
    """Makes batches of images, the words of their captions and, if there is a teacher, its features."""

    processor: Qwen2VLProcessor
    words: Words

    def __call__(self, rows: list[Example]) -> dict[str, Tensor]:
        """Return the inputs of ``VisionTraining``."""
        batch = self.processor.image_processor([row["image"] for row in rows], return_tensors="pt")
        features = {"features": torch.stack([row["features"] for row in rows])} if "features" in rows[0] else {}
        return {**batch, "words": self.words(rows), **features}
