"""What a stage logs, by name: how it is called, its colour in a chart, and what it means."""

from typing import NamedTuple

STAGE_TITLES = {"warmup": "warm-up", "bridge": "bridge", "contrastive": "contrastive"}
"""The stages by their keys in a recipe: what people call them."""

SERIES = {
    "loss": ("total loss", "total"),
    "mntp_loss": ("masked tokens: cross-entropy", "text"),
    "mae_loss": ("masked patches: mean squared error", "image"),
    "masked_token_accuracy": ("masked tokens predicted correctly", "text"),
    "accuracy_matching_image": ("with its own image", "right"),
    "accuracy_shuffled_image": ("with another image", "shuffled"),
    "accuracy_no_image": ("without an image", "other"),
}
"""Name of a series to its label and its colour, a CSS variable of the page."""

PLATEAU = ("accuracy_matching_image", "accuracy_shuffled_image")
NO_IMAGE = "accuracy_no_image"


class Meaning(NamedTuple):
    """What a measure of the embeddings' shape is called, what it means in a few words, and in a few sentences."""

    title: str
    short: str
    sentences: str


GEOMETRY = {
    "alignment": Meaning(
        "Alignment",
        "mean squared distance of a pair; 0 is the same",
        "The mean squared distance between the two embeddings of a pair. 0 is one point, 2 is what directions have "
        "that know nothing of each other. Lower is better, as long as the embeddings stay spread out.",
    ),
    "uniformity": Meaning(
        "Uniformity",
        "0 all in one place, -4 all orthogonal",
        "How evenly the embeddings are spread over the sphere. 0 is all in one place, about −4 an even spread. Lower "
        "is better, as long as pairs stay close.",
    ),
    "modality_gap": Meaning(
        "Modality gap",
        "distance of the centres of images and of texts",
        "The distance between the centre of the images and the centre of the texts. 0 means that both live in one "
        "region; what stands apart by a gap is far for a reason that is not its content.",
    ),
    "effective_rank": Meaning(
        "Effective rank",
        "directions that are used",
        "How many directions the embeddings really use. More is better: a small number says that they have collapsed "
        "onto few. It cannot exceed their dimensions, nor how many were measured.",
    ),
}
"""What the log says of the embeddings' shape.

Alignment and uniformity are those of Wang and Isola (2020), the gap that of Liang et al. (2022), the rank that of Roy
and Vetterli (2007).
"""
