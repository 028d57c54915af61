"""River-LLM as a model of lm-eval (EleutherAI's harness), known to it as `river-llm`.

Importing this module makes the name known. Versions of lm-eval that look for the entry points
`lm_eval.models` find it by themselves; `river-llm lm-eval` serves the others.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401  # its own, which it doesn't look for once it knows one
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from river_llm.config import Mode, SamplingConfig
from river_llm.errors import ConfigError, DataError
from river_llm.evaluation.likelihood import Candidate, CandidateScore, LikelihoodScorer
from river_llm.evaluation.lm_eval_arguments import ModelArguments, sampling_config
from river_llm.evaluation.run import describe_model
from river_llm.exit_policy import ExitPolicy
from river_llm.generation import GenerationResult
from river_llm.river_lm import RiverLM
from river_llm.text.chat_template import render_messages
from river_llm.text.control_tokens import ControlTokens, without_mark
from river_llm.text.prompt import behind_front, encode_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_DEFAULT_LENGTH = 2048  # where the model has no limit; as of lm-eval's own models
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
        lm: RiverLM,
        *,
        mode: Mode = "river",
        batch_size: int = 1,
        max_length: int | None = None,
        name: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            lm: its policy is set to never leaving in lossless mode.
            name: what the results call the model.
            chat_template_kwargs: further variables that the chat template reads.

        Raises:
            ConfigError: `max_length` is more than the model's context.
        """
        super().__init__()
        context = lm.engine.context_length
        if max_length is not None and context is not None and max_length > context:
            raise ConfigError(
                f"max_length is {max_length}, but the model's context holds {context}"
            )
        if mode == "lossless":
            lm.policy = ExitPolicy.never()
        self.tokenizer: PreTrainedTokenizerBase = lm.tokenizer
        self.max_length: int = max_length or context or _DEFAULT_LENGTH
        self.batch_size = batch_size
        self._device = lm.engine.device
        self._lm = lm
        self._mode: Mode = mode
        self._name = name or str(lm.tokenizer.name_or_path)
        self._chat_template_kwargs = chat_template_kwargs
        self._marks: set[str] = set()  # in texts of `apply_chat_template`
        self._exits: Counter[int] = Counter()

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> RiverEvalLM:
        """See `create_from_arg_obj`; the arguments as `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> RiverEvalLM:
        """Load a model.

        Args:
            arg_dict: see `ModelArguments`.
            additional_config: options of lm-eval itself, `batch_size` and `device`, which count
                where the arguments don't name them.

        Raises:
            RiverError: an argument is unknown or contradicts another, or the model can't be loaded.
        """
        options = dict(additional_config or {})
        options.pop("max_batch_size", None)  # of batch sizes that are searched for
        if str(options.get("device")).startswith("cuda") and not torch.cuda.is_available():
            del options["device"]  # lm-eval names it whether there is one or not
        arguments = ModelArguments.parse({**options, **arg_dict})
        return cls(
            arguments.load(),
            mode=arguments.mode,
            batch_size=arguments.rows,
            max_length=arguments.max_length,
            name=arguments.pretrained,
            chat_template_kwargs=arguments.chat_template_kwargs,
        )

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
        tokenizer = self.tokenizer
        for mark in self._marks:
            if mark in string:
                own = ControlTokens.of(tokenizer).encode(tokenizer, string, mark)
                string = without_mark(string, mark)
                return own if add_special_tokens is False else behind_front(tokenizer, string, own)
        if add_special_tokens is None:
            return encode_text(tokenizer, string)
        return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text that the model knows. What spells a control token in a message has
        a character in it by which `tok_encode` knows that it is text.

        Raises:
            ConfigError: the model has no chat template, or it can't take these messages.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError("the model has no chat template; leave out --apply_chat_template")
        text, mark = render_messages(
            self.tokenizer,
            chat_history,
            self._chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        if mark is not None:
            self._marks.add(mark)
        return text

    # ---- requests ----

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of every continuation of a context, and whether it is what greedy
        decoding gives.

        Raises:
            DataError: a continuation has no tokens, or more than the model takes; the message names
                the task's item, before anything is computed.
        """
        pairs = []
        for request in tqdm(requests, desc="tokens", disable=disable_tqdm):
            pair = self._encode_pair(*request.args)
            try:
                self._candidate(*pair)
            except DataError as error:
                item = f"task {request.task_name}, item {request.doc_id}"
                raise DataError(f"{item}: {error} ({request.args[1][:40]!r})") from error
            pairs.append((request.args, *pair))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of context and continuation, split as lm-eval does it. A continuation whose
        letters join the context's last token, so that it has none of its own, is encoded alone."""
        stripped = context.rstrip()
        context_ids, continuation_ids = [], []
        if stripped:
            context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            rest = context[len(stripped) :] + continuation
            continuation_ids = self.tok_encode(rest, add_special_tokens=False)
        if context_ids:
            return context_ids, continuation_ids
        begin = self.prefix_token_id
        return [begin], continuation_ids[continuation_ids[:1] == [begin] :]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the continuation's log-likelihood and whether it
        is what greedy decoding gives. Contexts that don't fit lose their beginning."""
        questions: dict[object, list[int]] = {}  # a question's choices share its pass
        for place, (_texts, context, _continuation) in enumerate(requests):
            # one token, as before windows of a text, is nothing to share
            key = tuple(context) if len(context) > 1 else place
            questions.setdefault(key, []).append(place)
        groups = list(questions.values())
        lengths = [len(context) + len(answer) for _texts, context, answer in requests]
        self._warn_of_cuts("contexts", sum(n > self.max_length + 1 for n in lengths), len(requests))
        found: list[CandidateScore | None] = [None] * len(requests)
        self._lm.forget_cache()
        scorer = LikelihoodScorer(self._lm.engine)
        exits: Counter[int] = Counter()
        with tqdm(total=len(requests), desc="likelihoods", disable=disable_tqdm) as bar:
            for first in range(0, len(groups), self.batch_size):
                batch = groups[first : first + self.batch_size]
                items = [[self._candidate(*requests[place][1:]) for place in one] for one in batch]
                for places, scores in zip(batch, scorer.score(items), strict=True):
                    for place, score in zip(places, scores, strict=True):
                        found[place] = score
                        exits.update(score.exit_layers)
                        texts = requests[place][0]
                        if texts is not None:
                            answer = score.log_likelihood, score.is_greedy
                            self.cache_hook.add_partial("loglikelihood", texts, answer)
                    bar.update(len(places))
        self._note("likelihoods", exits)
        return [(s.log_likelihood, s.is_greedy) for s in found if s is not None]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of every text, each token with as much text before it as lm-eval's
        windows of `max_length` tokens leave it."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            own = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in own]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every prompt, by the settings of its task (see `sampling_config`). Prompts
        lose their beginning where it leaves no room for the answer.

        Samples depend on PyTorch's seed, which lm-eval sets, unless the settings name a `seed`.

        Raises:
            ConfigError: a setting is unknown or out of its range, or the answer alone takes
                `max_length` tokens.
        """
        alike: dict[str, list[int]] = {}  # requests of the same settings run together
        for place, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            alike.setdefault(key, []).append(place)
        texts = [""] * len(requests)
        exits: Counter[int] = Counter()
        self._lm.forget_cache()
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for places in alike.values():
                sampling = sampling_config(requests[places[0]].args[1])
                prompts = self._prompts({p: requests[p].args[0] for p in places}, sampling)
                if self.batch_size > 1:  # those of a length together, for less padding
                    places.sort(key=lambda place: -len(prompts[place]))
                for first in range(0, len(places), self.batch_size):
                    batch = places[first : first + self.batch_size]
                    results = self._generate([prompts[place] for place in batch], sampling)
                    for place, result in zip(batch, results, strict=True):
                        texts[place] = result.text
                        exits.update(result.exit_layers)
                        self.cache_hook.add_partial(
                            "generate_until", requests[place].args, result.text
                        )
                    bar.update(len(batch))
        self._note("answers", exits)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results: model, river, policy, engine, and the exit depth
        of all tokens that counted so far."""
        info = describe_model(self._lm, self._name)
        info["mode"] = self._mode
        info["batch_size"] = self.batch_size  # lm-eval's own figure is that of its option
        info["mean_exit_layer"] = _mean(self._exits)
        info["exit_layers"] = {str(layer): n for layer, n in sorted(self._exits.items())}
        return {"river_llm": info}

    def _candidate(self, context: list[int], continuation: list[int]) -> Candidate:
        if not continuation:
            raise DataError("a continuation has no token, and so no likelihood")
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, but max_length is "
                f"{self.max_length}"
            )
        # the last token is only predicted, so one more than the model takes
        whole = (context + continuation)[-(self.max_length + 1) :]
        return Candidate(tuple(whole), len(whole) - len(continuation))

    def _prompts(self, texts: Mapping[int, str], sampling: SamplingConfig) -> dict[int, list[int]]:
        """The tokens of the prompts, with room for the answers."""
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks is {sampling.max_new_tokens}, which leaves no room for a prompt: "
                f"max_length is {self.max_length}"
            )
        encoded = {
            place: self.tok_encode(text) or [self.prefix_token_id] for place, text in texts.items()
        }
        cut = sum(len(prompt) > room for prompt in encoded.values())
        self._warn_of_cuts("prompts", cut, len(encoded))
        return {place: prompt[-room:] for place, prompt in encoded.items()}

    def _generate(
        self, prompts: list[list[int]], sampling: SamplingConfig
    ) -> list[GenerationResult]:
        lm = self._lm
        if sampling.seed is None and sampling.temperature > 0:
            sampling = replace(sampling, seed=int(torch.randint(_SEEDS, ())))
        if len(prompts) > 1:
            return lm.generate_batch_tokens(prompts, sampling, mode=self._mode)
        (prompt,) = prompts
        # examples that prompts share run once, but what leaves as a whole has to run as a whole
        reuse = lm.policy.prefill != "sequence"
        stream = lm.stream_tokens(prompt, sampling, reuse_cache=reuse, mode=self._mode)
        return [GenerationResult.of(lm.engine, list(stream), len(prompt), self._mode)]

    def _warn_of_cuts(self, what: str, cut: int, count: int) -> None:
        if cut:
            _log.warning(
                "%d of %d %s lose their beginning: max_length is %d",
                cut,
                count,
                what,
                self.max_length,
            )

    def _note(self, what: str, exits: Counter[int]) -> None:
        self._exits.update(exits)
        mean = _mean(exits)
        if mean is not None:
            _log.info(
                "%s: mean exit depth %.1f of %d over %d tokens",
                what,
                mean,
                self._lm.engine.num_layers,
                exits.total(),
            )


def _mean(exits: Counter[int]) -> float | None:
    count = exits.total()
    return sum(layer * n for layer, n in exits.items()) / count if count else None
