import os
import threading
import time

import pytest
import torch

from cocoa_embed.encode.cpu_threads import BATCHES_TO_RECHECK, CoreShare, available_cores, start_workers, torch_threads


def in_a_new_thread() -> int:
    """Return the torch threads that a thread born now has."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_this_process_has_at_least_one_core_and_no_more_than_the_machine() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_the_torch_threads_are_put_back_even_after_an_error() -> None:
    before, inside = torch.get_num_threads(), []

    def fail() -> None:
        with torch_threads(before + 1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_workers_have_one_torch_thread_and_nobody_else_is_changed() -> None:
    with torch_threads(3):
        with start_workers(4, "test") as workers:
            assert torch.get_num_threads() == 3
            assert in_a_new_thread() == 3
            barrier = threading.Barrier(4)
            counts = [workers.submit(lambda: (barrier.wait(5), torch.get_num_threads())[1]) for _ in range(4)]
            assert [count.result() for count in counts] == [1, 1, 1, 1]
        assert torch.get_num_threads() == 3
        assert in_a_new_thread() == 3


def test_workers_use_one_core_each() -> None:
    """A second thread that torch had started for a worker would show as time beyond that of the worker's own."""
    numbers = torch.randn(64, 200_000)
    with torch_threads(4), start_workers(1, "test") as workers:

        def work() -> tuple[float, float]:
            whole, own = time.process_time(), time.thread_time()
            for _ in range(10):
                torch.sin(numbers)
            return time.process_time() - whole, time.thread_time() - own

        whole, own = workers.submit(work).result()
        assert whole < 1.5 * own


class Machine:
    """Runs batches under a ``CoreShare`` and tells it the times that a model of a known nature would take."""

    def __init__(self, share: CoreShare, *, alone: float, beside: float, preparing: float) -> None:
        self.share = share
        self.alone, self.beside, self.preparing = alone, beside, preparing

    def run(self, batches: int, *, is_all_prepared: bool = False) -> list[bool]:
        """Return for each batch whether it ran in turn."""
        ways = []
        for _ in range(batches):
            in_turn = self.share.is_in_turn(is_all_prepared=is_all_prepared)
            model = self.alone if in_turn else self.beside
            waiting = 0.0 if in_turn else max(0.0, self.preparing / self.share.workers - model)
            self.share.note(in_turn, work=32, model=32 * model, waiting=32 * waiting, preparing=32 * self.preparing)
            ways.append(in_turn)
        return ways


def share(workers: int = 1, cores: int = 2, threads: int = 2) -> CoreShare:
    return CoreShare(workers=workers, cores=cores, threads=threads)


def test_a_large_model_runs_in_turn_and_gives_beside_one_late_batch() -> None:
    ways = Machine(share(), alone=50, beside=80, preparing=4).run(40)
    assert ways.count(False) == 1
    assert all(ways[:8])


def test_a_model_that_gains_nothing_from_cores_runs_beside_from_the_third_batch_on() -> None:
    ways = Machine(share(), alone=3, beside=3, preparing=3).run(40)
    assert ways == [True, True, *[False] * 38]


def test_a_model_that_is_prepared_slowly_runs_in_turn_if_that_is_clearly_faster() -> None:
    ways = Machine(share(workers=1, cores=4, threads=4), alone=1, beside=1, preparing=8).run(40)
    assert ways[-1] is True  # 1 + 8 / 4 is less than 8


def test_threads_that_wait_for_a_busy_machine_drive_the_model_beside() -> None:
    machine = Machine(share(), alone=2, beside=3.5, preparing=1)
    assert machine.run(40)[-1] is True
    machine.alone = 30
    assert machine.run(10)[-1] is False


def test_the_other_way_is_tried_again_now_and_then() -> None:
    machine = Machine(share(), alone=3, beside=3, preparing=3)
    assert any(machine.run(2 * BATCHES_TO_RECHECK)[10:])
    machine.alone, machine.beside = 1, 3
    assert machine.run(2 * BATCHES_TO_RECHECK)[-1] is True


def test_when_all_is_prepared_the_model_has_all_cores_if_it_gains_from_them() -> None:
    machine = Machine(share(), alone=2, beside=3, preparing=3)
    machine.run(10)
    assert machine.run(3, is_all_prepared=True) == [True, True, True]
    machine = Machine(share(), alone=9, beside=3, preparing=3)
    machine.run(10)
    assert machine.run(3, is_all_prepared=True) == [False, False, False]


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 2, 1), (1, 1, 1), (4, 2, 1), (2, 8, 4)])
def test_there_is_no_choice_where_the_model_has_no_more_threads_in_turn(workers: int, cores: int, threads: int) -> None:
    one = share(workers, cores, threads)
    assert not one.has_choice
    assert not any(Machine(one, alone=1, beside=1, preparing=1).run(20))
    assert one.threads(False) == threads


def test_beside_leaves_the_workers_their_cores() -> None:
    one = share(workers=3, cores=16, threads=16)
    assert (one.threads(False), one.threads(True)) == (13, 16)
    assert share(workers=5, cores=2, threads=2).threads(False) == 1
