"""The vision encoder's own stage: what its visual tokens learn to predict, by a linear head that is thrown away."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as F
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from cocoa_embed.demo.pretrain.data import Example
from cocoa_embed.errors import CocoaError, one_line, printable

WORD = re.compile(r"\w+")
MOST_WORDS = 4096
TEACHER_FORM = "it has to map pixels [n, 3, S, S] (0 to 1, float32), for any n, to features [n, channels, h, w]"


class Target(Protocol):
    """What the vision encoder learns to predict of an image."""

    width: int
    """The values that the head predicts of each visual token."""

    def inputs(self, rows: Sequence[Example]) -> Tensor:
        """Return what the loss takes beside the predictions, for each row."""
        ...

    def loss(self, predicted: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss of the head's predictions ``[n, width, h, w]``, a mean over images."""
        ...


class Words:
    """The words in an image's captions, each a yes or no, predicted from the mean of the visual tokens.

    :param texts: All captions of each image.
    :param images: The fewest images of a word.
    :raises CocoaError: If no word is that frequent.
    """

    def __init__(self, texts: Iterable[str], images: int) -> None:
        counts = Counter(word for text in texts for word in words_in(text))
        frequent = [word for word, count in counts.most_common(MOST_WORDS) if count >= images]
        if not frequent:
            raise CocoaError(f"No word is in the captions of {images} images; lower vision.word_images, or add images.")
        self.places = {word: place for place, word in enumerate(frequent)}
        self.width = len(frequent)

    def inputs(self, rows: Sequence[Example]) -> Tensor:
        """Return which words the captions have, float ``[n, words]``."""
        found = torch.zeros(len(rows), self.width)
        for number, row in enumerate(rows):
            found[number, [self.places[word] for word in words_in(row["words"]) if word in self.places]] = 1
        return found

    def loss(self, predicted: Tensor, inputs: Tensor) -> Tensor:
        """Return the binary cross-entropy, summed over the words."""
        logits = predicted.mean(dim=(2, 3))
        return functional.binary_cross_entropy_with_logits(logits, inputs, reduction="sum") / len(inputs)


def words_in(text: str) -> set[str]:
    """Return the different words of a text, in lower case."""
    return {*WORD.findall(text.lower())}


class Teacher:
    """The features that another vision model has of the same image, each channel at mean 0 and variance 1.

    :param file: A program that ``torch.export.save`` has written.
    :param rows: Examples, to measure the mean and the variance of the features on.
    :param size: The side of the images that a teacher of any size sees.
    :raises CocoaError: If it cannot be loaded, or takes or returns something else.
    """

    def __init__(self, file: Path, rows: Sequence[Example], size: int, device: torch.device) -> None:
        name = printable(file)
        try:
            program = torch.export.load(file)
            inputs = [each for each in program.graph.nodes if each.name in program.graph_signature.user_inputs]
            shapes = [list(each.meta["val"].shape) for each in inputs]
            self._features: Any = torch.export.passes.move_to_device_pass(program, str(device)).module()
        except Exception as error:  # torch raises nearly anything for a file that it did not write
            raise CocoaError(f"{name} cannot be loaded as a teacher ({one_line(error)}); {TEACHER_FORM}.") from error
        shape = shapes[0] if len(shapes) == 1 else []
        if len(shape) != 4 or isinstance(shape[0], int) or shape[1] != 3 or str(shape[2]) != str(shape[3]):
            raise CocoaError(f"{name} takes inputs of the shapes {shapes}; {TEACHER_FORM}.")
        self.size = shape[2] if isinstance(shape[2], int) else size
        features = self.features(self.inputs(rows).to(device))
        if features.dim() != 4:
            raise CocoaError(f"{name} returns features of the shape {list(features.shape)}; {TEACHER_FORM}.")
        self.width = features.shape[1]
        self.mean = features.mean(dim=(0, 2, 3), keepdim=True)
        self.std = features.std(dim=(0, 2, 3), keepdim=True) + 1e-6

    def inputs(self, rows: Sequence[Example]) -> Tensor:
        """Return the images as the teacher sees them, float ``[n, 3, size, size]`` from 0 to 1."""
        images = (F.to_dtype(F.to_image(row.get("own", row["image"])), torch.float32, scale=True) for row in rows)
        return torch.stack([F.resize(image, [self.size, self.size]).as_subclass(Tensor) for image in images])

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Return the teacher's features, ``[n, channels, h, w]``."""
        features: Tensor = self._features(pixels)
        return features

    def loss(self, predicted: Tensor, inputs: Tensor) -> Tensor:
        """Return the smooth L1 distance of the predictions, resized to the grid of the teacher."""
        wanted = (self.features(inputs) - self.mean) / self.std
        if predicted.shape[2:] != wanted.shape[2:]:
            predicted = functional.interpolate(predicted, wanted.shape[2:], mode="bilinear", antialias=True)
        return functional.smooth_l1_loss(predicted, wanted)


class VisionTraining(nn.Module):
    """A captioner's vision encoder with a head that predicts a target from each visual token."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, target: Target) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.merge_size = model.config.vision_config.spatial_merge_size
        self.head = nn.Linear(model.config.vision_config.hidden_size, target.width)
        self.target = target

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss of images that all have the same size."""
        features = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
        height, width = (image_grid_thw[0, 1:] // self.merge_size).tolist()
        predicted = self.head(features).view(len(image_grid_thw), height, width, -1).permute(0, 3, 1, 2)
        return {"loss": self.target.loss(predicted, inputs)}


class VisionCollator:
    """Makes batches of images and what is to be predicted of them."""

    def __init__(self, processor: Qwen2VLProcessor, target: Target) -> None:
        self.image_processor = processor.image_processor
        self.target = target

    def __call__(self, rows: list[Example]) -> dict[str, Tensor]:
        """Return the images' patches, and ``inputs`` of the target's loss."""
        batch = self.image_processor([row["image"] for row in rows], return_tensors="pt")
        return {**batch, "inputs": self.target.inputs(rows)}
