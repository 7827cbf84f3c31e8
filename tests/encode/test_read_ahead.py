import threading
from collections.abc import Iterator

import pytest

from cocoa_embed.encode.read_ahead import read_ahead


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("cocoa-read-ahead")]


def test_results_come_in_the_order_of_the_inputs_and_few_are_made_ahead() -> None:
    taken: list[int] = []
    takers = set()

    def inputs() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            takers.add(threading.current_thread())
            yield number

    results = read_ahead(lambda number: number * 2, inputs(), workers=3, ahead=5)
    assert taken == []
    for done, (number, result) in enumerate(results):
        assert (number, result.result()) == (done, 2 * done)
        assert len(taken) - done <= 6
    assert len(taken) == 100
    assert takers == {threading.current_thread()}


def test_an_error_stays_in_its_place() -> None:
    first, second, third = (result for _, result in read_ahead(int, ["1", "one", "3"]))
    assert (first.result(), third.result()) == (1, 3)
    with pytest.raises(ValueError, match="one"):
        second.result()


def test_closing_early_leaves_no_thread_behind() -> None:
    results = read_ahead(str, iter(range(1000)), workers=2)
    assert next(results)[1].result() == "0"
    assert own_threads()
    results.close()
    assert not own_threads()


def test_an_error_of_the_inputs_comes_through() -> None:
    def inputs() -> Iterator[int]:
        yield 1
        raise RuntimeError("the list broke")

    with pytest.raises(RuntimeError, match="the list broke"):
        list(read_ahead(str, inputs()))
    assert not own_threads()
