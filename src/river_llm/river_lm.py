"""RiverLM: a language model with its exit river, from a name to text in two calls."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from river_llm.cached_text import CachedText, prefill_thresholds, text_of_answer
from river_llm.config import DraftConfig, Mode, RiverConfig
from river_llm.engines import Engine, EngineChoice
from river_llm.errors import ConfigError, PromptCacheError, RiverError
from river_llm.exit_policy import ExitPolicy, check_is_policy
from river_llm.generation import GenerationResponse, GenerationResult, generate_rows
from river_llm.load.source import DEFAULT_MODEL
from river_llm.lossless import LosslessDecoder, check_drafts
from river_llm.lossless.learnt_drafts import read_learnt, write_learnt
from river_llm.ownership import ProcessLock
from river_llm.pretrained import load_pretrained
from river_llm.prompt_cache import read_prompt_cache, write_prompt_cache
from river_llm.residency import OffloadConfig, ResidencyPlan
from river_llm.river import Progress, River
from river_llm.sampling import SamplingConfig
from river_llm.text.prompt import Message, Prompt, encode_prompt, warn_of_unusable_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RiverLM:
    """A model, its tokeniser, its river and the engine that runs them.

    There is one KV cache, and threads take turns at it: a second one waits for an answer to end. A
    stream holds it only while it computes a token; where another answer is begun in between, its
    next token is an error.

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
        river_config: RiverConfig | None,
        stop_tokens: frozenset[int] = frozenset(),
        fallback_reason: str | None = None,
        river_directory: Path | None = None,
        residency: ResidencyPlan | None = None,
    ) -> None:
        """`river_directory` is where the river is saved and what is learnt about drafts is kept."""
        warn_of_unusable_tokens(tokenizer, engine.draft_vocabularies[-1])
        self.engine = engine
        self.tokenizer = tokenizer
        self.river_config = river_config
        self.stop_tokens = stop_tokens
        self.fallback_reason = fallback_reason
        self.residency = residency
        if residency is not None and residency.config.no_miss:
            engine.depth_limit = residency.resident
        self._river_directory = river_directory
        self._cached: CachedText | None = None  # what the engine's cache holds, if one sequence
        self._lossless: dict[DraftConfig, LosslessDecoder] = {}
        self._answers = 0  # begun so far
        self._turn = ProcessLock()  # of the thread that uses the KV cache

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        river: str | Path | River | RiverConfig | None = None,
        policy: ExitPolicy | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        device: torch.device | str | None = None,
        engine: EngineChoice = "auto",
        threads: int | None = None,
        backbone_bits: int = 16,
        lm_head_bits: int = 16,
        kv_bits: int = 16,
        offload: OffloadConfig | str | int | None = None,
        no_miss: bool = False,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
    ) -> RiverLM:
        """Load a model and load or build its river.

        Args:
            name_or_path: see `load_backbone`.
            river: the folder of a river that was saved, a `River`, or a `RiverConfig` to build one
                by; by default 4-bit HQQ in groups of 64 is built.
            policy: when tokens leave the backbone, see `ExitPolicy`.
            dtype: of the backbone's weights, the activations and the KV cache: bfloat16, which the
                native engine computes in, float16 or float32. Weights are loaded in it, whatever
                they are stored in.
            device: by default CUDA where there is one, else the CPU.
            engine: ``"cpu"``, the native one, ``"torch"`` or ``"auto"``, see `make_engine`.
            threads: that compute on a CPU, 1 to 1024; by default as many as the process may use.
            backbone_bits: 16, or 8 (native engine): the backbone's layers in 8-bit codes too.
            lm_head_bits: 16, or 8 (native engine): faster, and not exactly the model any more.
            kv_bits: 16, which stands for `dtype`, or 8: a KV cache of about half the bytes, and not
                exactly the model any more.
            offload: which backbone layers stay in memory: an `OffloadConfig`, or ``"auto"``, a
                number of layers or a size such as ``"2GiB"``, see there; by default all.
            no_miss: no token goes deeper than the layers that stay.
            progress: called while the river is built with (layers done, layers in all).

        What the native engine has packed is kept in the cache, as large as the model and its river,
        for a quick start the next time (`packed_copy`).

        Raises:
            ModelLoadError, UnsupportedModelError, RiverFileError, ConfigError: see `errors`.
        """
        loaded = load_pretrained(
            name_or_path,
            river,
            policy,
            dtype,
            device=device,
            engine=engine,
            threads=threads,
            backbone_bits=backbone_bits,
            lm_head_bits=lm_head_bits,
            kv_bits=kv_bits,
            offload=offload,
            no_miss=no_miss,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        return cls(
            loaded.engine,
            loaded.tokenizer,
            loaded.river_config,
            loaded.stop_tokens,
            loaded.fallback_reason,
            loaded.river_directory,
            loaded.residency,
        )

    @property
    def policy(self) -> ExitPolicy:
        """When tokens leave the backbone; may be set between answers.

        Raises:
            ConfigError: what it is set to is no policy, or not for the model.
        """
        return self.engine.policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        check_is_policy(policy)
        self.engine.policy = policy

    def generate(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
        mode: Mode = "river",
        drafts: DraftConfig | None = None,
        reuse_cache: bool = False,
        **sampling: Any,
    ) -> GenerationResult:
        """Answer a prompt.

        Args:
            prompt: a string, or messages `[{"role": "user", "content": ...}, ...]`.
            raw: give a string to the model as it is, without the chat template; what spells a
                control token in it is one.
            chat_template_kwargs: further variables that the chat template reads, such as
                ``{"enable_thinking": False}``.
            allow_control_tokens: what spells a control token in a message is one; by default it is
                text.
            mode: ``"river"``: tokens leave the backbone by the policy. ``"lossless"``: the river
                drafts and the backbone verifies; every token is the backbone's, and the policy
                doesn't count.
            drafts: how lossless mode drafts.
            reuse_cache: run only what isn't in the KV cache yet, see `stream_tokens`.
            **sampling: fields of `SamplingConfig`.

        Raises:
            ConfigError: the prompt is empty or no prompt, the chat template can't take it, or a
                setting is unknown or out of its range.
            ContextFullError: the prompt doesn't fit the model's context.
        """
        with self._turn:
            responses = list(
                self.stream(
                    prompt,
                    raw=raw,
                    chat_template_kwargs=chat_template_kwargs,
                    allow_control_tokens=allow_control_tokens,
                    mode=mode,
                    drafts=drafts,
                    reuse_cache=reuse_cache,
                    **sampling,
                )
            )
            prompt_tokens = responses[-1].prompt_tokens
            return GenerationResult.of(self.engine, responses, prompt_tokens, mode)

    def stream(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
        mode: Mode = "river",
        drafts: DraftConfig | None = None,
        reuse_cache: bool = False,
        **sampling: Any,
    ) -> Iterator[GenerationResponse]:
        """Answer a prompt token by token; arguments and errors as of `generate`. In lossless mode
        a token appears once it is verified."""
        settings = SamplingConfig.of(sampling)
        token_ids = encode_prompt(
            self.tokenizer,
            prompt,
            raw,
            chat_template_kwargs=chat_template_kwargs,
            allow_control_tokens=allow_control_tokens,
        )
        return self.stream_tokens(token_ids, settings, reuse_cache, mode=mode, drafts=drafts)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        raw: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_control_tokens: bool = False,
        mode: Mode = "river",
        drafts: DraftConfig | None = None,
        **sampling: Any,
    ) -> list[GenerationResult]:
        """Answer several prompts at once, none if there are none; arguments and errors as of
        `generate`.

        Every answer is what the prompt alone would give, up to the rounding of larger matrix
        products. All of them end where the longest one fills the model's context.
        """
        if isinstance(prompts, str):
            raise ConfigError(
                "generate_batch takes a list of prompts, not one string; put it in []"
            )
        settings = SamplingConfig.of(sampling)
        encoded = [
            encode_prompt(
                self.tokenizer,
                prompt,
                raw,
                chat_template_kwargs=chat_template_kwargs,
                allow_control_tokens=allow_control_tokens,
            )
            for prompt in prompts
        ]
        return self.generate_batch_tokens(encoded, settings, mode=mode, drafts=drafts)

    def generate_batch_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        mode: Mode = "river",
        drafts: DraftConfig | None = None,
    ) -> list[GenerationResult]:
        """Continue several prompts given in tokens; else as `generate_batch`."""
        with self._turn:
            lossless = self._decoder(mode, drafts)
            if not prompts:
                return []
            self._cached = None
            self._answers += 1
            steps = list(
                generate_rows(
                    self.engine,
                    self.tokenizer,
                    prompts,
                    sampling,
                    self.stop_tokens,
                    lossless=lossless,
                    residency=self.residency,
                )
            )
            self._keep_learnt(lossless)
            rows = [[one for one in row if one is not None] for row in zip(*steps, strict=True)]
            return [
                GenerationResult.of(self.engine, row, len(prompt), mode)
                for row, prompt in zip(rows, prompts, strict=True)
            ]

    def chat(self, messages: str | Sequence[Message], **settings: Any) -> GenerationResult:
        """Answer the last of `messages` (or a single user message) through the chat template.

        Every call starts anew; `Conversation` keeps the cache from turn to turn. Further arguments
        are those of `generate`.

        Raises:
            ConfigError: the model has no chat template, and what `generate` raises.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.generate(messages, **settings)

    def stream_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        reuse_cache: bool = False,
        *,
        mode: Mode = "river",
        drafts: DraftConfig | None = None,
    ) -> Iterator[GenerationResponse]:
        """Continue a prompt given in tokens.

        Args:
            reuse_cache: keep what the KV cache holds of this prompt's beginning, as the exits of
                the answers before left it, and run only the rest. Lossless mode keeps nothing that
                exits have written, and of a loaded prompt cache nothing is kept that this prompt
                would read otherwise.
            mode, drafts: see `generate`.
        """
        with self._turn:
            lossless = self._decoder(mode, drafts)
        return self._in_turn(self._stream(token_ids, sampling, reuse_cache, mode, lossless))

    def _in_turn(
        self, steps: Generator[GenerationResponse, None, None]
    ) -> Iterator[GenerationResponse]:
        """An answer, each of whose steps has the KV cache to itself."""
        try:
            while True:
                with self._turn:
                    response = next(steps, None)
                if response is None:
                    return
                yield response
        finally:
            # where another thread has its turn, it has begun an answer, and closing does nothing
            has_turn = self._turn.acquire_at_once()
            try:
                steps.close()
            finally:
                if has_turn:
                    self._turn.release()

    def _stream(
        self,
        token_ids: Sequence[int],
        sampling: SamplingConfig,
        reuse_cache: bool,
        mode: Mode,
        lossless: LosslessDecoder | None,
    ) -> Generator[GenerationResponse, None, None]:
        before = self._text_in_cache()
        kept = 0
        policy = self._policy_in(mode)
        if reuse_cache and before is not None:
            if mode == "river" and not before.is_loaded:
                kept = before.beginning(token_ids)
            else:
                thresholds = prefill_thresholds(policy, self.engine.num_layers)
                limit = self.engine.angle_limit
                kept = before.exact_beginning(token_ids, thresholds, limit)
        self._cached = None
        self._answers += 1
        answer = self._answers
        steps = generate_rows(
            self.engine,
            self.tokenizer,
            [token_ids],
            sampling,
            self.stop_tokens,
            kept,
            lossless,
            self.residency,
        )
        text = list(token_ids)
        try:
            for (response,) in steps:
                assert response is not None
                text.append(response.token)
                yield response
                if answer != self._answers:
                    raise RiverError(
                        "another answer was begun, and there is one KV cache; "
                        "finish a stream before the next call, or load a second RiverLM"
                    )
        finally:
            # a stream that is closed late may find another answer in the cache, and without a first
            # token the prompt may not have come into it
            if answer == self._answers and len(text) == len(token_ids):
                self._cached = before.first(kept) if before is not None and kept else None
            elif answer == self._answers:
                cached = text_of_answer(
                    text[: self.engine.length],
                    len(token_ids),
                    policy,
                    self.engine.num_layers,
                    self.engine.angle_limit,
                    before,
                    kept,
                )
                if policy != self._policy_in(mode):  # changed in between: who knows where
                    cached = replace(cached, exact=min(cached.exact, len(token_ids)))
                self._cached = cached
                self._keep_learnt(lossless)

    def forget_cache(self) -> None:
        """Trust the engine's cache no longer: someone else has run the engine."""
        self._cached = None

    # ---- prompt caches ----

    @property
    def prompt_cache_tokens(self) -> list[int]:
        """The tokens that `save_prompt_cache` would write."""
        cached = self._text_in_cache()
        return [] if cached is None else cached.tokens[: cached.exact]

    def save_prompt_cache(self, path: str | Path, length: int | None = None) -> int:
        """Write the keys and values of the last prompt to a file, so that it needn't be read again
        (`prompt_cache`); what is written in its place is whole or not at all.

        Of the answer only what a prompt would read likewise is written: in lossless mode and with a
        policy that treats prompt and answer alike all of it, else nothing.

        Args:
            length: at most so many tokens.

        Returns:
            How many tokens were written.

        Raises:
            PromptCacheError: there is nothing to write, or it can't be written.
            ConfigError: the length is no positive number.
        """
        if length is not None and length < 1:
            raise ConfigError(f"the length of the prompt cache is {length}; it must be 1 or more")
        with self._turn:
            cached = self._text_in_cache()
            if cached is None:
                raise PromptCacheError(
                    "the KV cache holds no single text to write to a file; answer one prompt first"
                )
            text = cached.first(min(cached.exact, length or cached.exact))
            if not text.tokens:
                raise PromptCacheError(
                    "the prompt in the KV cache left the backbone as a whole, so its tokens would "
                    'be others in another prompt; take another prefill rule than "sequence"'
                )
            write_prompt_cache(Path(path), self.engine, text)
        return len(text.tokens)

    def load_prompt_cache(self, path: str | Path, mode: Mode = "river") -> int:
        """Read what `save_prompt_cache` has written.

        Answers with ``reuse_cache=True`` then run only what comes after the common beginning of its
        tokens and their prompt's. They are what they are when the whole prompt is read: on the
        native engine bit for bit, on PyTorch up to the rounding of larger matrix products.

        Args:
            mode: of the answers to come. Those for which the file's tokens would be others (after a
                change of mode or policy, or where the text's length changes the model's rotary
                angles) read their whole prompt.

        Returns:
            How many tokens the file holds.

        Raises:
            PromptCacheError: there is no such file, it is damaged, or it belongs to another model,
                river, engine or prefill rule. The KV cache stays as it was.
        """
        with self._turn:
            text, tensors = read_prompt_cache(Path(path), self.engine)
            if prefill_thresholds(self._policy_in(mode), self.engine.num_layers) != text.thresholds:
                raise PromptCacheError(
                    f"the tokens in {path} left the backbone otherwise than prompts of this run "
                    "do; take the prefill rule with which it was written, or give another file"
                )
            self._cached = None
            self._answers += 1
            self.engine.write_cache(tensors, len(text.tokens))
            self._cached = text
        return len(text.tokens)

    def _text_in_cache(self) -> CachedText | None:
        """None where the engine's cache was used for something else since, or is empty."""
        cached = self._cached
        return cached if cached and self.engine.length >= max(1, len(cached.tokens)) else None

    def _policy_in(self, mode: Mode) -> ExitPolicy:
        """By which tokens leave; in lossless mode they never do."""
        return ExitPolicy.never() if self._check_mode(mode) == "lossless" else self.policy

    @staticmethod
    def _check_mode(mode: Mode) -> Mode:
        if mode not in get_args(Mode):
            raise ConfigError(f"mode is {mode!r}; choose one of {', '.join(get_args(Mode))}")
        return mode

    # ---- lossless mode ----

    def check_drafts(self, drafts: DraftConfig) -> None:
        """See that the engine can draft so, without making what drafts need.

        Raises:
            ConfigError: it can't.
        """
        check_drafts(self.engine, drafts)

    def _decoder(self, mode: Mode, drafts: DraftConfig | None) -> LosslessDecoder | None:
        """What runs lossless mode, with all that it has learnt so far.

        Raises:
            ConfigError: there is no such mode, drafts are for the other one, or the engine can't
                draft so.
        """
        if self._check_mode(mode) == "river":
            if drafts is not None:
                raise ConfigError('drafts are for mode="lossless"')
            return None
        if self.engine.depth_limit is not None:
            raise ConfigError(
                "lossless mode verifies with the whole backbone; it can't go with no_miss"
            )
        config = drafts or DraftConfig()
        if config not in self._lossless:
            decoder = LosslessDecoder(self.engine, config)
            if self._river_directory is not None:
                learnt = read_learnt(self._river_directory, decoder.key)
                if learnt is not None:
                    decoder.restore(learnt)
            self._lossless[config] = decoder
        return self._lossless[config]

    def _keep_learnt(self, lossless: LosslessDecoder | None) -> None:
        if lossless is not None and self._river_directory is not None:
            write_learnt(self._river_directory, lossless.key, lossless.learnt())
