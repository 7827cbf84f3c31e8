"""Choose the sources for places by what the places look like. A new kind of file needs a module with a ``KIND``."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from cocoa_embed.data.image_folder import METADATA_FILES, TEXT_SUFFIXES
from cocoa_embed.data.places import Place, file_system, reading
from cocoa_embed.errors import CocoaError, UsageError, did_you_mean, printable, require
from cocoa_embed.images.file_names import as_on_disk
from cocoa_embed.images.find_files import FolderSearch, is_file_list, is_image_name, match_pattern, split_pattern
from cocoa_embed.images.passed_over import PassedOver, first_bytes
from cocoa_embed.images.urls import is_web
from cocoa_embed.sources import addresses, archives, documents, tables, videos
from cocoa_embed.sources.addresses import first_address, require_host
from cocoa_embed.sources.base import Source, SourceOptions
from cocoa_embed.sources.files import file_sources, require_images
from cocoa_embed.sources.remote import RemoteImages, remote_start, walk
from cocoa_embed.sources.shard_files import Kind, ShardFiles

KINDS = {kind.name: kind for kind in (archives.KIND, tables.KIND, documents.KIND, videos.KIND)}
"""The kinds of files that hold images, by their names in ``--include``."""

DATA_SET_FILES = {"state.json": "*.arrow", "dataset_dict.json": "*/*.arrow"}
"""The tables of a folder that ``datasets`` has saved, by the file that marks it."""

NO_OPTIONS = SourceOptions()
"""The defaults."""


def all_sources(
    places: Iterable[str | Path],
    options: SourceOptions = NO_OPTIONS,
    on_error: Callable[[str | Path, str], object] = lambda path, reason: None,
    passed_over: PassedOver | None = None,
    *,
    may_be_gone: bool = False,
) -> list[Source]:
    """Return the sources of places: folders, files, patterns, lists, addresses.

    A folder yields its photographs, and the kinds of files in ``options.include``; a folder without photographs yields
    the files of all kinds.

    :param on_error: Called with what cannot be read, and the reason.
    :param passed_over: Decides what is passed over, and counts it; by default, what ``options`` exclude.
    :param may_be_gone: Whether a place that does not exist is a source without images.
    :raises CocoaError: If a place does not exist, cannot be listed or has no images, or a package that reads it is not
        installed.
    :raises UsageError: If a place is empty, or ``options.include`` has an unknown kind.
    """
    passed_over = passed_over or PassedOver(options.exclude)
    for name in sorted(options.include - KINDS.keys()):
        raise UsageError(f"--include {name} is not a kind of file {did_you_mean(name, [*KINDS])}")
    texts = [local_path(os.fspath(place)) for place in places]
    if "" in texts:
        raise UsageError("a path is empty; name a folder of images or an image file")
    photographs: list[str] = []
    others: list[Source] = []
    for text in without_descriptions(texts, passed_over):
        if "://" in text:
            others += _open_address(text, options, on_error, passed_over, may_be_gone)
        else:
            has_photographs, found = _open_path(text, options, passed_over, may_be_gone)
            photographs += [text] * has_photographs
            others += found
    if not may_be_gone and (photographs or not others):
        require_images(photographs, options.exclude)
    return [*file_sources(photographs, on_error, passed_over, may_be_gone=may_be_gone), *others]


def _open_path(
    text: str, options: SourceOptions, passed_over: PassedOver, may_be_gone: bool
) -> tuple[bool, list[Source]]:
    """Return whether ``file_sources`` handles a local place, and the sources of its other files.

    It handles photographs, and places without any files, which ``require_images`` refuses.
    """
    path = as_on_disk(Path(os.path.abspath(text)))
    if os.path.isdir(path):  # False for a folder that cannot be read, which the run reports
        if parts := saved_tables(path):
            return False, [shard_files([(part, tables.KIND) for part in parts], options, passed_over, str(path))]
        has_photographs, found = search(_files_below(path, passed_over), options, passed_over, str(path))
        others: list[Source] = [shard_files(found, options, passed_over, str(path))] if found else []
        return has_photographs or not found, others
    is_list = is_file_list(path) and "://" in first_address(path)
    kind = addresses.KIND if is_list else named_kind(text)
    if kind is None:
        return True, []
    if os.path.lexists(path):
        return False, [shard_files([(path, kind)], options, passed_over)]
    folder = str(split_pattern(path)[0])
    matches = [each for each in match_pattern(path) if not passed_over.has_entry(str(each), folder, first_bytes)]
    if not matches and not may_be_gone:
        raise CocoaError(f"{printable(text)} does not exist, and nothing matches it as a pattern")
    found = [(match, kind) for match in matches]
    return False, [shard_files(found, options, passed_over, folder, kind.suffixes)]


def _open_address(
    address: str,
    options: SourceOptions,
    on_error: Callable[[str | Path, str], object],
    passed_over: PassedOver,
    may_be_gone: bool,
) -> list[Source]:
    """Return the sources of a place on the web or on a remote file system.

    :raises CocoaError: If nothing is found.
    """
    if is_web(address):
        kind = named_kind(urlsplit(address).path)
        if kind is not None:
            return [shard_files([(address, kind)], options, passed_over)]
        require_host(address, options)
        return [RemoteImages("", passed_over, {address: {}}, options.allowed_hosts)]
    with reading(address):
        system, path = file_system(address)
        system.invalidate_cache()
        images: dict[str, Any] | None
        if not glob.has_magic(path) and system.isdir(path):
            root = system.unstrip_protocol(path).rstrip("/")
            names = (name for _, files in walk(root, passed_over) for name in sorted(files))
            has_photographs, found = search(names, options, passed_over, root, remote_start)
            images = None if has_photographs else {}
        else:
            root, listed = _match_remote(system, path, passed_over)
            found = [(name, kind) for name in listed if (kind := named_kind(name))]
            images = {name: info for name, info in listed.items() if is_image_name(name)}
    if images == {} and not found:
        if may_be_gone:
            return [RemoteImages(root or address, passed_over, images)]
        raise CocoaError(f"{printable(address)} does not exist, or has no images; name a folder or file that has some")
    sources: list[Source] = [shard_files(found, options, passed_over, root or None)] if found else []
    return sources if images == {} else [RemoteImages(root, passed_over, images, on_error=on_error), *sources]


def _match_remote(system: Any, path: str, passed_over: PassedOver) -> tuple[str, dict[str, Any]]:  # noqa: ANN401
    """Return the address of the folder that a pattern begins with, empty for a file, and what matches, by address."""
    matches = system.glob(path, detail=True)
    before, *pattern = re.split(r"[*?[]", path, maxsplit=1)
    root = system.unstrip_protocol(before.rpartition("/")[0]) if pattern else ""
    files = ((system.unstrip_protocol(name), info) for name, info in sorted(matches.items()))
    return root, {
        name: info
        for name, info in files
        if not passed_over.has_entry(name, root or name.rpartition("/")[0], remote_start)
    }


def without_descriptions(texts: Sequence[str], passed_over: PassedOver) -> list[str]:
    """Return places without those that describe images among them, which a shell's ``photos/*`` includes.

    :param passed_over: Counts them, since a text may also be a list that was meant to be indexed.
    """
    images = [os.path.abspath(text) for text in texts if is_image_name(text) and "://" not in text]
    stems = {os.path.splitext(image)[0] for image in images}
    folders = {os.path.dirname(image) for image in images}

    def describes(text: str) -> bool:
        path = os.path.abspath(text)
        (stem, suffix), (folder, name) = os.path.splitext(path), os.path.split(path)
        is_beside = suffix.lower() in TEXT_SUFFIXES and stem in stems
        is_description = is_beside or (name in METADATA_FILES and folder in folders)
        return is_description and passed_over.note(path, "description of an image")

    return [text for text in texts if "://" in text or not describes(text)]


def saved_tables(folder: Path) -> list[Path]:
    """Return the tables of a data set that ``datasets`` has saved in a folder, without its cache; none in others."""
    patterns = (pattern for marker, pattern in DATA_SET_FILES.items() if (folder / marker).is_file())
    found = (part for pattern in patterns for part in folder.glob(pattern))
    return sorted(part for part in found if not part.name.startswith("cache-"))


def local_path(text: str) -> str:
    """Return the path of a ``file:`` address; anything else as it is."""
    address = re.match("file://[^/]*", text, re.IGNORECASE)
    return text if address is None else os.fsdecode(unquote_to_bytes(text[address.end() :]))


def named_kind(name: str, kinds: Iterable[Kind] | None = None) -> Kind | None:
    """Return the kind of a file, by its name; None for an image, and for anything else.

    :param kinds: The kinds to choose from; by default all, and lists of addresses, which are read only if named.
    """
    known = (*KINDS.values(), addresses.KIND) if kinds is None else kinds
    return next((kind for kind in known if name.lower().endswith(kind.suffixes)), None)


def search(
    places: Iterable[Place],
    options: SourceOptions,
    passed_over: PassedOver,
    root: str,
    read_start: Callable[[str], bytes] = first_bytes,
) -> tuple[bool, list[tuple[Place, Kind]]]:
    """Return whether a folder has photographs, and its other files to read, without those that describe others.

    :param places: All files of the folder.
    :param read_start: As for ``PassedOver.has_file``.
    """
    wanted = [KINDS[name] for name in options.include or KINDS]
    found: list[tuple[Place, Kind]] = []
    has_photographs = False
    for place in places:
        name = str(place)
        kind = named_kind(name, wanted)
        if (kind is None and not is_image_name(name)) or passed_over.has_file(name, root, read_start):
            continue
        if kind is not None:
            found.append((place, kind))
        elif options.include:
            has_photographs = True
        else:
            return True, []
    described = {kind.beside(place) for place, kind in found if kind.beside is not None}
    return has_photographs, [(place, kind) for place, kind in found if place not in described]


def shard_files(
    files: Sequence[tuple[Place, Kind]],
    options: SourceOptions,
    passed_over: PassedOver,
    root: str | None = None,
    suffixes: tuple[str, ...] = (),
) -> ShardFiles:
    """Return a source of files; tables with addresses instead of images yield the images at the addresses.

    :raises MissingExtraError: If a package that reads one of the kinds is not installed.
    """
    for kind in {kind.name: kind for _, kind in files}.values():
        require(kind.package, kind.extra)
    first = next((place for place, kind in files if kind is tables.KIND), None)
    if first is not None and tables.has_addresses(first):
        files = [(place, addresses.KIND if kind is tables.KIND else kind) for place, kind in files]
    for place in (place for place, kind in files if kind is addresses.KIND):
        require_host(first_address(place), options)
    suffixes = suffixes or tuple({end for _, kind in files for end in kind.suffixes})
    return ShardFiles(files, options, passed_over, root, suffixes)


def _files_below(folder: Path, passed_over: PassedOver) -> Iterator[Path]:
    for path, names in FolderSearch(lambda *_: None, passed_over=passed_over).walk(str(folder)):
        # A photograph may be hidden; a hidden table or document belongs to a program.
        yield from (Path(path, name) for name in sorted(names) if is_image_name(name) or not name.startswith("."))
