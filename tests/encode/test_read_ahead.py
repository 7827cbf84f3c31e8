import threading
from collections.abc import Iterator

import pytest

from cocoa_embed.encode.read_ahead import read_ahead


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("cocoa-read-ahead")]


def test_results_keep_the_order_of_the_inputs_and_few_are_processed_ahead() -> None:
    taken: list[threading.Thread] = []

    def inputs() -> Iterator[int]:
        for number in range(100):
            taken.append(threading.current_thread())
            yield number

    results = read_ahead(lambda number: number * 2, inputs(), workers=3, ahead=5)
    assert taken == []
    for done, (number, result) in enumerate(results):
        assert (number, result.result()) == (done, 2 * done)
        assert len(taken) - done <= 6
    assert taken == [threading.current_thread()] * 100


def test_an_error_of_the_function_stays_in_its_place() -> None:
    first, second, third = (result for _, result in read_ahead(int, ["1", "one", "3"]))
    assert (first.result(), third.result()) == (1, 3)
    with pytest.raises(ValueError, match="one"):
        second.result()


def test_no_thread_is_left_after_an_early_end_or_an_error_of_the_inputs() -> None:
    def inputs() -> Iterator[int]:
        yield from range(1000)
        raise RuntimeError("the list broke")

    results = read_ahead(str, inputs(), workers=2)
    assert next(results)[1].result() == "0"
    assert own_threads()
    results.close()
    assert not own_threads()
    with pytest.raises(RuntimeError, match="the list broke"):
        list(read_ahead(str, inputs()))
    assert not own_threads()
