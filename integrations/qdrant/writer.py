"""Write points to a store in background threads, while the model embeds the next images."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from cocoa_embed.integrations.qdrant.stores.base import Point
from cocoa_embed.integrations.qdrant.stores.store import Store

BATCH_POINTS = 64


def write_points(store: Store, points: Iterable[Point]) -> None:
    """Store points in batches, ``store.parallel`` of them at once; the next point waits while as many are queued.

    After an exception, the batches that no thread has begun are not stored.

    :raises CocoaError: If a write fails.
    """
    remaining = iter(points)
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(store.parallel, thread_name_prefix="cocoa-embed-writer") as pool:
        try:
            while batch := list(islice(remaining, BATCH_POINTS)):
                writes.append(pool.submit(store.upsert, batch))
                while len(writes) > 2 * store.parallel or (writes and writes[0].done()):
                    writes.popleft().result()
            for write in writes:
                write.result()
        finally:
            pool.shutdown(cancel_futures=True)
