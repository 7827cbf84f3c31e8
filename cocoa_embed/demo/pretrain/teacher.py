"""Another vision model as a teacher: its features of a few views of each image, computed once and kept in files."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.export.passes import move_to_device_pass
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from cocoa_embed.demo.pretrain.data import CaptionedImages, Example, vary
from cocoa_embed.demo.pretrain.settings import VisionSettings
from cocoa_embed.errors import CocoaError, one_line, printable
from cocoa_embed.train.data.cache import replace_atomically
from cocoa_embed.train.data.rows import Draw
from cocoa_embed.train.stages.rendering import batched

FORM = "it has to map pixels [n, 3, S, S] (0 to 1, float32), for any n, to features [n, channels, h, w]"
IMAGES_FOR_COMPONENTS = 1024
"""The number of images from whose features the principal components are computed."""


class Teacher:
    """Computes features of images with a program that ``torch.export.save`` wrote, reduced to principal components.

    Each component is divided by the fourth root of its variance, and all of them by one number, so that their mean
    variance is 1.

    :param images: uint8 ``[3, H, W]``; the components are computed from the first ``IMAGES_FOR_COMPONENTS``.
    :param size: The side of the images, if the teacher takes any size.
    :param components: The maximum number of components.
    :raises CocoaError: If the program cannot be loaded, or takes or returns something else.
    """

    def __init__(self, file: Path, images: Sequence[Tensor], size: int, components: int) -> None:
        self.name = printable(file)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # On a CPU, a feature map of 64 images takes twice as long per image: its memory is allocated each time.
        self.images_at_once = 64 if self.device.type == "cuda" else 8
        if not is_zipfile(file):  # torch would print a page about it
            raise CocoaError(f"{self.name} is not a file of torch.export.save; {FORM}.")
        try:
            program = torch.export.load(file)
            inputs = [each for each in program.graph.nodes if each.name in program.graph_signature.user_inputs]
            shapes = [list(each.meta["val"].shape) for each in inputs]
            self._run: Any = move_to_device_pass(program, str(self.device)).module()
        except Exception as error:  # torch raises almost any error for a file that it did not write
            raise CocoaError(f"{self.name} cannot be loaded as a teacher ({one_line(error)}); {FORM}.") from error
        shape = shapes[0] if len(shapes) == 1 else []
        if len(shape) != 4 or isinstance(shape[0], int) or shape[1] != 3 or str(shape[2]) != str(shape[3]):
            raise CocoaError(f"{self.name} takes inputs of the shapes {shapes}; {FORM}.")
        self.size = shape[2] if isinstance(shape[2], int) else size
        raw = torch.cat([self._raw(part) for part in batched(images[:IMAGES_FOR_COMPONENTS], self.images_at_once)])
        values, vectors = torch.linalg.eigh(raw.flatten(0, 2).double().T.cov())
        values, vectors = values.flip(0)[:components].clamp(min=1e-12), vectors.flip(1)[:, :components]
        self._mean = raw.mean(dim=(0, 1, 2))
        self._basis = (vectors / values**0.25 / values.sqrt().mean().sqrt()).float()

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return the features of images, float16 ``[n, h, w, components]``."""
        return ((self._raw(images) - self._mean) @ self._basis).half()

    @torch.no_grad()
    def _raw(self, images: Sequence[Tensor]) -> Tensor:
        pixels = torch.stack([F.resize(image, [self.size, self.size]) for image in images])
        features = self._run(F.to_dtype(pixels, torch.float32, scale=True).to(self.device))
        if not isinstance(features, Tensor) or features.dim() != 4 or len(features) != len(images):
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise CocoaError(f"{self.name} returns {found} for {len(images)} images; {FORM}.")
        return features.float().cpu().movedim(1, 3)


@dataclass(frozen=True)
class Views(Dataset[Example]):
    """Views of the images of a folder, in memory-mapped files: each epoch takes another view of each image.

    After all views come their mirror images, then the views again. Features are mirrored, not computed again: this
    assumes that the teacher's features of a mirrored image are the mirrored features.

    :param pixels: uint8 ``[views, images, 3, size, size]``.
    :param features: The teacher's features of the same views, float16 ``[views, images, h, w, components]``.
    """

    images: CaptionedImages
    pixels: np.ndarray
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Example:
        """Return the view of an image that an epoch takes."""
        times, view = divmod(draw.epoch, len(self.pixels))
        image, features = (torch.from_numpy(each[view, draw.row].copy()) for each in (self.pixels, self.features))
        if times % 2:
            image, features = image.flip(2), features.flip(1)
        return {"image": image, "features": features, "words": self.images.words(draw.row)}


def make_views(images: CaptionedImages, teacher: Teacher, settings: VisionSettings, folder: Path) -> Views:
    """Make views of all images, some of them mirrored, with the teacher's features; or open them if they exist.

    :param folder: Where the files are.
    """
    if not folder.is_dir():
        replace_atomically(folder, partial(_write_views, images, teacher, settings.views))
    pixels, features = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pixels", "features"))
    return Views(images, pixels, features)


def _write_views(images: CaptionedImages, teacher: Teacher, views: int, folder: Path) -> None:
    folder.mkdir()
    count, size = len(images), images.size
    shape = teacher(images.images[:1]).shape[1:]
    pixels = open_memmap(folder / "pixels.npy", "w+", np.uint8, (views, count, 3, size, size))
    features = open_memmap(folder / "features.npy", "w+", np.float16, (views, count, *shape))
    augmentation = images.augmentation.model_copy(update={"flip": True})

    def view_of(view: int, row: int) -> Tensor:
        generator = random.Random(f"{images.seed}/{row}/{view}")
        return vary(images.images[row], max(size, teacher.size), augmentation, generator)

    draws = [(view, row) for view in range(views) for row in range(count)]
    for part in tqdm(batched(draws, teacher.images_at_once), "teacher", unit=f"{teacher.images_at_once} views"):
        seen = [view_of(view, row) for view, row in part]
        places = tuple(np.array(part).T)
        features[places] = teacher(seen).numpy()
        pixels[places] = torch.stack([F.resize(image, [size, size]) for image in seen]).numpy()


def with_features(held_out: Mapping[str, Sequence[Example]], teacher: Teacher) -> dict[str, list[Example]]:
    """Return held-out examples with the features of the image that belongs to the captions."""
    own = [row["image"] for row in held_out["right"]]
    features = torch.cat([teacher(part) for part in batched(own, teacher.images_at_once)])
    return {
        name: [{**row, "features": each} for row, each in zip(rows, features, strict=True)]
        for name, rows in held_out.items()
    }
