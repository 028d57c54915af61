"""RiverLM: a language model with its exit river, from a name to text in two calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from river_llm.config import (
    DEFAULT_MODEL,
    DraftConfig,
    EngineConfig,
    PromptConfig,
    RiverConfig,
    SamplingConfig,
)
from river_llm.engines import Engine
from river_llm.engines.step import Offloading
from river_llm.errors import ConfigError
from river_llm.generate import (
    GenerationResponse,
    GenerationResult,
    Request,
    check_request,
)
from river_llm.generate.runner import Runner
from river_llm.generate.second_look import check_second_look
from river_llm.load.pretrained import RiverChoice, load_pretrained
from river_llm.river.policy import ExitPolicy, check_is_policy
from river_llm.river.residency import ResidencyPlan
from river_llm.river.river import Progress
from river_llm.river.tuned import NamedPolicy, chosen_policy
from river_llm.settings import split_settings
from river_llm.text.prompt import Message, Prompt, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PolicyChoice = ExitPolicy | None | EllipsisType  # `...` is the model's own


class RiverLM:
    """A model, its tokenizer, its river and the engine that runs them.

    Answers may be streamed side by side, by one thread or by several: each step of the engine is
    for all of them.

    Attributes:
        engine: computes the steps and holds the KV cache.
        tokenizer: of `transformers`.
        river_config: how the river is quantised.
        stop_tokens: ids that end an answer.
        fallback_reason: why the torch engine serves where ``engine="auto"`` could have taken the
            native one; None if that is not so.
        residency: which backbone layers stay in memory; None: all of them.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        river_config: RiverConfig,
        stop_tokens: frozenset[int] = frozenset(),
        policy: ExitPolicy | None = None,
        *,
        fallback_reason: str | None = None,
        residency: ResidencyPlan | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.river_config = river_config
        self.stop_tokens = stop_tokens
        self.fallback_reason = fallback_reason
        self.residency = residency
        self._runner = Runner(engine, residency)
        if residency is not None and residency.config.no_miss and isinstance(engine, Offloading):
            engine.depth_limit = residency.resident
        self.policy = policy

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        river: RiverChoice = None,
        policy: NamedPolicy = None,
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> RiverLM:
        """Load a model and load or build its river. What the native engine has repacked is kept,
        as large as model and river, for a quick start the next time.

        Args:
            name_or_path: see `load_backbone`.
            river: the folder of a river that was saved, a `River`, or a `RiverConfig` to build one
                by; by default 4-bit HQQ in groups of 64 is built.
            policy: when tokens leave the backbone. None: never; the river drafts and the backbone
                verifies, so that every token is the backbone's (lossless mode). ``"tuned"``: what
                `river-llm tune` has saved with the river, with the widths of its measurement.
            progress: called while the river is built with (layers done, layers in all).
            **settings: fields of `EngineConfig`: engine, threads, device, dtype, kv_bits, offload
                and others.

        Raises:
            ModelLoadError, UnsupportedModelError, RiverFileError, ConfigError: see `errors`.
        """
        config = EngineConfig.of(settings)
        chosen, config = chosen_policy(policy, river, config)
        loaded = load_pretrained(name_or_path, river, chosen, config, progress)
        return cls(
            loaded.engine,
            loaded.tokenizer,
            loaded.river_config,
            loaded.stop_tokens,
            chosen,
            fallback_reason=loaded.fallback_reason,
            residency=loaded.residency,
        )

    @property
    def policy(self) -> ExitPolicy | None:
        """When tokens leave the backbone; None: lossless mode. May be set for the answers to come.

        Raises:
            ConfigError: what it is set to is no policy, names layers that the model hasn't, or has
                a second look while `no_miss` limits the depth.
        """
        return self._policy

    @policy.setter
    def policy(self, policy: ExitPolicy | None) -> None:
        self._policy = self._chosen_policy(policy)

    # ---- answers ----

    def generate(
        self,
        prompt: Prompt,
        *,
        policy: PolicyChoice = ...,
        drafts: DraftConfig | None = None,
        reuse_cache: bool = False,
        **settings: Any,
    ) -> GenerationResult:
        """Answer a prompt.

        Args:
            prompt: a string, or messages `[{"role": "user", "content": ...}, ...]`.
            policy: when tokens leave the backbone; None: lossless mode. By default `self.policy`.
            drafts: how lossless mode drafts.
            reuse_cache: run only what isn't in the KV cache yet, see `stream_tokens`.
            **settings: fields of `SamplingConfig` (max_new_tokens, temperature, seed, stop...) and
                of `PromptConfig` (raw, chat_template_kwargs, allow_control_tokens).

        Raises:
            ConfigError: the prompt is empty or no prompt, the chat template can't take it, or a
                setting is unknown or out of its range.
            ContextFullError: the prompt doesn't fit the model's context.
            LogitsError: the next token can't be chosen.
        """
        chosen = self._chosen_policy(policy)
        responses = list(
            self.stream(prompt, policy=chosen, drafts=drafts, reuse_cache=reuse_cache, **settings)
        )
        return GenerationResult.of(self.engine, responses, responses[-1].prompt_tokens, chosen)

    def chat(self, messages: str | Sequence[Message], **settings: Any) -> GenerationResult:
        """Answer the last of `messages` (or a single user message) through the chat template, as
        `generate` does; `Conversation` keeps the cache from turn to turn.

        Raises:
            ConfigError: the model has no chat template, and what `generate` raises.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(messages, **settings)

    def stream(
        self,
        prompt: Prompt,
        *,
        policy: PolicyChoice = ...,
        drafts: DraftConfig | None = None,
        reuse_cache: bool = False,
        **settings: Any,
    ) -> Iterator[GenerationResponse]:
        """Answer a prompt token by token; arguments and errors as of `generate`. In lossless mode a
        token appears once it is verified."""
        form, sampling = split_settings(settings, PromptConfig, SamplingConfig)
        token_ids = self.encode(prompt, form)
        return self.stream_tokens(token_ids, sampling, reuse_cache, policy=policy, drafts=drafts)

    def stream_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        reuse_cache: bool = False,
        *,
        policy: PolicyChoice = ...,
        drafts: DraftConfig | None = None,
    ) -> Iterator[GenerationResponse]:
        """Continue a prompt given in tokens.

        Args:
            reuse_cache: keep what the KV cache holds of this prompt's beginning, as far as reading
                it would give the same keys and values, and run only the rest.
        """
        (request,) = self._requests([token_ids], sampling, policy, drafts)
        return self._runner.stream(request, reuse_cache)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        policy: PolicyChoice = ...,
        drafts: DraftConfig | None = None,
        **settings: Any,
    ) -> list[GenerationResult]:
        """Answer several prompts at once; arguments and errors as of `generate`.

        Every answer is what the prompt alone would give, up to the rounding of larger matrix
        products; sampled ones have random numbers of their own.
        """
        if isinstance(prompts, str):
            raise ConfigError("generate_batch takes a list of prompts, not one string")
        form, sampling = split_settings(settings, PromptConfig, SamplingConfig)
        encoded = [self.encode(prompt, form) for prompt in prompts]
        return self.generate_batch_tokens(encoded, sampling, policy=policy, drafts=drafts)

    def generate_batch_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        policy: PolicyChoice = ...,
        drafts: DraftConfig | None = None,
    ) -> list[GenerationResult]:
        """Continue several prompts given in tokens; else as `generate_batch`."""
        requests = self._requests(prompts, sampling, policy, drafts)
        return [
            GenerationResult.of(self.engine, responses, request.prompt_length, request.policy)
            for request, responses in zip(requests, self._runner.run(requests), strict=True)
        ]

    def encode(self, prompt: Prompt, form: PromptConfig | None = None) -> list[int]:
        """The tokens of a prompt; errors as of `generate`."""
        form = form or PromptConfig()
        return encode_prompt(
            self.tokenizer,
            prompt,
            form.raw,
            chat_template_kwargs=form.chat_template_kwargs,
            allow_control_tokens=form.allow_control_tokens,
        )

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        policy: PolicyChoice,
        drafts: DraftConfig | None,
    ) -> list[Request]:
        chosen = self._chosen_policy(policy)
        if drafts is not None and chosen is not None:
            raise ConfigError("drafts are for lossless mode; it goes with policy=None")
        requests = [
            Request(
                prompt,
                self.tokenizer,
                sampling,
                chosen,
                drafts=drafts,
                stop_tokens=self.stop_tokens,
                index=index,
                name=f"prompt {index + 1} of {len(prompts)}: " if len(prompts) > 1 else "",
            )
            for index, prompt in enumerate(prompts)
        ]
        for request in requests:
            check_request(self.engine, request)
        return requests

    def _chosen_policy(self, policy: PolicyChoice) -> ExitPolicy | None:
        if isinstance(policy, EllipsisType):
            return self._policy
        if policy is not None:
            check_is_policy(policy)
            policy.thresholds(self.engine.num_layers)
            check_second_look(self.engine, policy)
        return policy

    # ---- the KV cache between answers ----

    def forget_cache(self) -> None:
        """Let go of the keys and values that are kept of the last answer."""
        self._runner.forget()

    @property
    def prompt_cache_tokens(self) -> list[int]:
        """The tokens that `save_prompt_cache` would write."""
        kept = self._runner.kept
        return [] if kept is None else kept.tokens

    def save_prompt_cache(self, path: str | Path, length: int | None = None) -> int:
        """Write the keys and values of the last prompt to a file, at most of `length` tokens; of
        the answer as well where a prompt would read it likewise: in lossless mode, and with a
        policy that treats prompt and answer alike. How many tokens that were.

        Raises:
            PromptCacheError: there is nothing to write, or it can't be written.
            ConfigError: the length is no positive number.
        """
        if length is not None and length < 1:
            raise ConfigError(f"the length of the prompt cache is {length}; it must be 1 or more")
        return self._runner.save(Path(path), length)

    def load_prompt_cache(self, path: str | Path, policy: PolicyChoice = ...) -> int:
        """Read what `save_prompt_cache` has written; how many tokens it has.

        Answers with ``reuse_cache=True`` then run only what comes after the common prefix of its
        tokens and their prompt's: on the native engine bit for bit what reading the whole prompt
        gives, on PyTorch up to the rounding of larger matrix products.

        Raises:
            PromptCacheError: there is no such file, it is damaged, or it belongs to another model,
                river, engine or prefill rule. The KV cache stays as it was.
        """
        return self._runner.load(Path(path), self._chosen_policy(policy))
