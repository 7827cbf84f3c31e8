"""Words of the report: labels and meanings of logged metrics, durations, tokens as text."""

from typing import NamedTuple

SHOWN_CHARACTERS = 300
"""Longer texts are cut to so many characters, the last of them an ellipsis."""

SERIES = {
    "loss": ("total loss", "total"),
    "mntp_loss": ("masked tokens: cross-entropy", "text"),
    "mae_loss": ("masked patches: mean squared error", "image"),
    "masked_token_accuracy": ("masked tokens of the batch", "text"),
    "accuracy_matching_image": ("with the matching image", "right"),
    "accuracy_shuffled_image": ("with a shuffled image", "shuffled"),
    "accuracy_no_image": ("without an image", "other"),
}
"""Logged metric to its label and its colour, a CSS variable of the page."""

MATCHING, SHUFFLED, NO_IMAGE = list(SERIES)[-3:]


class Meaning(NamedTuple):
    """What a metric of the embeddings' geometry means, in a few words and in full."""

    short: str
    full: str


GEOMETRY = {
    "alignment": Meaning(
        "mean squared distance of a pair, 0 is equal",
        "The mean squared distance between the two embeddings of a pair: 0 for equal ones, about 2 for unrelated ones. "
        "Lower is better, as long as the embeddings stay spread out.",
    ),
    "uniformity": Meaning(
        "0 is all in one place, -4 an even spread",
        "How evenly the embeddings are spread over the sphere: 0 is all in one place, about −4 an even spread. Lower "
        "is better, as long as pairs stay close.",
    ),
    "modality_gap": Meaning(
        "distance between the centres of images and texts",
        "The distance between the centre of the images and the centre of the texts. At 0 they are one; a gap "
        "separates images from texts regardless of what they show.",
    ),
    "effective_rank": Meaning(
        "dimensions in use",
        "How many dimensions the embeddings use. Higher is better: a low rank means that they have collapsed. It is at "
        "most their dimension, and at most the number of embeddings.",
    ),
}
"""Alignment and uniformity of Wang and Isola (2020), gap of Liang et al. (2022), rank of Roy and Vetterli (2007)."""


def duration(seconds: float) -> str:
    """Return ``seconds`` as text: "8 s", "4 min 12 s", "1 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def cut(text: str) -> str:
    """Return ``text``, cut to ``SHOWN_CHARACTERS``."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1].rstrip()}…"


def listed(names: list[str]) -> str:
    """Return names as a list in a sentence: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def token_text(token: str) -> str:
    """Return the text of a token without its leading space, white space alone made visible."""
    return token.strip() or {"": "∅"}.get(token, "⏎" if "\n" in token else "␣")
