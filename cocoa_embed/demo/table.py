"""The demo's one table, for the terminal."""

from rich.table import Table

Metrics = dict[str, dict[str, float]]
_COLUMNS = ("recall@1", "recall@5", "recall@10", "mrr")


def retrieval_table(ours: Metrics, alone: Metrics, candidates: int) -> Table:
    """Return held-out retrieval of all three stages beside contrastive learning alone, in both directions.

    :param ours: ``text_to_image`` and ``image_to_text``, each with recall@1/5/10 and mrr in [0, 1].
    :param candidates: How many items each query chose from.
    """
    table = Table(title=f"Retrieval among {candidates} held-out scenes")
    table.add_column("direction")
    table.add_column("training")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for direction in ours:
        for name, metrics in (("all three stages", ours), ("contrastive only", alone)):
            figures = (f"{metrics[direction][column]:.3f}" for column in _COLUMNS)
            table.add_row(direction.replace("_", " "), name, *figures, style="bold" if metrics is ours else None)
    return table
