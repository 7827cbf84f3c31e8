"""Answer a question about a folder of images: retrieve images, show them to a language model, check its citations.

    pip install '.[llama-index,qdrant]'
    python examples/multimodal_rag.py cocoa-qwen2vl path/to/images "Which picture has a red circle?" --llm MODEL

MODEL is the folder of a vision-language model such as Qwen2-VL, which runs on this machine; or a model's name at an
OpenAI-compatible endpoint given by the environment: OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=...
The index stays in ./rag-index and answers from all folders that were indexed into it.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ContentBlock, ImageBlock, TextBlock
from llama_index.core.llms import LLM
from llama_index.core.schema import ImageNode, MetadataMode
from PIL import Image

from cocoa_embed.errors import CocoaError, ImageError
from cocoa_embed.images.load import load_image
from cocoa_embed.integrations.llama_index import CocoaRetriever
from cocoa_embed.integrations.qdrant import QdrantIndexer

INSTRUCTIONS = (
    "Answer the question from the numbered images alone. After each statement give the number of the image that shows"
    " it, in square brackets, like this: [1]. If the images do not show the answer, say so."
)
NOTHING_FOUND = "There is no image to answer this from."
LONGEST_SIDE = 1024  # in pixels, of what the language model sees
CITATION = re.compile(r"\[(?:images? )?(\d+(?:, ?\d+)*)\]", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """The language model's answer, and the images it was given."""

    text: str  # citations of images that were not given are marked
    images: list[str]  # the paths of the images; [1] cites the first
    cited: list[int]
    skipped: list[str]  # why images that were retrieved could not be read


class LocalModel:
    """A vision-language model of transformers with the ``chat`` method of LlamaIndex's models."""

    def __init__(self, folder: str, max_new_tokens: int = 256) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.max_new_tokens = max_new_tokens

    def chat(self, messages: Sequence[ChatMessage]) -> ChatResponse:
        conversation = [
            {"role": message.role.value, "content": [as_part(block) for block in message.blocks]}
            for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        text = self.processor.decode(tokens, skip_special_tokens=True)
        return ChatResponse(message=ChatMessage(role="assistant", content=text))


def answer(question: str, retriever: BaseRetriever, llm: LLM | LocalModel) -> Answer:
    """Answer from the images that a retriever finds; if there are none, do not ask the language model."""
    images, skipped = [], []
    for found in retriever.retrieve(question):
        if isinstance(found.node, ImageNode) and found.node.image_path:
            try:
                images.append((found.node, as_jpeg(found.node.resolve_image())))
            except ImageError as error:
                skipped.append(str(error))
    if not images:
        return Answer(NOTHING_FOUND, [], [], skipped)
    response = llm.chat(build_messages(question, images))
    text, cited = check_citations(response.message.content or "", len(images))
    return Answer(text, [node.image_path for node, _ in images], cited, skipped)


def build_messages(question: str, images: Sequence[tuple[ImageNode, bytes]]) -> list[ChatMessage]:
    """Number the images, add caption and metadata to each, and put the question last."""
    blocks: list[ContentBlock] = []
    for number, (node, jpeg) in enumerate(images, 1):
        text = node.get_content(MetadataMode.LLM).strip()  # the caption, and the columns of metadata.jsonl
        blocks += [TextBlock(text=f"Image {number}:\n{text}"), ImageBlock(image=jpeg, image_mimetype="image/jpeg")]
    blocks.append(TextBlock(text=f"Question: {question}"))
    return [ChatMessage(role="system", content=INSTRUCTIONS), ChatMessage(role="user", blocks=blocks)]


def check_citations(text: str, count: int) -> tuple[str, list[int]]:
    """Mark citations of images that were not given; return the text and the numbers of the others."""
    cited: set[int] = set()

    def check(match: re.Match[str]) -> str:
        numbers = [int(number) for number in match[1].split(",")]
        known = {number for number in numbers if 1 <= number <= count}
        cited.update(known)
        return "".join(f"[{number}]" if number in known else f"[{number}: no such image]" for number in numbers)

    return CITATION.sub(check, text), sorted(cited)


def as_jpeg(source: str | BytesIO) -> bytes:
    """Read an image of any format that can be indexed, and make it small enough to send."""
    image = load_image(source)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def as_part(block: ContentBlock) -> dict[str, object]:
    """Convert a block of LlamaIndex to a part of a transformers conversation."""
    if isinstance(block, ImageBlock):
        return {"type": "image", "image": Image.open(block.resolve_image())}
    return {"type": "text", "text": block.text}


def connect(name: str) -> LLM:
    """Return a model at the endpoint of OPENAI_BASE_URL."""
    if "OPENAI_BASE_URL" not in os.environ:
        sys.exit(
            f"{name} is not a folder; for a model at an endpoint set OPENAI_BASE_URL and, if needed, OPENAI_API_KEY"
        )
    try:
        from llama_index.llms.openai_like import OpenAILike
    except ModuleNotFoundError:
        sys.exit("an endpoint needs one more package; run: pip install llama-index-llms-openai-like")
    key = os.environ.get("OPENAI_API_KEY", "none")
    return OpenAILike(model=name, api_base=os.environ["OPENAI_BASE_URL"], api_key=key, is_chat_model=True)


def main(model: str, folder: str, question: str, llm: str) -> None:
    language_model = LocalModel(llm) if Path(llm).is_dir() else connect(llm)
    with QdrantIndexer(model, path="rag-index") as indexer:
        indexer.index(folder, prune=True)
        given = answer(question, CocoaRetriever(indexer, similarity_top_k=4), language_model)
    print(given.text)
    for number in given.cited:
        print(f"[{number}] {given.images[number - 1]}")
    for reason in given.skipped:
        print(f"skipped: {reason}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for argument in ("model", "folder", "question"):
        parser.add_argument(argument)
    parser.add_argument("--llm", required=True)
    try:
        main(**vars(parser.parse_args()))
    except CocoaError as error:
        sys.exit(str(error))
