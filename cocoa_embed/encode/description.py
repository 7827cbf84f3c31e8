"""What an index needs to know about a model, cached by the state of the model's files.

This way, a model that made a collection is recognised without loading it, and without importing torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.folders import cache_folder, write_atomically
from cocoa_embed.model import fingerprint, loading

ADAPTER_FILE = "adapter_config.json"
"""The file that marks a folder whose weights are partly stored elsewhere."""

HARMLESS = ("workers", "batch_tokens")
"""The options of ``load_encoder`` that do not change the description."""

SOFTWARE = ("sentence-transformers", "transformers")
"""The packages whose versions may change the description of the same files."""


class Description(NamedTuple):
    """What an index knows about a model."""

    fingerprint: str
    """The digest that ``model_fingerprint`` returns."""
    dimension: int
    """The dimension of the model's own embeddings, before any truncation."""
    takes_images: bool
    takes_both: bool
    """Whether it takes an image and a text as one input."""
    vectors: int = 1
    """How many vectors the model makes of an input."""


def describe(model: str | Path, options: Mapping[str, Any], load: Callable[[], Description]) -> Description:
    """Return the description of a model: from the cache if its files are unchanged, otherwise from the loaded model.

    :param model: A folder or a name on the hub.
    :param options: Options of ``load_encoder``.
    :param load: Loads the model and describes it.
    :raises CocoaError: If the model has to be loaded, and cannot be.
    """
    file = remembered_in(model, options)
    if file is not None:
        with suppress(OSError, ValueError, TypeError):
            return Description(**json.loads(file.read_text(encoding="utf-8")))
    described = load()
    if file is not None and file == remembered_in(model, options):  # nothing has changed meanwhile
        with suppress(OSError):  # then the next run loads the model again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(described._asdict()))
    return described


def remembered_in(model: str | Path, options: Mapping[str, Any]) -> Path | None:
    """Return the file in the cache that holds a description.

    Its name is a digest of the size, mtime and ctime of all files of the model, and of all else that the description
    depends on.

    :returns: None for a model that depends on more than the files in its folder: an adapter, a linked folder, code from
        the hub, other options.
    """
    given = {name: value for name, value in options.items() if value and name not in HARMLESS}
    if given.keys() - {"dtype", "revision", "max_pixels"}:
        return None
    local = Path(model).expanduser()
    folder = local if local.is_dir() else snapshot_folder(str(model), given.get("revision"))
    if folder is None:
        return None
    entries = sorted(folder.rglob("*"))  # which does not enter linked folders
    if any(entry.name == ADAPTER_FILE or (entry.is_symlink() and entry.is_dir()) for entry in entries):
        return None
    # A snapshot of the hub never changes, but may get more files when the model is loaded.
    files = [entry for entry in entries if entry.is_file()] if folder is local else []
    parts: list[object] = [str(folder.resolve()), given, [version(name) for name in SOFTWARE]]
    parts += states(*files, Path(fingerprint.__file__))
    return cache_folder() / "models" / f"{hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()}.json"


def states(*files: Path) -> Iterator[list[object]]:
    """Yield the name, size, mtime and ctime of each file; a copy that keeps the mtime still has another ctime."""
    for file in files:
        with suppress(FileNotFoundError):
            found = file.stat()
            yield [str(file), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def snapshot_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model in the hub's cache, named by its commit; None if it cannot be determined."""
    if not loading.is_hub_name(name):
        return None
    from huggingface_hub import hf_hub_download

    with suppress(Exception):  # loading the model reports what is wrong
        return Path(hf_hub_download(name, loading.MODULES_FILE, revision=revision)).parent
    return None
