"""What ``<EOS>`` carries: accuracy on hidden tokens with the right image against another one."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from cocoa_embed.train.collators import Batch
from cocoa_embed.train.data import Draw, Row, numbered

RIGHT_IMAGE = "accuracy_right_image"

Collate = Callable[[list[tuple[Draw, Row]]], Batch]


class EosProbe:
    """Measures a bridge model on fixed rows, with each image in its place and with the images exchanged.

    Block B sees block A through ``<EOS>`` alone, so the difference of the two accuracies is what ``<EOS>`` carries. It
    stays near zero on the stage's plateau and grows once the bridge is learned.

    :param collate: The bridge collator. It hides the same tokens of a block B whatever image stands before it.
    :param rows: Rows with an image each, all different.
    :param batch_size: Rows to run at once.
    """

    def __init__(self, collate: Collate, rows: Sequence[Row], batch_size: int) -> None:
        def batches(rows: Sequence[Row]) -> list[Batch]:
            drawn = numbered(rows)
            return [collate(drawn[start : start + batch_size]) for start in range(0, len(drawn), batch_size)]

        self.batches = {RIGHT_IMAGE: batches(rows), "accuracy_shuffled_image": batches(exchange_images(rows))}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return ``accuracy_right_image`` and ``accuracy_shuffled_image``."""
        was_training = model.training
        model.eval()
        accuracies = {name: _accuracy(model, batches) for name, batches in self.batches.items()}
        model.train(was_training)
        return accuracies


def _accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    device = next(model.parameters()).device
    right = total = 0.0
    for batch in batches:
        outputs = model(**{name: values.to(device) for name, values in batch.items()})
        right += outputs["hidden_token_accuracy"].item() * len(batch["target_ids"])
        total += len(batch["target_ids"])
    return right / total


def exchange_images(rows: Sequence[Row]) -> list[Row]:
    """Give each row the image of the next one, and the last row that of the first."""
    images = [row.image for row in rows]
    return [row.with_image(image) for row, image in zip(rows, images[1:] + images[:1], strict=True)]


def hold_out_rows(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Take ``count`` rows with different images from ``rows``; return them and the rows of all other images.

    Nothing is taken where fewer images would be left than are taken, nor for a count of one, which cannot be exchanged.
    """
    images = list(dict.fromkeys(row.image for row in rows if row.image is not None))
    if count < 2 or len(images) < 2 * count:
        return [], list(rows)
    kept = set(images[:count])
    probe_rows = list({row.image: row for row in rows if row.image in kept}.values())
    return probe_rows, [row for row in rows if row.image not in kept]
