"""The image features of a frozen vision encoder: computed once per step, and kept in a folder for later epochs."""

import hashlib
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocoa_embed.model.families.family import Seen
from cocoa_embed.model.families.registry import family_of
from cocoa_embed.model.forward_inputs import REMEMBERED, on_device
from cocoa_embed.train.settings import RunSettings

CHECKSUM_BYTES = 4

ENTRIES = f"{'[0-9a-f]' * 32}/[0-9a-f][0-9a-f]/*"
"""The files that a ``FeatureStore`` writes: the weights' fingerprint, the first two letters of a key, the key."""

logger = logging.getLogger(__name__)


class FrozenVision:
    """Runs a frozen vision encoder only for images that are not known, in place of ``Family.run_vision``.

    Images are identified by their ``image_digests`` and the dtype of matrix products. If no image of a batch is known,
    all run as they would without this class, so that the features are equal bit for bit; otherwise only the unknown
    ones run, and the order of sums may differ.

    :param model: The model, whose vision encoder is not trained. It keeps its class and its weights.
    :param remembers: Keep the features until ``forget``, on their device.
    :param store: Where features are kept beyond a step.
    """

    def __init__(self, model: PreTrainedModel, *, remembers: bool, store: "FeatureStore | None" = None) -> None:
        self._family, self._model = family_of(model.config), model
        self._remembers, self._store = remembers, store
        self._known: dict[str, list[Tensor]] = {}
        base: Any = model.base_model
        setattr(base, REMEMBERED, self)

    def forget(self) -> None:
        """Free the features of the previous step."""
        self._known.clear()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Seen:
        """Return the features of images, as ``Family.run_vision`` does.

        :param batch: From ``HostInputs``; without ``image_digests``, all images run.
        """
        if "image_digests" not in batch:
            return self._family.run_vision(self._model, batch)
        pixels, grids = batch["pixel_values"], batch["image_grid_thw"]
        kind = pixels.device.type
        own = self._family.encoder(self._model).dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        keys = [digest.tobytes().hex() + f"-{dtype}" for digest in batch["image_digests"].cpu().numpy()]
        found = [self._known.get(key) or self._read(key, pixels.device) for key in keys]
        if missing := [place for place, features in enumerate(found) if not features]:
            patches = grids.prod(dim=1).tolist()
            if len(missing) < len(found):  # the position inputs of the batch are for all images
                some = torch.cat([pixels.split(patches)[place] for place in missing])
                made = self._family.image_inputs(grids[missing].cpu())
                batch = {"pixel_values": some, **on_device(self._model, made)}
            computed = self._family.run_vision(self._model, batch)
            tokens = [patches[place] // self._family.geometry.patches_per_token for place in missing]
            parts = (features.split(tokens) for features in (computed.features, *computed.of_layers))
            for place, *of_image in zip(missing, *parts, strict=True):
                found[place] = of_image
                if self._store is not None:
                    self._store.write(keys[place], of_image)
        if self._remembers:
            self._known |= zip(keys, found, strict=True)
        features, *of_layers = (torch.cat(each) for each in zip(*found, strict=True))
        return Seen(features, tuple(of_layers))

    def _read(self, key: str, device: torch.device) -> list[Tensor]:
        """Return the stored features of an image, an empty list if there are none."""
        return [] if self._store is None else [each.to(device) for each in self._store.read(key)]


class FeatureStore:
    """Features of images in a folder that processes and runs may share: one file per image, for one encoder's weights.

    At the start, entries of other weights are removed, oldest first, while the folder is more than half full; other
    files are neither counted nor removed. A full folder takes no more entries: every epoch reads all images, so new
    entries would evict those that are needed next.

    :param limit: The maximum size of the folder in bytes.
    """

    def __init__(self, folder: Path, limit: float, visual: nn.Module) -> None:
        self.folder = folder / weights_fingerprint(visual)
        entries = sorted(_entries(folder))
        size = sum(own for _, own, _ in entries)
        for _, own, path in entries:
            if size > limit / 2 and self.folder not in path.parents:
                path.unlink(missing_ok=True)
                size -= own
        self.room = (limit - size) / PartialState().num_processes

    def read(self, key: str) -> list[Tensor]:
        """Return the features of an image, on the CPU; an empty list if there are none, or they are broken."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return []
        checksum, content = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
        features = load(content) if checksum == _checksum(content) and content else {}
        return [features[name] for name in sorted(features, key=int)]

    def write(self, key: str, features: Sequence[Tensor]) -> None:
        """Keep the features of an image, if there is room."""
        if self.room <= 0:
            return
        content = save({str(place): each.cpu().contiguous() for place, each in enumerate(features)})
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=key, delete=False) as scratch:
                scratch.write(_checksum(content) + content)
            os.replace(scratch.name, path)
            self.room -= len(content)
        except OSError as error:
            self.room = 0
            logger.warning("vision_cache takes no more entries: %s cannot be written (%s)", path.parent, error.strerror)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield time, size and path of each file of ``ENTRIES``, including those left half-written by a kill."""
    for path in folder.glob(ENTRIES):
        with suppress(FileNotFoundError):  # another process removes it
            if path.is_file() and path.name.startswith(path.parent.name):
                yield path.stat().st_mtime, path.stat().st_size, path


def weights_fingerprint(module: nn.Module) -> str:
    """Return a digest of the names, shapes, dtypes and all values of a module's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(save({name: value.contiguous()}))
    return digest.hexdigest()


def share_frozen_vision(model: PreTrainedModel, run: RunSettings, *, remembers: bool) -> FrozenVision | None:
    """Return the ``FrozenVision`` of a model's vision encoder, None if it would keep nothing.

    It is also None for sharded weights: all processes gather them together, so none may skip the encoder.
    """
    if run.sharding != "none" or not (remembers or run.vision_cache):
        return None
    store = None
    if run.vision_cache is not None:
        store = FeatureStore(run.vision_cache, run.vision_cache_gb * 1e9, family_of(model.config).vision(model))
    return FrozenVision(model, remembers=remembers, store=store)
