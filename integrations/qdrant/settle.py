"""The end of an indexing run: bring the stored points up to date with files that changed, moved or were deleted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles
from cocoa_embed.integrations.qdrant.index_state import Content, IndexState, description_digest
from cocoa_embed.integrations.qdrant.index_summary import Counts
from cocoa_embed.integrations.qdrant.points import ImageFile, Payload, update_payload
from cocoa_embed.integrations.qdrant.read_files import is_deleted
from cocoa_embed.integrations.qdrant.stores.base import Store
from cocoa_embed.integrations.qdrant.thumbnails import remove_thumbnail

BATCH_POINTS = 256

IsMissing = Callable[[str], bool]


def settle(files: ImageFiles, store: Store, state: IndexState, counts: Counts, *, prune: bool) -> None:
    """Update the payloads that are out of date and delete the points that no file holds.

    :param files: The files of the run.
    :param state: What the run has found; it is updated.
    :param prune: Whether to remove files that no longer exist from the index.
    :raises CocoaError: If the store fails.
    """
    is_missing_file = partial(is_missing, files=files)
    if prune:
        counts.pruned += sum(state.remove_missing(id_, is_missing_file) for id_ in state.contents)
    replace_missing_first_files(state, is_missing_file)
    descriptions = new_descriptions(files, state, counts, is_missing_file)
    changed = state.changed()
    held = [id_ for id_ in {**changed, **descriptions} if state.contents[id_].locations]
    update_payloads(store, state, held, descriptions)
    delete_points(store, state, sorted(changed.keys() - held))


def is_missing(path: str, files: ImageFiles) -> bool:
    """Return whether a file no longer exists that the run would have found."""
    return files.covers(path) and is_deleted(path)


def replace_missing_first_files(state: IndexState, is_missing_file: IsMissing) -> None:
    """Remove the missing files of a content whose first file is missing, if another one exists."""
    for id_, content in state.contents.items():
        if len(content.locations) > 1 and is_missing_file(content.locations[0].path):
            if not all(is_deleted(location.path) for location in content.locations[1:]):
                state.remove_missing(id_, is_missing_file)


def new_descriptions(
    files: ImageFiles, state: IndexState, counts: Counts, is_missing_file: IsMissing
) -> dict[str, Payload]:
    """Return the captions and metadata, by content, that differ from the stored ones.

    The first file of a content describes it.
    """
    descriptions: dict[str, Payload] = {}
    failed = {failure["path"] for failure in counts.failed}
    for file in (file for file in files if str(file.path) not in failed):
        path = file.stored_path
        id_ = state.id_of(path)
        if id_ is None or state.contents[id_].locations[0].path != path:
            continue
        if has_new_description(file, state.contents[id_], is_missing_file):
            descriptions[id_] = file.description
            if not state.contents[id_].is_new and path not in counts.replaced:
                counts.updated.add(path)
    return descriptions


def has_new_description(file: ImageFile, content: Content, is_missing_file: IsMissing) -> bool:
    """Return whether a file's caption and metadata differ from those stored with its content.

    A file without a description keeps the stored one, unless the ``metadata.jsonl`` that gave it was read or deleted.
    """
    if file.caption_source is None:
        source = content.caption_source
        return source is not None and (source in file.checked_sources or is_missing_file(source))
    return description_digest(file.description) != content.description_digest


def update_payloads(store: Store, state: IndexState, ids: Sequence[str], descriptions: Mapping[str, Payload]) -> None:
    """Store the locations, thumbnails and new descriptions of contents."""
    for batch in batches(ids):
        for id_, stored in store.retrieve(batch).items():
            content = state.contents[id_]
            payload = update_payload(
                stored, locations=content.locations, description=descriptions.get(id_), thumbnail=content.thumbnail
            )
            store.overwrite_payload(id_, payload)


def delete_points(store: Store, state: IndexState, ids: Sequence[str]) -> None:
    """Delete the points of contents and their thumbnails."""
    for batch in batches(ids):
        store.delete(batch)
        for id_ in batch:
            remove_thumbnail(id_, state.contents[id_].thumbnail)


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield ids in batches of at most ``BATCH_POINTS``."""
    for start in range(0, len(ids), BATCH_POINTS):
        yield ids[start : start + BATCH_POINTS]
