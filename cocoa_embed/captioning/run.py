"""Caption the images of a folder: estimate the cost, append a journal line per image, then write the metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from cocoa_embed.captioning.prompts import NoAnswerError, Prompts, Request, Writer
from cocoa_embed.data.image_folder import (
    METADATA_FILE,
    DescribedImage,
    metadata_file,
    read_metadata,
    read_text,
    text_beside,
)
from cocoa_embed.encode.read_ahead import read_ahead
from cocoa_embed.errors import CocoaError, ImageError, RowError, one_line, printable
from cocoa_embed.folders import only_writer, refuse_checkpoint, refuse_foreign_folder, write_atomically
from cocoa_embed.images.find_files import find_images
from cocoa_embed.images.load import image_size, load_image, read_stable_file

JOURNAL = ".cocoa-captions.jsonl"
"""A file in the output folder: a line for each image, appended when it is captioned. It marks the folder as ours."""

SAMPLE = 64
"""The number of images whose sizes the estimate reads."""

FAILURES_IN_A_ROW = 8
"""After this many images without an answer, the run stops: the fault is the writer's, not the images'."""


class Picture(NamedTuple):
    """An image to caption.

    :param file_name: Its path relative to the output folder.
    :param text: The longest text that its own folder has for it, if any.
    :param rows: Its rows in the metadata of its folder, each with the file that the text is from.
    :param state: Size, mtime, text and settings; an entry with another state is not used.
    """

    path: Path
    file_name: str
    text: str | None
    rows: list[dict[str, Any]]
    state: list[Any]


def check_folders(folder: Path, out: Path) -> None:
    """Check that there is a folder to caption, and that ``out`` may be written.

    :raises CocoaError: If there is none, or ``out`` holds something else.
    """
    if not folder.is_dir():
        raise CocoaError(f"{printable(folder)} is not a folder; give a folder of images.")
    refuse_foreign_folder(out, marker=JOURNAL)
    refuse_checkpoint(out)


@dataclass
class CaptionRun:
    """Captions the images of ``folder`` into ``out``.

    :param wordings: The number of captions to ask for per image; equal ones are written once.
    :param questions: The number of question-answer pairs to ask for per image.
    :param replace_below: Images whose text has at least this many words keep it, and are not captioned.
    :param failed: Images that have got no caption so far, each with ``path`` and ``reason``.
    :param summary: When the run has ended: how many images and texts the metadata hold, ``failed``, and ``unusable``:
        the unusable answers about images that have a caption.
    :raises CocoaError: If the folder holds no images, or its metadata cannot be read.
    """

    folder: Path
    out: Path
    writer: Writer
    prompts: Prompts
    wordings: int
    questions: int
    replace_below: int
    failed: list[dict[str, str]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pictures = list(self._find_pictures())
        journal = self.out / JOURNAL
        self._entries = _entries(journal.read_bytes() if journal.is_file() else b"")

    @property
    def remaining(self) -> list[Picture]:
        """The images that are still to be captioned."""
        return [each for each in self.pictures if not self._is_kept(each) and self._entry(each) is None]

    def plan(self) -> dict[str, Any]:
        """Return what the run would do and cost, without a model. Tokens are estimates; those of answers, a maximum."""
        remaining, tokens = self.remaining, []
        for picture in remaining[:: max(1, len(remaining) // SAMPLE)]:
            try:
                size = image_size(read_stable_file(picture.path), str(picture.path))
                tokens.append(sum(self.writer.tokens(*size, request.prompt) for request in self._requests(picture)))
            except (ImageError, ValueError):  # the run reports it
                continue
        kept, requests = sum(map(self._is_kept, self.pictures)), len(remaining) * (self.wordings + bool(self.questions))
        return {
            "writer": self.writer.name,
            "images": len(self.pictures),
            "kept": kept,
            "done": len(self.pictures) - kept - len(remaining),
            "to_caption": len(remaining),
            "requests": requests,
            "tokens_in": round(sum(tokens) / max(1, len(tokens)) * len(remaining)),
            "tokens_out_at_most": requests * self.prompts.max_tokens,
        }

    def caption(self) -> Generator[int]:
        """Caption the images that the journal does not have; yield the number of images of each batch.

        The metadata are written at the end, even if the run ends early.

        :raises CocoaError: If the writer fails for any image, ``FAILURES_IN_A_ROW`` images have no answer, ``out``
            cannot be written, or another run writes to it.
        """
        with ExitStack() as stack:
            stack.enter_context(only_writer(self.out, marker=JOURNAL))
            with self._writing():
                journal = stack.enter_context((self.out / JOURNAL).open("ab+", buffering=0))
                journal.seek(0)
                content = journal.read()  # again: another run may have written since
                journal.truncate(content.rfind(b"\n") + 1)
            self._entries = _entries(content)
            try:
                yield from self._caption(journal)
            finally:
                with self._writing():
                    self._write_metadata()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CocoaError(
                f"{printable(self.out)} cannot be written ({error.strerror}); give another --out, or fix that: the "
                "same command then continues from the captions in it."
            ) from error

    def _caption(self, journal: FileIO) -> Iterator[int]:
        remaining, in_a_row, threads = iter(self.remaining), 0, self.writer.threads
        batches = iter(lambda: list(islice(remaining, self.writer.images_at_once)), [])
        for batch, future in read_ahead(self._write_texts, batches, workers=threads, ahead=threads):
            for picture, texts in future.result():
                in_a_row = in_a_row + 1 if isinstance(texts, NoAnswerError) else 0
                if isinstance(texts, CocoaError):
                    self.failed.append({"path": str(picture.path), "reason": str(texts)})
                else:
                    entry = {"file_name": picture.file_name, "state": picture.state, **texts}
                    self._entries[picture.file_name] = entry
                    line = json.dumps(entry).encode() + b"\n"
                    with self._writing():
                        while line:  # a disk that is nearly full may take only a part of it
                            line = line[journal.write(line) :]
                if in_a_row == FAILURES_IN_A_ROW:
                    raise CocoaError(
                        f"{in_a_row} images in a row have no answer: {texts}. The captions so far are kept in "
                        f"{printable(self.out)}; the same command continues."
                    )
            yield len(batch)

    def _write_metadata(self) -> None:
        """Write the metadata of all images that have a text, atomically."""
        kept: list[dict[str, Any]] = []
        written: list[dict[str, Any]] = []
        unusable: list[dict[str, str]] = []
        for picture in self.pictures:
            entry = self._entry(picture)
            if self._is_kept(picture):
                kept += [row for row in picture.rows if row["text"].strip()]
            elif entry is not None:
                faults = [{"path": str(picture.path), "reason": reason} for reason in entry["unusable"]]
                (unusable if entry["captions"] else self.failed).extend(faults)
                written += [self._row(picture, entry)] if entry["captions"] else []
        write_atomically(self.out / METADATA_FILE, "".join(f"{_json(row)}\n" for row in kept + written))
        counts = {key: sum(len(row[key]) for row in written) for key in ("captions", "questions")}
        counts |= {"captioned": len(written), "kept": sum(map(self._is_kept, self.pictures))}
        self.summary = {"out": str(self.out), **counts, "failed": self.failed, "unusable": unusable}

    def _find_pictures(self) -> Iterator[Picture]:
        metadata = metadata_file(self.folder)
        described: dict[Path, list[DescribedImage]] = {path.absolute(): [] for path in find_images([self.folder])}
        for row in () if metadata is None else read_metadata(metadata):
            if isinstance(row, RowError):
                self.failed.append({"path": row.source, "reason": row.reason})
            else:
                described.setdefault(row.path, []).append(row)
        if not described:
            raise CocoaError(f"{printable(self.folder)} holds no images; give a folder of images.")
        if metadata is None:
            described = self._read_texts(described)
        settings = json.dumps([self.writer.name, self.wordings, self.questions, self.prompts.model_dump()])
        version = hashlib.sha256(settings.encode()).hexdigest()[:16]
        for path, images in described.items():
            try:
                stat = path.stat()
            except OSError as error:  # a link to nowhere
                self.failed.append({"path": str(path), "reason": f"cannot be read ({error.strerror})"})
                continue
            file_name = os.path.relpath(path, self.out.resolve())
            rows = [
                {"file_name": file_name, "caption_source": str(metadata or image.source), **image.others, "text": text}
                for image in images
                for text in image.wordings[:1] or [""]
            ]
            text = max((row["text"] for row in rows), key=_words, default="").strip() or None
            yield Picture(path, file_name, text, rows, [stat.st_size, stat.st_mtime_ns, text, version])

    def _read_texts(self, paths: Iterable[Path]) -> dict[Path, list[DescribedImage]]:
        """Return images with the text files next to them.

        An image whose text file cannot be read is left out, so that its text is not replaced.
        """
        described: dict[Path, list[DescribedImage]] = {}
        for path in paths:
            beside = text_beside(path)
            try:
                text = None if beside is None else read_text(beside)
            except RowError as error:
                self.failed.append({"path": error.source, "reason": error.reason})
                continue
            described[path] = [] if text is None else [DescribedImage(printable(str(beside)), path, {"text": text})]
        return described

    def _is_kept(self, picture: Picture) -> bool:
        return picture.text is not None and _words(picture.text) >= self.replace_below

    def _entry(self, picture: Picture) -> dict[str, Any] | None:
        entry = self._entries.get(picture.file_name)
        return entry if entry is not None and entry["state"] == picture.state else None

    def _requests(self, picture: Picture) -> list[Request]:
        return self.prompts.requests(self.wordings, self.questions, picture.text, self.writer.follows_prompts)

    def _write_texts(self, batch: list[Picture]) -> list[tuple[Picture, dict[str, Any] | CocoaError]]:
        """Return the texts of each image, or why there are none."""
        broken: list[tuple[Picture, dict[str, Any] | CocoaError]] = []
        images = []
        for picture in batch:
            try:
                image = load_image(picture.path)
                self.writer.tokens(*image.size, "")  # raises for a size that the writer does not take
                images.append((picture, image, self._requests(picture)))
            except (ImageError, ValueError) as error:
                reason = error.reason if isinstance(error, ImageError) else one_line(error)
                broken.append((picture, CocoaError(reason)))
        try:
            answers = self.writer.write([each for _, each, _ in images], [each for *_, each in images])
        except NoAnswerError as error:
            return [*broken, *((picture, error) for picture, *_ in images)]
        read = (self.prompts.read(asked, given) for (*_, asked), given in zip(images, answers, strict=True))
        return [*broken, *zip((picture for picture, *_ in images), read, strict=True)]

    def _row(self, picture: Picture, entry: dict[str, Any]) -> dict[str, Any]:
        captions = [*entry["captions"]]
        return {
            **(picture.rows[0] if picture.rows else {"file_name": picture.file_name}),
            **({} if picture.text is None else {"replaced_text": picture.text}),
            "text": captions[0],
            "captions": captions,
            "questions": entry["questions"],
            "caption_source": self.writer.name,
            "caption_prompts": [*entry["captions"].values()] if self.writer.follows_prompts else [],
        }


def _entries(journal: bytes) -> dict[str, dict[str, Any]]:
    """Return the entries of a journal by file name; a kill may have cut off the last line."""
    return {entry["file_name"]: entry for entry in map(json.loads, journal.split(b"\n")[:-1])}


def _json(row: dict[str, Any]) -> str:
    """Return a row as JSON, which has neither dates nor non-finite numbers: they become strings and null."""
    return json.dumps(json.loads(json.dumps(row, default=str), parse_constant=lambda _: None))


def _words(text: str) -> int:
    return len(text.split())
