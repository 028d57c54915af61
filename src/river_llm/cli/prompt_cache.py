"""`--prompt-cache FILE`: a prompt that is read once, for `generate` and `chat`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from river_llm.cli.streams import note
from river_llm.cli.usage import usage_error
from river_llm.config import PolicyConfig
from river_llm.errors import PromptCacheError
from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    from river_llm.generate import GenerationResponse
    from river_llm.lm import RiverLM


def check_prompt_cache(path: Path | None, policy: PolicyConfig) -> None:
    """Validate that prompts can be kept at all.

    Raises:
        typer.Exit: by their prefill rule, they can't.
    """
    if path is not None and policy.prefill == "sequence":
        raise usage_error(
            "--prompt-cache doesn't go with --prefill sequence: the prompt leaves as a whole, so "
            "its prefix would be another one in another prompt"
        )


class PromptCache:
    """The file, and what it holds."""

    def __init__(self, path: Path, lm: RiverLM) -> None:
        """Load the file if it is there.

        Raises:
            PromptCacheError: it is damaged, of another model or setting, or it isn't there and
                can't be written either.
        """
        from river_llm.generate.prompt_cache import check_writable

        self._path = path
        self._lm = lm
        self._kept: list[int] = []
        self._is_left = False  # it was said that it holds another text
        if path.exists():
            lm.load_prompt_cache(path)
            self._kept = lm.prompt_cache_tokens
        else:
            check_writable(path)
        self._is_used = not self._kept

    def note_use(self, response: GenerationResponse) -> None:
        """Say how much of the first prompt came from the file, by a response to it."""
        if not self._is_used:
            taken, total = response.cached_prompt_tokens, response.prompt_tokens
            note(f"{taken} of {total} prompt tokens come from {self._path}")
            self._is_used = True

    def keep(self, prompt_tokens: int) -> None:
        """Write the file, if the prompt just answered, of so many tokens, is worth it. Where that
        fails or Ctrl-C comes, stderr has a line, and a file that was there stays as it is."""
        tokens = self._lm.prompt_cache_tokens[:prompt_tokens]
        if _is_of_another_text(tokens, self._kept) and not self._is_left:
            note(f"{self._path} holds another text and stays as it is; give this one its own file")
            self._is_left = True
        if not is_worth_keeping(tokens, self._kept):
            return
        try:
            self._lm.save_prompt_cache(self._path, len(tokens))
        except PromptCacheError as error:
            note(str(error))
        except KeyboardInterrupt:
            note(f"interrupted; the prompt is not kept in {self._path}")
        else:
            self._kept = tokens
            size = format_bytes(self._path.stat().st_size)
            note(f"{len(tokens)} prompt tokens are kept in {self._path} ({size})")


def is_worth_keeping(prompt: Sequence[int], kept: Sequence[int]) -> bool:
    """Whether a prompt's tokens are to replace those that are kept: where they are of the same text
    and more by a sixteenth.

    So other questions about a document change nothing, a document that has grown does, and no text
    takes another one's place.
    """
    is_longer = len(prompt) - len(kept) > len(prompt) / 16
    return is_longer and not _is_of_another_text(prompt, kept)


def _is_of_another_text(prompt: Sequence[int], kept: Sequence[int]) -> bool:
    """Whether a prompt begins with less than half of what is kept."""
    from river_llm.generate.cached_text import common_prefix

    return 2 * common_prefix(prompt, kept) < len(kept)
