"""Write the requests about an image, and read the usable texts from the answers."""

import re
import string
from collections.abc import Sequence
from importlib.resources import files
from itertools import dropwhile, groupby
from typing import Any, NamedTuple, Protocol

from PIL import Image
from pydantic import BaseModel

from cocoa_embed.data.rows import shortened
from cocoa_embed.errors import CocoaError

QUESTIONS = "questions"
"""The name of the prompt for question-answer pairs; the others are for captions."""

_SIGNS = r"(?:[^\w\n]|\d)*"
MARK = re.compile(rf"^{_SIGNS}(?:Q(?:uestion)?|(?P<answer>A(?:nswer)?)){_SIGNS}?:", re.M | re.I)
"""Matches the start of a line with a question or an answer, ``Q:`` or ``A:``, also with the signs of ``**Q1:``.

A match does not cross lines: an answer may consist of thousands of line ends.
"""

WHOLE_SENTENCES = re.compile(r".*(?:[.!?](?=\s)|[。！？])", re.DOTALL)


class Request(NamedTuple):
    """A prompt with its name, and whether its answer is sampled."""

    name: str
    prompt: str
    is_drawn: bool = False


class Answer(NamedTuple):
    """An answer, whether it was cut off at ``max_tokens``, and whether the writer marked it as a refusal."""

    text: str
    is_cut: bool = False
    is_refused: bool = False


class NoAnswerError(CocoaError):
    """A writer has no answer about an image; a later run asks again.

    :param wait: The minimum seconds after which the same request may succeed; None if it will not.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Writer(Protocol):
    """Answers requests about images."""

    name: str
    """The source of the texts, as shown to their readers."""
    follows_prompts: bool
    """Whether an answer depends on the prompt."""
    images_at_once: int
    """The number of images in a call of ``write``."""
    threads: int
    """The number of calls of ``write`` at a time."""

    def tokens(self, width: int, height: int, prompt: str) -> int:
        """Return how many tokens a request about an image of this size takes.

        :raises ValueError: If the writer takes no image of this size.
        """
        ...

    def write(self, images: Sequence[Image.Image], requests: Sequence[Sequence[Request]]) -> list[list[Answer]]:
        """Return the answers to the requests about each image; each image has the same number of requests.

        :raises NoAnswerError: If there is no answer for these images.
        :raises CocoaError: If there would be no answer for any image.
        """
        ...


class Prompts(BaseModel):
    """The prompts and their settings, as in ``prompts.json``.

    :param captions: The prompts of captions, by name; the first one writes an image's ``text``.
    :param questions: The prompt for ``{count}`` question-answer pairs.
    :param label: A text that precedes the prompt if a short text, such as the name of a class, is replaced.
    :param refusals: Regular expressions that match the beginning of a refusal, ignoring case.
    :param max_tokens: The maximum tokens of an answer.
    :param sampling: The ``temperature`` and ``top_p`` of a prompt that is asked again.
    """

    captions: dict[str, str]
    questions: str
    label: str
    refusals: list[str]
    max_tokens: int
    sampling: dict[str, float]

    @classmethod
    def load(cls) -> "Prompts":
        """Read the prompts of the package."""
        return cls.model_validate_json((files("cocoa_embed.captioning") / "prompts.json").read_text("utf-8"))

    def requests(self, wordings: int, questions: int, label: str | None, are_followed: bool) -> list[Request]:
        """Return the requests about an image; if there are more wordings than prompts, further answers are sampled.

        :param label: The text of the image that is replaced.
        :param are_followed: Whether the writer follows prompts; if not, only the first one is used.
        """
        before = "" if label is None else self.label.format(label=valid_unicode(label))
        prompts = [*self.captions.items()][: None if are_followed else 1]
        wanted = [Request(*prompts[i % len(prompts)], is_drawn=i >= len(prompts)) for i in range(wordings)]
        wanted += [Request(QUESTIONS, self.questions.format(count=questions))] * bool(questions)
        return [request._replace(prompt=before + request.prompt) for request in wanted]

    def read(self, requests: Sequence[Request], answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the distinct usable texts of an image: no refusals, no empty answers, no half sentences.

        :returns: ``captions``: the name of the prompt by the caption; ``questions``: objects with ``question`` and
            ``answer``; ``unusable``: why the other answers cannot be used.
        """
        captions: dict[str, tuple[str, str]] = {}
        questions: dict[str, dict[str, str]] = {}
        unusable = []
        for request, answer in zip(requests, answers, strict=True):
            text = valid_unicode(answer.text).strip()
            pairs = question_pairs(text)[: -1 if answer.is_cut else None]
            if answer.is_refused or self._is_refusal(text):
                unusable.append(f"{request.name}: refused: {shortened(text)}")
            elif request.name == QUESTIONS and pairs:
                for question, answered in pairs:
                    texts = {"question": _line(question), "answer": _line(answered)}
                    questions.setdefault(_same(question), texts)
            elif request.name != QUESTIONS and _same(text := _line(_whole(text) if answer.is_cut else text)):
                captions.setdefault(_same(text), (text, request.name))
            else:
                fault = "no lines with Q: and A: in" if request.name == QUESTIONS else "empty:"
                unusable.append(f"{request.name}: {'cut off, and ' * answer.is_cut}{fault} {shortened(text)}")
        return {"captions": dict(captions.values()), "questions": [*questions.values()], "unusable": unusable}

    def _is_refusal(self, text: str) -> bool:
        beginning = text.replace("’", "'").lstrip("\"'*")
        return any(re.match(refusal, beginning, re.IGNORECASE) for refusal in self.refusals)


def question_pairs(text: str) -> list[tuple[str, str]]:
    """Return the questions of a text that have an answer, and their answers.

    Several questions or answers in a row count as one, from the first to the end of the last.
    """
    found = dropwhile(_is_answer, MARK.finditer(text))
    marks = [next(run) for _, run in groupby(found, _is_answer)]
    ends = [mark.start() for mark in marks[1:]]
    texts = [_without_number(text[mark.end() : end]) for mark, end in zip(marks, ends, strict=False)]
    texts += [_bare(text[mark.end() :]) for mark in marks[-1:]]
    return [pair for pair in zip(texts[::2], texts[1::2], strict=False) if all(pair)]


def _is_answer(mark: re.Match[str]) -> bool:
    return mark["answer"] is not None


def _without_number(text: str) -> str:
    """Return a text without trailing lines of signs and digits, which belong to the next mark."""
    lines = _bare(text).split("\n")
    while len(lines) > 1 and not re.search(r"[^\W\d]", lines[-1]):
        lines.pop()
    return _bare("\n".join(lines))


def _bare(text: str) -> str:
    return text.strip(string.whitespace + "*")


def valid_unicode(text: str) -> str:
    """Return a text without unpaired surrogates, which JSON may hold but which cannot be sent or written."""
    return text.encode("utf-8", "ignore").decode()


def _whole(text: str) -> str:
    found = WHOLE_SENTENCES.match(text)
    return "" if found is None else found.group()


def _line(text: str) -> str:
    return " ".join(text.split()).strip('"“”')


def _same(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))
