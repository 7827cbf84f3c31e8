"""What ``<EOS>`` carries: accuracy on hidden tokens with the right image against another one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cocoa_embed.train.data import Row


class EosProbe:
    """Measures a bridge model on one fixed batch, with each image in its place and with the images exchanged.

    Block B sees block A through ``<EOS>`` alone, so the difference of the two accuracies is what ``<EOS>`` carries. It
    stays near zero on the stage's plateau and grows once the bridge is learned.

    :param batch: A batch of the bridge collator with at least two images of one size.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batches = {"accuracy_right_image": batch, "accuracy_shuffled_image": shuffle_images(batch)}

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return ``accuracy_right_image`` and ``accuracy_shuffled_image``."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        accuracies = {
            name: model(**{key: value.to(device) for key, value in batch.items()})["hidden_token_accuracy"].item()
            for name, batch in self.batches.items()
        }
        model.train(was_training)
        return accuracies


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


def shuffle_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each image's place to another image of the same size, by a rotation of one within each size.

    :param batch: With ``pixel_values`` ``[patches, patch_width]`` and ``image_grid_thw`` ``[images, 3]``.
    :returns: A shallow copy with other ``pixel_values``.
    """
    grids = batch["image_grid_thw"]
    images = list(batch["pixel_values"].split(grids.prod(dim=1).tolist()))
    shuffled = list(images)
    for grid in grids.unique(dim=0):
        same = (grids == grid).all(dim=1).nonzero().flatten().tolist()
        for target, source in zip(same, same[1:] + same[:1], strict=True):
            shuffled[target] = images[source]
    return {**batch, "pixel_values": torch.cat(shuffled)}
