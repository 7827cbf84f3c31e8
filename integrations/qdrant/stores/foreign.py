"""Refuse a folder that holds something other than the expected kind of index, and say what it is. Reads only names."""

from __future__ import annotations

from pathlib import Path

from cocoa_embed.errors import CocoaError, printable

LOCAL_META, LOCAL_COLLECTION = "meta.json", "storage.sqlite"
"""The client's list of collections, and its file in each collection."""
LOCAL_LOCK = ".cocoa-lock"
"""The first file in a new store. The client takes its own lock only after it has read files that another process may be
writing."""
EDGE_MARKER, EDGE_COLLECTION = ".cocoa-edge", "edge_config.json"
"""In a folder of shards, locked while one is created in it; the engine's own file in each shard."""
OWN_MARKERS = {"path": (LOCAL_LOCK, LOCAL_META), "edge": (EDGE_MARKER,)}
"""The files that mark the folder of an index, by the keyword that opens it. A killed process may leave only the first;
every complete index has the last."""
STORE_NAMES = {"path": "Qdrant's local mode", "edge": "Qdrant Edge"}
"""The names of the kinds of index, for messages."""
SERVER_MARKERS = ("raft_state.json", ".qdrant-initialized")
"""In the storage folder of a Qdrant server, above its collections."""


def refuse_foreign_index(folder: Path, *, markers: tuple[str, ...]) -> None:
    """Check that a folder is missing, empty, or has one of the ``markers`` of the expected kind of index.

    :raises CocoaError: If it is a file or a folder that holds something else; the message names what would open it.
    """
    name = printable(folder)
    if folder.exists() and not folder.is_dir():
        raise CocoaError(f"{name} is a file; give the folder of an index")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if advice := find_owner(folder.absolute(), markers):
        raise CocoaError(f"{name} {advice}")
    if not any((folder / marker).is_file() for marker in markers):
        raise CocoaError(
            f"{name} holds something else, not an index (it has no {markers[-1]}); give the folder of an index, or the"
            " name of a new one"
        )


def find_owner(folder: Path, markers: tuple[str, ...]) -> str | None:
    """Return what a folder is and how to open it, if another store or another option owns it; None if none does."""
    for option, (*_, marker) in OWN_MARKERS.items():
        if marker not in markers and (folder / marker).is_file():
            return f"is an index that {STORE_NAMES[option]} made; open it with --{option} ({option}= in Python)"
    parents = {"path": (LOCAL_COLLECTION, folder.parent.parent), "edge": (EDGE_COLLECTION, folder.parent)}
    for option, (marker, root) in parents.items():
        if marker not in markers and (folder / marker).is_file():
            return (
                f"is one collection of an index that {STORE_NAMES[option]} made; give --{option} {printable(root)}"
                f" --collection {printable(folder.name)} ({option}= and collection= in Python)"
            )
    if folder.name == "collection" and (folder.parent / LOCAL_META).is_file():
        return f"is inside an index; give --path {printable(folder.parent)} (path= in Python)"
    if any((place / marker).is_file() for place in (folder, *folder.parents[:2]) for marker in SERVER_MARKERS):
        return "is storage of a Qdrant server; start the server and give its address with --url (url= in Python)"
    if (folder / "modules.json").is_file():
        return "is a model, not an index; give it as --model, and another folder for the index"
    return None
