"""Words of the report: labels and meanings of logged metrics, durations, tokens as text."""

SHOWN_CHARACTERS = 300
"""Longer texts are cut to this many characters, the last of them an ellipsis."""

SERIES = {
    "loss": ("total loss", "total"),
    "mntp_loss": ("masked tokens: cross-entropy", "text"),
    "mlm_loss": ("masked tokens: cross-entropy", "text"),
    "mae_loss": ("masked patches: mean squared error", "image"),
    "masked_token_accuracy": ("masked tokens of the batch", "text"),
    "accuracy_matching_image": ("with the matching image", "right"),
    "accuracy_shuffled_image": ("with a shuffled image", "shuffled"),
    "accuracy_no_image": ("without an image", "other"),
}
"""The label and the colour (a CSS variable of the page) of each logged metric."""

MATCHING, SHUFFLED, NO_IMAGE = list(SERIES)[-3:]

GEOMETRY = {
    "alignment": "mean squared distance of a pair: 0 for equal embeddings, about 2 for unrelated ones",
    "uniformity": "how evenly embeddings are spread over the sphere: 0 if all are equal, about -4 for an even spread",
    "modality_gap": "distance between the centroids of images and texts: 0 if they coincide",
    "effective_rank": "number of dimensions in use: a low one means that the embeddings have collapsed",
    "pair_recall": "ratio of embeddings whose nearest one on the other side is their pair: recall@1 among these rows",
}
"""Alignment and uniformity by Wang and Isola (2020), gap by Liang et al. (2022), rank by Roy and Vetterli (2007)."""


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
    """Return the text of a token without surrounding space; a token of only white space is made visible."""
    return token.strip() or {"": "∅"}.get(token, "⏎" if "\n" in token else "␣")
