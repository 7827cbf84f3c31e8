from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_embed.train.data.rows import Draw
from cocoa_embed.train.data.sampling import WINDOW, RowStream


def batches(stream: RowStream) -> list[list[Draw]]:
    draws = list(stream)
    return [draws[start : start + stream.batch_size] for start in range(0, len(draws), stream.batch_size)]


@given(
    rows=st.integers(1, 30),
    steps=st.integers(1, 12),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    grouped=st.booleans(),
)
def test_every_row_comes_once_an_epoch(rows: int, steps: int, batch_size: int, seed: int, grouped: bool) -> None:
    lengths_of = (lambda numbers: [3 * number % 11 for number in numbers]) if grouped else None
    stream = RowStream(rows, steps * batch_size, batch_size=batch_size, seed=seed, lengths_of=lengths_of)
    draws = list(stream)
    assert len(draws) == len(stream) == steps * batch_size
    assert len(set(draws)) == len(draws), "no row is drawn twice in an epoch"
    by_epoch = Counter(draw.epoch for draw in draws)
    whole, rest = divmod(len(draws), rows)
    assert by_epoch == Counter(dict.fromkeys(range(whole), rows) | ({whole: rest} if rest else {}))


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    first, again, other = (list(RowStream(20, 40, batch_size=4, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [draw.row for draw in first[:20]] != [draw.row for draw in first[20:]], "epochs differ in their order"


def test_rows_of_similar_length_come_together_in_random_order() -> None:
    lengths = [(7 * index) % 500 for index in range(WINDOW * 16)]
    asked: list[int] = []

    def lengths_of(numbers: Sequence[int]) -> list[int]:
        asked.append(len(numbers))
        return [lengths[number] for number in numbers]

    first = next(iter(RowStream(len(lengths), len(lengths), batch_size=8, seed=0, lengths_of=lengths_of)))
    assert asked == [WINDOW * 8], "only the lengths of a window are computed"
    grouped = batches(RowStream(len(lengths), len(lengths), batch_size=8, seed=0, lengths_of=lengths_of))
    assert grouped[0][0] == first
    asked.clear()
    resumed = batches(
        RowStream(len(lengths), len(lengths), batch_size=8, seed=0, lengths_of=lengths_of, skipped=8 * WINDOW + 8)
    )
    assert resumed[WINDOW + 1 :] == grouped[WINDOW + 1 :]
    assert asked == [WINDOW * 8], "the skipped windows are not sorted"
    plain = batches(RowStream(len(lengths), len(lengths), batch_size=8, seed=0))

    def padding(drawn: list[list[Draw]]) -> int:
        of = [[lengths[draw.row] for draw in batch] for batch in drawn]
        return sum(max(batch) * len(batch) - sum(batch) for batch in of)

    assert padding(plain) > 10 * padding(grouped)
    longest = [max(lengths[draw.row] for draw in batch) for batch in grouped]
    assert longest != sorted(longest), "short batches do not all come first"


def test_a_stream_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RowStream(0, 4, batch_size=4, seed=0)
