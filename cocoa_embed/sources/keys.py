"""Read one indexed image again, by the key that its source gave it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from PIL.Image import Image

from cocoa_embed.data.places import open_binary
from cocoa_embed.errors import ImageError, one_line, printable, require
from cocoa_embed.images.file_names import as_on_disk
from cocoa_embed.images.load import decode_image, read_stable_file
from cocoa_embed.images.urls import is_web, shown_address
from cocoa_embed.sources.base import storable
from cocoa_embed.sources.files import files_of, undecode
from cocoa_embed.sources.open import local_path, named_kind
from cocoa_embed.sources.remote import read_address, require_plain
from cocoa_embed.sources.shard_files import Kind


def load_key(key: str, allowed_hosts: Sequence[str] = ()) -> Image:
    """Return the image that ``read_key`` reads, as upright RGB.

    :param allowed_hosts: The web hosts from which images are fetched, as ``Fetcher`` takes them.
    :raises ImageError: If there is no such image, or it cannot be used.
    """
    return decode_image(read_key(key, allowed_hosts), shown_key(key))[0]


def shown_key(key: str) -> str:
    """Return the key of an image as it is shown in errors."""
    return shown_address(key) if "://" in key else printable(key)


def read_key(key: str, allowed_hosts: Sequence[str] = ()) -> bytes:
    """Return the bytes of the image that a payload has as its path, without reading other images of the same file.

    :param key: A path or an address, with ``#`` and the name of the image where many are in one file. Accents may be
        composed in another way than in the names of the file and the image.
    :param allowed_hosts: The web hosts from which whole files are fetched, as ``Fetcher`` takes them.
    :raises ImageError: If there is no such image, or it cannot be read.
    """
    key, hosts = local_path(key), tuple(allowed_hosts)
    is_address = "://" in key
    if is_address:
        require_plain(key)
    for spelling in dict.fromkeys((key,) if is_address else (key, undecode(key))):
        if not is_address and os.path.lexists(spelling):
            return read_stable_file(Path(spelling))
        for file in files_of(spelling):
            kind = named_kind(urlsplit(file).path if is_web(file) else file)
            name, found = storable(spelling[len(file) + 1 :]), file if is_address else str(as_on_disk(Path(file)))
            if kind is not None and kind.read_one is not None and (is_address or os.path.isfile(found)):
                return _read_one(kind.read_one, kind, found, name, hosts)
    return read_address(key, hosts) if is_address else read_stable_file(as_on_disk(Path(key)))


def _read_one(
    read: Callable[[BinaryIO, str, str], bytes], kind: Kind, file: str, name: str, hosts: tuple[str, ...]
) -> bytes:
    try:
        require(kind.package, kind.extra)
        place = Path(file) if "://" not in file else file
        with BytesIO(read_address(file, hosts)) if is_web(file) else open_binary(place) as opened:
            return read(opened, file, name)
    except ImageError:
        raise
    except FileNotFoundError:
        return read_address(f"{file}#{name}", hosts)
    except Exception as error:  # remote file systems and decoders raise nearly anything
        raise ImageError(printable(f"{file}#{name}"), f"cannot be read ({one_line(error)})") from error
