"""The end of an indexing run: bring the stored points up to date with files that changed, moved or were deleted."""

from collections.abc import Mapping, Sequence

from cocoa_embed.integrations.qdrant.image_metadata import ImageFiles, is_deleted
from cocoa_embed.integrations.qdrant.index_run import IndexRun
from cocoa_embed.integrations.qdrant.index_state import Content, IndexState, description_digest
from cocoa_embed.integrations.qdrant.points import ImageFile, Payload, make_payload
from cocoa_embed.integrations.qdrant.stores.store import Store
from cocoa_embed.integrations.qdrant.thumbnails import remove_thumbnail

BATCH_POINTS = 256


def settle(run: IndexRun, *, prune: bool) -> None:
    """Update the payloads that are out of date and delete the points that no file holds.

    :param run: A run that has stored all new content; its state and counts are updated.
    :param prune: Whether to remove files that no longer exist from the index.
    :raises CocoaError: If the store fails.
    """
    state = run.state
    if prune:
        run.pruned += sum(state.remove_missing(id_, run.files.misses) for id_ in state.contents)
    replace_missing_first_files(state, run.files)
    descriptions = new_descriptions(run)
    changed = [id_ for id_, content in state.contents.items() if content.has_changed]
    held = [id_ for id_ in dict.fromkeys([*changed, *descriptions]) if state.contents[id_].locations]
    update_payloads(run.store, state, held, descriptions)
    deleted = sorted(set(changed).difference(held))
    for start in range(0, len(deleted), BATCH_POINTS):
        run.store.delete(deleted[start : start + BATCH_POINTS])
    for id_ in deleted:
        remove_thumbnail(id_, state.contents[id_].thumbnail)


def replace_missing_first_files(state: IndexState, files: ImageFiles) -> None:
    """Remove the missing files of a content whose first file is missing, if another one exists."""
    for id_, content in state.contents.items():
        paths = list(content.locations)
        if len(paths) > 1 and files.misses(paths[0]) and not all(map(is_deleted, paths[1:])):
            state.remove_missing(id_, files.misses)


def new_descriptions(run: IndexRun) -> dict[str, Payload]:
    """Return the captions and metadata, by content, that differ from the stored ones.

    The first file of a content describes it.
    """
    descriptions: dict[str, Payload] = {}
    failed = {failure["path"] for failure in run.failed}
    for file in (file for file in run.files if str(file.path) not in failed):
        path = file.stored_path
        id_ = run.state.ids.get(path)
        if id_ is None or next(iter((content := run.state.contents[id_]).locations), None) != path:
            continue
        if has_new_description(file, content, run.files):
            descriptions[id_] = file.description
            if not content.is_new:
                run.outcomes.setdefault(path, "updated")
    return descriptions


def has_new_description(file: ImageFile, content: Content, files: ImageFiles) -> bool:
    """Return whether a file's caption and metadata differ from those stored with its content.

    A file without a description keeps the stored one, unless the ``metadata.jsonl`` that gave it was read or deleted.
    """
    if file.caption_source is None:
        source = content.caption_source
        return source is not None and (source in file.checked_sources or files.misses(source))
    return description_digest(file.description) != content.description_digest


def update_payloads(store: Store, state: IndexState, ids: Sequence[str], descriptions: Mapping[str, Payload]) -> None:
    """Store the locations, thumbnails and new descriptions of contents."""
    for start in range(0, len(ids), BATCH_POINTS):
        for id_, stored in store.retrieve(ids[start : start + BATCH_POINTS]).items():
            content = state.contents[id_]
            locations = list(content.locations.values())
            payload = make_payload(stored, locations, descriptions.get(id_, {}), content.thumbnail)
            store.overwrite_payload(id_, payload)
