"""A chat whose KV cache stays from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from river_llm.config import DraftConfig, PromptConfig, SamplingConfig
from river_llm.errors import ConfigError
from river_llm.generate import GenerationResponse
from river_llm.lm import PolicyChoice, RiverLM
from river_llm.settings import split_settings
from river_llm.text.prompt import Message


class Conversation:
    """A chat that keeps its KV cache from turn to turn, as far as a prompt would read it likewise:
    in lossless mode all of it; what exits wrote of an answer is read anew with the next turn.

    Attributes:
        messages: all turns so far.
    """

    def __init__(
        self,
        lm: RiverLM,
        system: str | None = None,
        *,
        policy: PolicyChoice = ...,
        drafts: DraftConfig | None = None,
        **settings: Any,
    ) -> None:
        """Arguments as of `RiverLM.generate`; `system` is what the model is told first.

        Raises:
            ConfigError: a setting is unknown or out of its range, the model has no chat template,
                or its template can't take the system's text or an argument.
        """
        self.messages: list[Message] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self._lm = lm
        self._policy = policy
        self._drafts = drafts
        self._form, self._sampling = split_settings(settings, PromptConfig, SamplingConfig)
        self._encode({"role": "user", "content": "Hi"})  # what it can't take is said at once

    def stream(self, text: str) -> Iterator[GenerationResponse]:
        """The answer to a user's turn. What has come when the stream is cut short stays.

        Raises:
            ConfigError: the text is empty or no string.
            ContextFullError: the conversation no longer fits the model's context.
        """
        if not isinstance(text, str):
            raise ConfigError(f"the message is of type {type(text).__name__}; give a string")
        if not text.strip():
            raise ConfigError("the message is empty; give some text")
        turn: Message = {"role": "user", "content": text}
        token_ids = self._encode(turn)
        answer: list[str] = []
        try:
            for response in self._lm.stream_tokens(
                token_ids,
                self._sampling,
                reuse_cache=True,
                policy=self._policy,
                drafts=self._drafts,
            ):
                answer.append(response.text)
                yield response
        finally:
            if answer:
                self.messages += [turn, {"role": "assistant", "content": "".join(answer)}]

    def _encode(self, turn: Message) -> list[int]:
        return self._lm.encode([*self.messages, turn], self._form)
