"""What holds for the native engine bit for bit, whatever the batch, the threads, the cut of a text
into passes and the exits: a token's numbers depend on the tokens before it alone."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_engines import (
    BACKBONE_TOLERANCE,
    KERNELS,
    LONG_CONTEXT,
    Subject,
    begun,
    cached_states,
    check_logits,
    decode_along,
    engine_of,
    long_subject,
    random_tokens,
    relative_errors,
    subject_of,
)

from river_llm import ContextFullError, ExitPolicy
from river_llm.exit_policy import BatchRule, PrefillRule

NUM_LAYERS = 4
CONTEXT = 128
CASES = ("llama", "mistral, window", "gemma3_text", "llama, biases")

every_kernel_set = pytest.mark.parametrize("kernels", KERNELS)
any_case = st.sampled_from(CASES)
any_width = st.sampled_from([16, 8])  # of the KV cache
infinities = st.sampled_from([-math.inf, math.inf])
thresholds = st.floats(0, 1) | infinities
policies = st.builds(
    lambda thresholds, prefill, batch: ExitPolicy.per_layer(
        thresholds, prefill=prefill, batch=batch
    ),
    st.tuples(infinities, *[thresholds] * (NUM_LAYERS - 1)),
    st.sampled_from(get_args(PrefillRule)),
    st.sampled_from(get_args(BatchRule)),
)
own_policies = policies.filter(lambda policy: policy.batch == "sequence")


@every_kernel_set
@given(
    case=any_case,
    kv_bits=any_width,
    policy=own_policies,
    prompt_lengths=st.lists(st.integers(1, 70), min_size=2, max_size=17),
    steps=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_a_row_of_a_batch_is_the_row_alone(
    kernels: str,
    case: str,
    kv_bits: int,
    policy: ExitPolicy,
    prompt_lengths: list[int],
    steps: int,
    seed: int,
) -> None:
    longest = max(prompt_lengths)
    tokens = random_tokens(len(prompt_lengths), longest + steps, seed)
    mask = torch.arange(longest) >= longest - torch.tensor(prompt_lengths).unsqueeze(1)
    together = begun(engine_of(case, kernels, kv_bits=kv_bits), policy)
    logits, exits = decode_along(together, tokens, longest, mask)
    for row, length in enumerate(prompt_lengths):
        alone = begun(engine_of(case, kernels, 2, kv_bits), policy)
        own_logits, own_exits = decode_along(
            alone, tokens[row : row + 1, longest - length :], length
        )
        assert torch.equal(own_logits[:, 0], logits[:, row])
        assert torch.equal(own_exits[:, 0], exits[:, row])
        assert torch.equal(cached_states(alone), cached_states(together, row))


@every_kernel_set
@given(
    case=any_case,
    kv_bits=any_width,
    policy=policies,
    cached=st.integers(0, 70),
    num_tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_verifying_tokens_gives_the_logits_of_decoding_them_in_the_backbone(
    kernels: str,
    case: str,
    kv_bits: int,
    policy: ExitPolicy,
    cached: int,
    num_tokens: int,
    seed: int,
) -> None:
    tokens = random_tokens(1, cached + num_tokens, seed)
    engine = begun(engine_of(case, kernels, kv_bits=kv_bits), policy)
    if cached:
        engine.prefill(tokens[:, :cached])
    verified = engine.verify(tokens[:, cached:])
    logits, best_tokens, states = verified.logits, verified.best_tokens, cached_states(engine)
    assert engine.policy is policy
    engine.truncate(cached)
    engine.policy = ExitPolicy.never()
    for place in range(num_tokens):
        step = engine.decode(tokens[:, cached + place])
        assert torch.equal(step.logits, logits[:, place])
        assert torch.equal(step.best_tokens, best_tokens[:, place])
    assert torch.equal(cached_states(engine), states)


@every_kernel_set
@given(
    case=any_case,
    kv_bits=any_width,
    policy=policies,
    batch=st.integers(1, 5),
    prompt_length=st.integers(1, 100),
    steps=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_the_number_of_threads_changes_no_bit(
    kernels: str,
    case: str,
    kv_bits: int,
    policy: ExitPolicy,
    batch: int,
    prompt_length: int,
    steps: int,
    seed: int,
) -> None:
    tokens = random_tokens(batch, prompt_length + steps, seed)
    runs = []
    for threads in (1, 2, 3):
        engine = begun(engine_of(case, kernels, threads, kv_bits), policy)
        assert engine.threads == threads
        logits, exits = decode_along(engine, tokens, prompt_length)
        runs.append((logits, exits, *(cached_states(engine, row) for row in range(batch))))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@every_kernel_set
@given(
    case=any_case,
    kv_bits=any_width,
    policy=policies.filter(lambda policy: policy.prefill != "sequence"),
    batch=st.integers(1, 3),
    pieces=st.lists(st.integers(1, 40), min_size=2, max_size=5).filter(lambda p: sum(p) < CONTEXT),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_a_prompt_in_pieces_is_the_prompt_at_once(
    kernels: str,
    case: str,
    kv_bits: int,
    policy: ExitPolicy,
    batch: int,
    pieces: list[int],
    seed: int,
) -> None:
    tokens = random_tokens(batch, sum(pieces), seed)
    engine = begun(engine_of(case, kernels, kv_bits=kv_bits), policy)
    logits = engine.prefill(tokens).logits
    states = [cached_states(engine, row) for row in range(batch)]
    engine.truncate(0)
    for piece in tokens.split(pieces, 1):
        last = engine.prefill(piece)
    assert torch.equal(last.logits, logits)
    assert all(torch.equal(cached_states(engine, row), states[row]) for row in range(batch))


@given(
    case=any_case,
    kv_bits=any_width,
    policy=policies,
    batch=st.integers(1, 3),
    prompt_length=st.integers(1, 80),
    kept=st.integers(0, 10),
    seed=st.integers(0, 1000),
)
def test_truncating_and_going_on_is_as_if_nothing_had_been(
    case: str,
    kv_bits: int,
    policy: ExitPolicy,
    batch: int,
    prompt_length: int,
    kept: int,
    seed: int,
) -> None:
    tokens = random_tokens(batch, prompt_length + 10, seed)
    engine = begun(engine_of(case, kv_bits=kv_bits), policy)
    logits, exits = decode_along(engine, tokens, prompt_length)
    states = cached_states(engine, batch - 1)
    engine.truncate(prompt_length + kept)
    assert engine.length == prompt_length + kept
    for place in range(kept, 10):
        again = engine.decode(tokens[:, prompt_length + place])
        assert torch.equal(again.logits, logits[1 + place])
        assert torch.equal(again.exit_layers, exits[1 + place])
    assert torch.equal(cached_states(engine, batch - 1), states)


@every_kernel_set
@pytest.mark.parametrize("case", ["llama", "gemma3_text"])
def test_a_long_prompt_is_that_of_float32_whatever_it_is_cut_into(case: str, kernels: str) -> None:
    """Longer than what a layer computes at a time (256 rows) and than one native call (1024)."""
    subject, tokens = long_subject(case), random_tokens(1, 1100, seed=1)
    policy = ExitPolicy.fixed(1, prefill="token")
    engine = subject.engine(policy, kernels=kernels, threads=2)
    whole = engine.prefill(tokens).logits
    states = cached_states(engine)
    reference = subject.reference(policy)
    reference.prefill(tokens)
    written = cached_states(reference)
    assert float(relative_errors(states.flatten(2), written.flatten(2)).max()) < 0.012
    # pieces that end at the borders of pages and chunks, beside them and far from them
    for pieces in ([1, 63, 1, 190, 1, 255, 257, 332], [64, 192, 256, 512, 76]):
        engine.truncate(0)
        for piece in tokens.split(pieces, 1):
            cut = engine.prefill(piece).logits
        assert torch.equal(cut, whole)
        assert torch.equal(cached_states(engine), states)


def test_long_rows_of_a_padded_batch_are_the_rows_alone() -> None:
    """Chunks and native calls hold rows of several sequences, or padding alone."""
    lengths, longest = [500, 40, 299], 1100
    tokens, policy = random_tokens(3, longest + 2, seed=8), ExitPolicy.fixed(1, prefill="token")
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    together = long_subject("gemma3_text").engine(policy, threads=2)
    logits, _ = decode_along(together, tokens, longest, mask)
    for row, length in enumerate(lengths):
        alone = long_subject("gemma3_text").engine(policy)
        own_logits, _ = decode_along(alone, tokens[row : row + 1, longest - length :], length)
        assert torch.equal(own_logits[:, 0], logits[:, row])
        assert torch.equal(cached_states(alone), cached_states(together, row))


def test_positions_up_to_the_contexts_end_are_those_of_float32() -> None:
    """Beyond the 2048 positions whose rotary angles an engine makes at a time."""
    subject, tokens = long_subject("llama"), random_tokens(1, LONG_CONTEXT, seed=2)
    engine = subject.engine()
    engine.prefill(tokens[:, :-130])
    verified = engine.verify(tokens[:, -130:-20]).logits[0]
    steps = [engine.decode(tokens[:, place]).logits for place in range(-20, 0)]
    with torch.no_grad():
        expected = subject.exact(tokens, logits_to_keep=130).logits[0]
    check_logits(torch.cat([verified, *steps]), expected, BACKBONE_TOLERANCE)
    assert engine.length == LONG_CONTEXT


@pytest.mark.parametrize("context", [64, 100, 128])
def test_a_full_context_is_an_error_that_changes_nothing(context: int) -> None:
    engine = Subject("Llama", {"max_position_embeddings": context}).engine()
    assert engine.context_length == context
    tokens = random_tokens(2, context + 1, seed=3)
    message = f"don't fit the model's context of {context}"
    with pytest.raises(ContextFullError, match=f"{context + 1} tokens {message}"):
        engine.prefill(tokens)
    assert engine.length == 0
    engine.prefill(tokens[:, : context - 1])
    with pytest.raises(ContextFullError, match=message):
        engine.verify(tokens[:, :2])
    last = engine.decode(tokens[:, context - 1]).logits
    states = cached_states(engine, 1)
    for fail in (engine.prefill, engine.verify, lambda token: engine.decode(token[:, 0])):
        with pytest.raises(ContextFullError, match=message):
            fail(tokens[:, :1])
    assert engine.length == context
    assert torch.equal(cached_states(engine, 1), states)
    engine.truncate(context - 1)
    assert torch.equal(engine.decode(tokens[:, context - 1]).logits, last)


@pytest.mark.parametrize("kept", [3, 7, 9])
def test_a_cache_cut_within_the_padding_goes_on_as_the_torch_engines_does(kept: int) -> None:
    subject, tokens = subject_of("llama"), random_tokens(2, 20, seed=5)
    mask = torch.arange(12) >= torch.tensor([[0], [7]])
    logits = []
    for engine in (subject.engine(), subject.reference()):
        engine.prefill(tokens[:, :12], mask)
        engine.truncate(kept)
        passes = [engine.decode(tokens[:, place]).logits for place in range(12, 16)]
        engine.truncate(kept + 1)
        passes.append(engine.prefill(tokens[:, 16:18]).logits)
        assert engine.length == kept + 3
        logits.append(torch.stack(passes))
    check_logits(*logits, BACKBONE_TOLERANCE)


@every_kernel_set
@pytest.mark.parametrize("forgotten", [1, 3, 60])
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_forgotten_tokens_leave_no_trace(kv_bits: int, forgotten: int, kernels: str) -> None:
    """Not even where their states were no numbers, as after an overflow."""
    subject, tokens = Subject("Llama", {"num_hidden_layers": 2}), random_tokens(1, 30, seed=6)
    subject.model.get_input_embeddings().weight.data[2] = math.nan
    engine = subject.engine(kernels=kernels, kv_bits=kv_bits)
    logits, _ = decode_along(engine, tokens, 20)
    engine.truncate(20)
    engine.verify(torch.tensor([[3, *[2] * forgotten]]))
    engine.truncate(20)
    assert torch.equal(engine.decode(tokens[:, 20]).logits, logits[1])
    engine.truncate(0)
    assert torch.equal(decode_along(engine, tokens, 20)[0], logits)
