"""Embed on a Ray cluster: parts are read, embedded and written by actors, each with its own model."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cocoa_embed.encode.devices import open_encoder
from cocoa_embed.encode.load import load_encoder
from cocoa_embed.errors import CocoaError, UsageError, one_line, require
from cocoa_embed.integrations.qdrant.shards.embed import EmbedSummary, Part, embed_part
from cocoa_embed.integrations.qdrant.shards.files import EmbeddingFolder
from cocoa_embed.integrations.qdrant.stores.base import signature_of

MOST_BLOCKS = 4096
"""Blocks of a Ray data set; when an actor ends, at most one is embedded again."""


class Embedder:
    """The work of an actor: it embeds parts and writes their files.

    Embedding and writing are one step, so that the file of a part is complete or absent: Ray splits and repeats blocks
    as it likes. A part that is embedded twice, because its actor ended, gives the same file.
    """

    def __init__(self, model: str, folder: EmbeddingFolder, options: Mapping[str, Any]) -> None:
        """Load the model onto the actor's device."""
        self.folder = folder
        self.encoder = load_encoder(model, **options)
        folder.sign(signature_of(self.encoder, folder.embed))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Embed parts, pickled in the column ``part``; return their summaries in the column ``summary``."""
        summaries = [embed_part(pickle.loads(part), self.folder, self.encoder) for part in batch["part"]]
        return {"summary": [pickle.dumps(summary) for summary in summaries]}


def embed_on_ray(
    planned: Iterable[Part | EmbedSummary],
    folder: EmbeddingFolder,
    model: str | Path,
    options: Mapping[str, Any],
    *,
    address: str | None = None,
    actors: int | None = None,
    embedder: type[Embedder] = Embedder,
) -> Iterator[EmbedSummary]:
    """Embed the parts of a ``plan``; yield a summary of each, in any order.

    :param folder: A folder that all machines of the cluster can reach, like the sources and the model.
    :param options: Options of ``load_encoder``, including ``dimension``.
    :param address: The address of a cluster; ``auto`` is the one on this machine. None starts Ray for this run alone.
    :param actors: How many actors embed; None takes one for each GPU, or for each core if there are none.
    :param embedder: The class of the actors.
    :raises CocoaError: If the folder has embeddings of another model, the cluster cannot be reached, or an actor fails.
    """
    ray_data = require("ray.data", "ray")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if fixed := {"device", "devices"} & given.keys():
        raise UsageError(f"--{min(fixed)} and --ray were given together; Ray chooses the device of each actor")
    every = list(planned)
    waiting = [{"part": pickle.dumps(each)} for each in every if isinstance(each, Part)]
    if not waiting:  # then no actor compares the model with that of the folder
        folder.sign(signature_of(open_encoder(model, **given), folder.embed))
    yield from (each for each in every if isinstance(each, EmbedSummary))
    if not waiting:
        return
    ray = _start(address)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        parts = ray_data.from_items(waiting, override_num_blocks=min(len(waiting), MOST_BLOCKS))
        embedded = parts.map_batches(
            embedder,
            fn_constructor_args=(str(model), folder, given),
            batch_size=1,
            compute=ray_data.ActorPoolStrategy(size=min(actors or gpus or int(resources["CPU"]), len(waiting))),
            num_gpus=1 if gpus else None,
        )
        yield from (pickle.loads(row["summary"]) for row in embedded.iter_rows())
    except ray.exceptions.RayError as error:
        # Ray hands on an actor's error as the text of its traceback.
        message = re.search(rf"^{CocoaError.__module__}\.\w+: (.*)", str(error), re.MULTILINE)
        raise CocoaError(message[1] if message else f"Ray failed ({str(error).strip().splitlines()[-1]})") from error
    finally:
        ray.shutdown()


def _start(address: str | None) -> Any:  # noqa: ANN401
    """Connect to a cluster, or start Ray on this machine, reachable from it alone and without usage statistics.

    :raises CocoaError: If there is no cluster, or Ray cannot be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    alone: dict[str, Any] = {} if address else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **alone)
    except (ConnectionError, ValueError, RuntimeError) as error:
        failed = f"there is no Ray cluster at {address}" if address else "Ray cannot be started"
        raise CocoaError(f"{failed} ({one_line(error)})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
