"""River-LLM as a model of lm-eval, EleutherAI's harness: `river-llm`.

Importing this module registers the name, as lm-eval's own models do. `river-llm eval` imports it;
versions of lm-eval that read the entry points `lm_eval.models` find it by themselves.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401  # lm-eval doesn't look for its own once it knows one
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from river_llm.config import DEFAULT_MODEL, SamplingConfig
from river_llm.engines.step import CacheAccess
from river_llm.errors import ConfigError, DataError
from river_llm.generate import GenerationResult
from river_llm.lm import RiverLM
from river_llm.measure.likelihood import Candidate, CandidateScore, score_candidates
from river_llm.measure.lm_eval_arguments import load_model
from river_llm.text.chat_template import render_messages
from river_llm.text.prompt import encode_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

# as of lm-eval's own models: new tokens of an answer, and the context of a model without a limit
_MAX_NEW_TOKENS, _MAX_LENGTH = 256, 2048
_AUTO_BATCH_SIZE = 8
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
_SEEDS = 2**62

_log = logging.getLogger("lm_eval.models.river_llm")  # lm-eval shows what is below its own name


@register_model("river-llm")
class RiverEvalLM(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """A `RiverLM` that answers lm-eval's requests.

    Likelihoods are those of text whose every token leaves as decoding would take it (see
    `likelihood`); generated answers run their prompt by the policy's prefill rule. In lossless mode
    all of them are the backbone's own.

    Attributes:
        tokenizer: of `transformers`.
        max_length: the most tokens that the model is given.
        batch_size: how many questions or prompts run together.
    """

    def __init__(
        self,
        pretrained: RiverLM | str = DEFAULT_MODEL,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **model_args: Any,
    ) -> None:
        """
        Args:
            pretrained: a model that is loaded, or the name of one.
            batch_size: ``auto`` is 8.
            max_batch_size: of lm-eval, for batch sizes that are searched for; not used.
            device: of a model to load; CUDA, which lm-eval names by default, only where it is.
            chat_template_kwargs: further variables that the chat template reads.
            **model_args: of a model to load, see `load_model`.

        Raises:
            ConfigError: the batch size is below 1, or `max_length` more than the model's context.
            RiverError: see `load_model`.
        """
        super().__init__()
        if isinstance(pretrained, RiverLM):
            lm = pretrained
        else:
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                device = None
            lm = load_model(pretrained, device=device, **model_args)
        context = lm.engine.context_length
        if max_length is not None and not 1 <= max_length <= (context or max_length):
            raise ConfigError(
                f"max_length is {max_length}, but the model's context holds 1 to {context}"
            )
        self.batch_size = _AUTO_BATCH_SIZE if batch_size == "auto" else int(batch_size)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; give 1 or more, or auto")
        self.tokenizer: PreTrainedTokenizerBase = lm.tokenizer
        self.max_length: int = max_length or context or _MAX_LENGTH
        self._device = lm.engine.device
        self._lm = lm
        self._name = str(lm.tokenizer.name_or_path if pretrained is lm else pretrained)
        self._chat_template_kwargs = chat_template_kwargs
        self._exits: Counter[int] = Counter()

    # ---- text and tokens ----

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token that begins texts, or ends them.

        Raises:
            ConfigError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ConfigError("the tokenizer has no token that begins or ends a text")

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps its encoded requests under."""
        return (str(self.tokenizer.name_or_path) or self._name).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The tokens of a text. None: with the special tokens that the tokenizer puts in front of
        one, unless the text begins with them, as what chat templates write does."""
        if add_special_tokens is None:
            return encode_text(self.tokenizer, string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text that the model knows.

        Raises:
            ConfigError: the model has no chat template, or it can't take these messages.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError("the model has no chat template; leave out --apply_chat_template")
        text, _ = render_messages(
            self.tokenizer,
            chat_history,
            self._chat_template_kwargs,
            allow_control_tokens=True,  # lm-eval passes the text on, which says no more of them
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval splits them; a continuation that joins the context's last token, so that it
        has none of its own, is encoded alone."""
        context_ids, own = super()._encode_pair(context, continuation)
        return context_ids, own or self.tok_encode(continuation, add_special_tokens=False)

    # ---- likelihoods ----

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the continuation's log-likelihood and whether it
        is what greedy decoding gives. Contexts that don't fit lose their beginning.

        Raises:
            DataError: a continuation has no tokens, or more than the model takes; before the first
                pass.
        """
        candidates = [self._candidate(*request) for request in requests]
        cut = sum(len(context) + len(own) > self.max_length + 1 for _, context, own in requests)
        self._warn_of_cuts("contexts", cut, len(requests))
        self._lm.forget_cache()
        scores: dict[int, CandidateScore] = {}
        found = score_candidates(self._lm.engine, self._lm.policy, candidates, self.batch_size)
        for place, score in tqdm(
            found, desc="likelihoods", total=len(requests), disable=disable_tqdm
        ):
            scores[place] = score
            texts = requests[place][0]
            if texts is not None:
                answer = score.log_likelihood, score.is_greedy
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        self._note("likelihoods", [n for score in scores.values() for n in score.exit_layers])
        ordered = (scores[place] for place in range(len(requests)))
        return [(score.log_likelihood, score.is_greedy) for score in ordered]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of every text, each token with as much text before it as lm-eval's
        windows of `max_length` tokens leave it."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in own]
            owners += [place] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for place, (log_likelihood, _) in zip(owners, scores, strict=True):
            totals[place] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _candidate(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> Candidate:
        if not 1 <= len(continuation) <= self.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, but max_length is "
                f"{self.max_length}: {'' if texts is None else texts[1][:40]!r}"
            )
        # the last token is only predicted, so one more than the model takes
        whole = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return Candidate(tuple(whole), len(whole) - len(continuation))

    # ---- generated answers ----

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every prompt, by the settings of its task (see `sampling_config`). Prompts
        lose their beginning where it leaves no room for the answer.

        Samples depend on PyTorch's seed, which lm-eval sets, unless the settings name a `seed`.

        Raises:
            ConfigError: a setting is unknown or out of its range, or the answer alone takes
                `max_length` tokens.
        """
        arguments = [request.args for request in requests]
        order = Collator(  # those of the same settings together, and those of a length
            arguments, lambda one: -len(one[0]), lambda one: one[1], group_by="gen_kwargs"
        )
        texts: list[str] = []
        exits: list[int] = []
        self._lm.forget_cache()
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for batch in order.get_batched(n=self.batch_size):
                sampling = sampling_config(batch[0][1])
                prompts = self._prompts([prompt for prompt, _ in batch], sampling)
                for one, result in zip(batch, self._generate(prompts, sampling), strict=True):
                    texts.append(result.text)
                    exits += result.exit_layers
                    self.cache_hook.add_partial("generate_until", one, result.text)
                bar.update(len(batch))
        self._note("answers", exits)
        answers: list[str] = order.get_original(texts)
        return answers

    def _prompts(self, texts: Sequence[str], sampling: SamplingConfig) -> list[list[int]]:
        """The tokens of the prompts, with room for the answers."""
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks is {sampling.max_new_tokens}, which leaves no room for a prompt: "
                f"max_length is {self.max_length}"
            )
        prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        self._warn_of_cuts("prompts", sum(len(one) > room for one in prompts), len(prompts))
        return [prompt[-room:] for prompt in prompts]

    def _generate(
        self, prompts: list[list[int]], sampling: SamplingConfig
    ) -> list[GenerationResult]:
        lm = self._lm
        if sampling.seed is None and sampling.temperature > 0:
            sampling = replace(sampling, seed=int(torch.randint(_SEEDS, ())))
        if len(prompts) > 1:
            return lm.generate_batch_tokens(prompts, sampling)
        (prompt,) = prompts
        # examples that prompts share run once, but what leaves as a whole has to run as a whole
        reuse = lm.policy is None or lm.policy.prefill != "sequence"
        stream = lm.stream_tokens(prompt, sampling, reuse_cache=reuse)
        return [GenerationResult.of(lm.engine, list(stream), len(prompt), lm.policy)]

    # ---- what is told ----

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results: model, river, policy, engine, and the exit depth
        of all tokens that counted so far."""
        lm, engine = self._lm, self._lm.engine
        return {
            "river_llm": {
                "model": self._name,
                "weights": engine.cache_identity([0]) if isinstance(engine, CacheAccess) else None,
                "river": lm.river_config.to_dict(),
                "policy": None if lm.policy is None else lm.policy.to_dict(),
                "engine": engine.name,
                "setting": engine.setting,
                "kv_bits": engine.kv_bits,
                "num_layers": engine.num_layers,
                "mean_exit_layer": _mean(self._exits),
                "exit_layers": {str(layer): n for layer, n in sorted(self._exits.items())},
            }
        }

    def _warn_of_cuts(self, what: str, cut: int, count: int) -> None:
        if cut:
            text = "%d of %d %s lose their beginning: max_length is %d"
            _log.warning(text, cut, count, what, self.max_length)

    def _note(self, what: str, exit_layers: Sequence[int]) -> None:
        exits = Counter(exit_layers)
        self._exits += exits
        if exits:
            text = "%s: mean exit depth %.1f of %d over %d tokens"
            _log.info(text, what, _mean(exits), self._lm.engine.num_layers, exits.total())


def sampling_config(settings: Mapping[str, Any]) -> SamplingConfig:
    """How an answer is generated, by a task's `generation_kwargs`.

    Without ``do_sample``, a ``temperature`` above 0 samples; ``do_sample: false`` is greedy
    whatever the temperature, and ``do_sample: true`` alone samples at temperature 1. What isn't
    given is off, top-k too.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """
    given = normalize_gen_kwargs(
        {name: value for name, value in settings.items() if value is not None}, _MAX_NEW_TOKENS
    )
    rest = {name: value for name, value in given.items() if _WITHOUT_EFFECT.get(name) != value}
    until, is_sampled = rest.pop("until"), rest.pop("do_sample")
    rest.setdefault("temperature", 1.0 if is_sampled else 0.0)
    rest["max_new_tokens"] = rest.pop("max_gen_toks")
    return SamplingConfig.of({**rest, "stop": tuple(str(one) for one in until if one)})


def _mean(exits: Counter[int]) -> float | None:
    count = exits.total()
    return sum(layer * n for layer, n in exits.items()) / count if count else None
