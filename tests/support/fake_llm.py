"""A fake language model that records its prompts and returns a fixed reply."""

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms import ChatMessage, ChatResponse, MockLLM


class FakeLLM(MockLLM):
    """A chat model that accepts images."""

    reply: str = "so it is"
    asked: list[list[ChatMessage]] = Field(default_factory=list)

    def __init__(self, reply: str = "so it is") -> None:
        super().__init__(is_chat_model=True)
        self.reply = reply

    def chat(self, messages: Sequence[ChatMessage], **_: Any) -> ChatResponse:
        self.asked.append(list(messages))
        return ChatResponse(message=ChatMessage(role="assistant", content=self.reply))

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self.chat(messages, **kwargs)
