"""The torch engine of the strategies without a river."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from river_llm.engines.engine import (
    StepResult,
    check_batch,
    check_room,
    check_sequences,
    check_token_ids,
    first_tokens,
)
from river_llm.engines.llama_family import angle_limit
from river_llm.engines.torch_engine import embedding_rows, padded_inputs
from river_llm.exit_policy import ExitPolicy
from river_llm.exit_router import ExitRouter, Phase
from river_llm.ownership import NotCopiedEngine, OwnProcess
from river_llm.strategies.hooked_decoder import HookedDecoder, LayerCall
from river_llm.strategies.kv_strategy import CacheState, KVStrategy, kept_where
from river_llm.strategies.running_pass import RunningPass
from river_llm.strategies.slot_cache import Place, SlotCache
from river_llm.strategies.without_river import WithoutRiver

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StrategyEngine(WithoutRiver, NotCopiedEngine):
    """Decoding with early exits by which the rest of the backbone is not run; see `Engine`.

    A token that leaves goes from where it is to the final norm and the LM head; the strategy says
    what becomes of the keys and values that it leaves out. Prompts run through the whole backbone,
    and each token after them leaves by the exit policy, as it would into a river. So do a prompt's
    tokens by the prefill rule ``"token"``, and those of a given text (`score`), in one pass: its
    layers run for all of its tokens as long as one hasn't left.

    Attributes:
        strategy: its name.
        model: of `transformers`; its layers are the engine's until `detach_river(model)`.
    """

    name = "torch"

    def __init__(
        self, model: PreTrainedModel, strategy: type[KVStrategy], policy: ExitPolicy
    ) -> None:
        """
        Raises:
            ConfigError: the policy is not for the strategy, or not for the model.
            UnsupportedModelError: the strategy can't work on the model.
            RiverError: there is a river or another strategy on the model.
        """
        strategy.check_policy(policy)
        self.model = model
        self.strategy = strategy.name
        config = model.config.get_text_config(decoder=True)
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        parameters = inspect.signature(model.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._embedding_rows = embedding_rows(model)
        self.device = model.device
        self.draft_vocabularies: tuple[int, ...] = (config.vocab_size,)
        self.angle_limit = angle_limit(model)
        self._decoder = HookedDecoder(model)
        try:
            self.num_layers = len(self._decoder.layers)
            self.layer_bytes, self.rest_bytes = weight_bytes(self._decoder)
            self._router = ExitRouter(policy, self.num_layers)
            self._strategy = strategy(self._decoder, self.angle_limit)
        except BaseException:
            self._decoder.detach()
            raise
        self._decoder.on_layer = self._on_layer
        self._process = OwnProcess()
        self._running: RunningPass | None = None
        self._hidden_states = torch.empty(0)  # [B, T, C] after the last layer that ran
        self._cache = SlotCache(self.num_layers, 0)
        self._state = CacheState.empty(0)

    @property
    def setting(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"torch {self.device} {dtype}{threads}"

    @property
    def policy(self) -> ExitPolicy:
        return self._router.policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        self._strategy.check_policy(policy)
        self._router.set_policy(policy)

    @property
    def record_similarities(self) -> bool:
        return self._router.record_similarities

    @record_similarities.setter
    def record_similarities(self, record: bool) -> None:
        self._router.record_similarities = record

    @property
    def length(self) -> int:
        return self._state.length

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        check_token_ids(token_ids, 2, self._embedding_rows)
        before = state = self._ready_for(*token_ids.shape)
        start = state.length
        if self.policy.prefill != "token":  # then its tokens go on as decoding does
            start = self._strategy.prompt_start(state)
        if start < state.length:
            mask = _extended(state, token_ids.shape[1], padding_mask)
            padding_mask = None if mask is None else mask[:, start:]
            token_ids = torch.cat([state.token_ids[:, start:], token_ids.cpu()], 1)
            state = state.first(start)
        result, self._state = self._run(state, token_ids, padding_mask, "prefill", before=before)
        return result

    def decode(self, token_ids: Tensor) -> StepResult:
        check_token_ids(token_ids, 1, self._embedding_rows)
        state = self._ready_for(len(token_ids), 1)
        result, self._state = self._run(state, token_ids.unsqueeze(1), None, "decode")
        return result

    def score(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        check_token_ids(token_ids, 2, self._embedding_rows)
        state = self._ready_for(*token_ids.shape)
        is_real = None if counts is None else first_tokens(counts, *token_ids.shape)
        result, self._state = self._run(
            state, token_ids, None, "decode", is_real=is_real, all_logits=True
        )
        if counts is not None:
            self.rewind([token_ids.shape[1] - count for count in counts])
        return result

    def rewind(self, counts: Sequence[int]) -> None:
        check_batch(len(self._state.token_ids), len(counts))
        fewest = min(counts)
        self.truncate(self.length - fewest)
        shifts = [count - fewest for count in counts]
        if not any(shifts) or self.length == 0:
            return
        # move the shorter sequences to the right, so that all end where the longest does
        state = self._state.moved(shifts, self.num_layers)
        cache = self._cache.moved(shifts, self.length, unused=self.length - state.length)
        self._state, self._cache = state, cache

    def keep_sequences(self, sequences: Sequence[int]) -> None:
        check_sequences(len(self._state.token_ids), sequences)
        state = self._state.of_sequences(sequences)
        unused = self.length - state.length
        self._cache = self._cache.of_sequences(sequences, self.length, unused)
        self._state = state

    def truncate(self, length: int) -> None:
        if length <= 0:
            self._state = CacheState.empty(0)
            self._cache = SlotCache(self.num_layers, 0)
        elif length < self.length:
            self._state = self._state.first(length)

    def detach(self) -> None:
        """Give the model back as it was. The engine can't run any more."""
        self._decoder.detach()

    def _ready_for(self, batch: int, num_tokens: int) -> CacheState:
        """The cache as the strategy wants it before so many new tokens of each sequence.

        Raises:
            ContextFullError: they don't fit.
            RiverError: there are not as many sequences as the cache holds.
        """
        state = self._state
        end = state.length + num_tokens
        check_room(end, self.context_length)
        if state.length > 0:
            check_batch(len(state.token_ids), batch)
        whole, state = state, state.first(self._strategy.steps_start(state, end))
        if state.length == whole.length:
            return state
        policy = self.policy
        self._router.set_policy(ExitPolicy.never())
        try:
            while state.length < whole.length:
                assert self.angle_limit is not None
                rows = self.angle_limit.rows_like_single_steps(state.length)
                place = slice(state.length, None if rows is None else state.length + rows)
                mask = None if whole.padding_mask is None else whole.padding_mask[:, place]
                step = whole.token_ids[:, place]
                _, state = self._run(state, step, mask, "prefill", before=whole)
        finally:
            self._router.set_policy(policy)
        return state

    @torch.no_grad()
    def _run(
        self,
        state: CacheState,
        token_ids: Tensor,
        padding_mask: Tensor | None,
        phase: Phase,
        *,
        before: CacheState | None = None,
        is_real: Tensor | None = None,
        all_logits: bool = False,
    ) -> tuple[StepResult, CacheState]:
        """Run tokens `[B, T]`, and say what the cache holds then.

        Args:
            state: of the tokens before.
            before: the state where some of the tokens had run already; None: all are new.
            is_real: bool `[B, T]`, see `ExitRouter.begin_pass`; None: all but padding are.
        """
        self._process.check()
        batch, num_tokens = token_ids.shape
        if self.length == 0:
            before = state = CacheState.empty(batch)
            self._cache = SlotCache(self.num_layers, batch)
        run = RunningPass(
            self._decoder,
            self._cache,
            torch.cat([state.token_ids, token_ids.cpu()], 1),
            _extended(state, num_tokens, padding_mask),
            state.filled,
            leave_apart=phase == "decode" or self.policy.prefill == "token",
        )
        self._router.begin_pass(
            batch, num_tokens, phase, run.is_real if is_real is None else is_real
        )
        self._strategy.begin(run, state)
        self._strategy.after_layer(run, 0, self._router)
        self._cache.place = Place(run.start, run.end)
        inputs = padded_inputs(
            token_ids.to(self.device), run.padding_mask, self._takes_position_ids
        )
        self._running = run
        try:
            fewer_logits = {} if all_logits else self._last_logits_only
            output = self.model(
                past_key_values=self._cache, use_cache=True, **inputs, **fewer_logits
            )
        finally:
            self._running = None
        exit_layers, similarities = self._router.exit_layers, self._router.similarities
        new_state = self._strategy.end(run, run.depths(exit_layers), self._hidden_states)
        known = (before or state).exit_layers[:, : run.end]
        own = exit_layers[:, known.shape[1] - run.start :]
        new_state = replace(new_state, exit_layers=torch.cat([known, own], 1))
        if all_logits:
            return StepResult(output.logits, exit_layers, similarities=similarities), new_state
        result = StepResult(
            output.logits[:, -1],
            exit_layers[:, -1],
            similarities=None if similarities is None else similarities[:, :, -1],
        )
        return result, new_state

    def _on_layer(self, index: int, hidden_states: Tensor, call: LayerCall) -> Tensor:
        """A layer's turn: it runs for the sequences whose tokens are still in the backbone."""
        run = self._running
        if run is None:  # a pass of someone else's
            return self._decoder.run(index, hidden_states, call)
        run.call = call
        if run.is_text:
            return self._on_layer_of_text(run, index, hidden_states)
        stays = self._router.in_backbone[:, -1]
        output = hidden_states
        if not bool(stays.any()):
            self._strategy.skip_layer(run, index, hidden_states)
        else:
            rows = None if bool(stays.all()) else stays.nonzero().flatten()
            output = self._strategy.run_layer(run, index, hidden_states, rows)
            self._router.after_layer(index + 1, hidden_states, output)
            self._strategy.after_layer(run, index + 1, self._router)
        self._hidden_states = output
        return output

    def _on_layer_of_text(self, run: RunningPass, index: int, hidden_states: Tensor) -> Tensor:
        """The same where each token leaves on its own; all of them go through every layer, and what
        comes out in the end is what each left with."""
        stays = self._router.in_backbone  # [B, T]
        output = self._strategy.run_text_layer(run, index, hidden_states, stays)
        at_exit = hidden_states if index == 0 else self._hidden_states
        self._hidden_states = kept_where(stays, output, at_exit)
        self._router.after_layer(index + 1, hidden_states, output)
        self._strategy.after_layer(run, index + 1, self._router)
        return self._hidden_states if index + 1 == self.num_layers else output


def weight_bytes(decoder: HookedDecoder) -> tuple[tuple[int, ...], int]:
    """Of the linear weights of each layer, and of all other weights."""
    layers = tuple(
        sum(linear.get_parameter("weight").nbytes for linear in layer.linears.values())
        for layer in decoder.layers
    )
    return layers, sum(parameter.nbytes for parameter in decoder.model.parameters()) - sum(layers)


def _extended(state: CacheState, num_tokens: int, padding_mask: Tensor | None) -> Tensor | None:
    """The padding mask with the new tokens' own; None where nothing is padded."""
    if state.padding_mask is None and (padding_mask is None or bool(padding_mask.all())):
        return None
    batch = state.token_ids.shape[0]
    seen, new = state.padding_mask, padding_mask
    if seen is None:
        seen = torch.ones(batch, state.length, dtype=torch.bool)
    if new is None:
        new = torch.ones(batch, num_tokens, dtype=torch.bool)
    return torch.cat([seen, new.cpu()], 1)
