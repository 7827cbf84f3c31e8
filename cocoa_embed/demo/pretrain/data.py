"""The training data of a captioner: endless drawn scenes, or the images of a folder, varied from epoch to epoch."""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm
from transformers import Qwen2VLProcessor

from cocoa_embed.cpu_threads import available_cores
from cocoa_embed.demo.pretrain.settings import AugmentationSettings
from cocoa_embed.demo.scenes import captions, draw, sample_scene
from cocoa_embed.errors import CocoaError, printable
from cocoa_embed.model.template import VISION_END, render, special_tokens
from cocoa_embed.train.data.caption_rows import read_image_folder
from cocoa_embed.train.data.row_table import RowTable
from cocoa_embed.train.data.rows import Draw, load_row_image

Example = dict[str, Any]
"""``image`` (PIL, or uint8 ``[3, H, W]``), ``text`` (one caption) and ``words`` (all captions of the image)."""

SCENES_FOR_WORDS = 256

KEPT_SIZE = 1.5
"""The shorter side of an image in memory, as a multiple of the side of a crop."""


class CaptionedScenes(IterableDataset[Example]):
    """An endless stream of drawn training scenes, each with one of its captions."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Example]:
        generator = random.Random(f"{self.seed}/captioner")
        while True:
            scene = sample_scene(generator, "train")
            image, text = draw(scene, generator), generator.choice(captions(scene))
            yield {"image": image, "text": text, "words": text}

    def all_words(self) -> Iterator[str]:
        """Yield the captions of a few scenes."""
        return (example["words"] for example in islice(self, SCENES_FOR_WORDS))


@dataclass(frozen=True)
class CaptionedImages(Dataset[Example]):
    """The images of a folder, decoded once and kept in memory, indexed by draws.

    Each epoch takes another caption of each image, and another crop: both depend only on seed, image and epoch.

    :param images: uint8 ``[3, H, W]``, the shorter side at most ``KEPT_SIZE`` times ``size``.
    :param captions: The captions of each image.
    :param size: The side of the square images that come out.
    :param fingerprint: The fingerprint of the captions and the images' names, computed as for the rows of a run.
    """

    images: Sequence[Tensor]
    captions: Sequence[Sequence[str]]
    size: int
    augmentation: AugmentationSettings
    seed: int
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Example:
        """Return an image with the crop and the caption of an epoch."""
        generator = random.Random(f"{self.seed}/{draw.row}/{draw.epoch}")
        image = vary(self.images[draw.row], self.size, self.augmentation, generator)
        texts = self.captions[draw.row]
        return {"image": image, "text": texts[(draw.row + draw.epoch) % len(texts)], "words": self.words(draw.row)}

    def plain(self, row: int) -> Example:
        """Return a whole image, with its first caption."""
        image = F.resize(self.images[row], [self.size, self.size])
        return {"image": image, "text": self.captions[row][0], "words": self.words(row)}

    def words(self, row: int) -> str:
        """Return all captions of an image, one per line."""
        return "\n".join(self.captions[row])

    def all_words(self) -> Iterator[str]:
        """Yield all captions of each image."""
        return map(self.words, range(len(self)))


def read_images(folder: Path, size: int, augmentation: AugmentationSettings, seed: int,
                limit: int | None = None) -> CaptionedImages:  # fmt: skip
    """Read an image folder, with all captions of each image.

    :param limit: Read only this many images, drawn by the seed.
    :raises CocoaError: If the folder has no captions, or an image or a caption cannot be used.
    """
    texts: dict[Path, list[str]] = {}
    rows = read_image_folder(folder, captions="captions")
    for row in rows:
        texts.setdefault(Path(str(row.query.image)), []).append(row.positive.text or "")
    paths = list(texts)
    if limit is not None and len(paths) > limit:
        paths = random.Random(f"{seed}/held-out").sample(paths, limit)
    with ThreadPoolExecutor(available_cores()) as pool:
        decoded = pool.map(lambda path: decode(path, round(KEPT_SIZE * size)), paths)
        images = list(tqdm(decoded, f"reading {folder.name}", len(paths), unit="image"))
    fingerprint = RowTable.of(rows).fingerprint
    return CaptionedImages(images, [texts[path] for path in paths], size, augmentation, seed, fingerprint)


def decode(path: Path, shorter_side: int) -> Tensor:
    """Return an image as uint8 ``[3, H, W]``, scaled down to a shorter side."""
    image = F.pil_to_tensor(load_row_image(path))
    return F.resize(image, [shorter_side]) if min(image.shape[1:]) > shorter_side else image


def vary(image: Tensor, size: int, settings: AugmentationSettings, generator: random.Random) -> Tensor:
    """Return a random crop of an image, resized to a square, with jittered colours: uint8 ``[3, size, size]``."""
    height, width = image.shape[1:]
    area = height * width * generator.uniform(settings.scale, 1)
    ratio = 2 ** generator.uniform(-0.4, 0.4)  # from 3:4 to 4:3
    rows, columns = min(height, round((area / ratio) ** 0.5)), min(width, round((area * ratio) ** 0.5))
    top, left = generator.randint(0, height - rows), generator.randint(0, width - columns)
    image = F.resized_crop(image, top, left, rows, columns, [size, size])
    if settings.flip and generator.random() < 0.5:
        image = F.horizontal_flip(image)
    for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = adjust(image, generator.uniform(1 - settings.jitter, 1 + settings.jitter))
    return image


class CaptionCollator:
    """Makes batches of ``[vision][caption]<EOS>``; every token after the image is a label."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        self.processor = processor
        self.special = special_tokens(processor.tokenizer)

    def __call__(self, rows: list[Example]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` ``[rows, length]``, and the images' patches."""
        eos = self.processor.tokenizer.eos_token
        texts = [render(text=row["text"], images=1, tokens=self.special) + eos for row in rows]
        batch = self.processor(images=[row["image"] for row in rows], text=texts, padding=True, return_tensors="pt")
        after_image = batch["input_ids"] == self.processor.tokenizer.convert_tokens_to_ids(VISION_END)
        is_caption = (after_image.cumsum(1) - after_image.int()).bool() & batch["attention_mask"].bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~is_caption, -100)}


def held_out_pairs(images: CaptionedImages) -> dict[str, list[Example]]:
    """Return held-out images with their captions (``right``), and the same captions with the next image (``wrong``)."""
    right = [images.plain(row) for row in range(len(images))]
    others = [example["image"] for example in right[1:] + right[:1]]
    return {"right": right, "wrong": [{**one, "image": image} for one, image in zip(right, others, strict=True)]}


def refuse_overlap(training: CaptionedImages, held_out: CaptionedImages, names: tuple[str, str]) -> None:
    """Check that no image of ``held_out`` is also in ``training``, under any name.

    :raises CocoaError: If one is.
    """
    known = {hash(image.numpy().tobytes()) for image in training.images}
    if shared := sum(hash(image.numpy().tobytes()) in known for image in held_out.images):
        raise CocoaError(f"{shared} of the {len(held_out)} images to hold out, in {printable(names[1])}, are also in "
                         f"{printable(names[0])}, which is trained on; hold out other images.")  # fmt: skip
