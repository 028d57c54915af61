"""The whole method on the real SmolLM2, against slow plain references."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from exit_reference import decode_with_exits
from steps import decode_along
from tiny_models import fake_quantised
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import AttachedRiver, ExitPolicy, River, RiverConfig, RiverLM, attach_river
from river_llm.engines import TorchEngine
from river_llm.river.kernels import KernelChoice

PROMPTS = (
    "The capital of France is",
    "Water boils at one hundred degrees, and it freezes at",
    "def fibonacci(n):\n    if n < 2:\n        return",
)

PARAGRAPH = """\
The old lighthouse keeper climbed the stairs every evening, a lantern in one hand and a heel of
bread in the other. There were two hundred and twelve steps, and he knew each of them by the sound
it made under his boots. At the top he trimmed the wick, filled the lamp with oil, and wound the
clockwork that turned the great lens. Then he sat down by the window and looked at the sea. On clear
nights he could count the fishing boats by their lights, and he knew most of them by name. When the
fog came in from the north there was nothing to count, and he listened instead: to the bell on the
reef, to the wind in the railing, and to the low horn of the mail steamer as it felt its way into
the harbour. He had kept the light for thirty-one years and had never once let it go out. His
daughter, who taught mathematics in the town, had asked him many times to come and live with her.
He always answered that he would think about it in the spring, and every spring there was a reason
to stay: a storm had broken the panes, the new assistant was too young, or the boats were out late
and somebody had to be there. In truth he was afraid that he could not sleep without the clockwork,
whose slow ticking had long ago become the measure of his nights.
"""

Attach = Callable[..., AttachedRiver]


@pytest.fixture(scope="module")
def river(smollm2: PreTrainedModel) -> River:
    """4-bit HQQ in groups of 64."""
    return River.build(smollm2)


@pytest.fixture
def attach(smollm2: PreTrainedModel, river: River) -> Iterator[Attach]:
    """`attach_river` for the length of a test, to `smollm2` unless another model is given."""
    attachments: list[AttachedRiver] = []

    def attach_for_the_test(
        policy: ExitPolicy,
        model: PreTrainedModel = smollm2,
        river: River = river,
        kernel: KernelChoice = "auto",
    ) -> AttachedRiver:
        attachments.append(attach_river(model, river, policy=policy, kernel=kernel))
        return attachments[-1]

    yield attach_for_the_test
    for attached in attachments:
        attached.detach()


@pytest.fixture(scope="module")
def quantised(smollm2: PreTrainedModel, river: River) -> PreTrainedModel:
    return fake_quantised(smollm2, river)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_never_leaving_equals_the_untouched_model_bit_for_bit(
    smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, attach: Attach, prompt: str
) -> None:
    token_ids = _encode(tokenizer, prompt)
    logits, tokens = _logits(smollm2, token_ids), _greedy(smollm2, token_ids, 12)
    attach(ExitPolicy.never())
    assert torch.equal(_logits(smollm2, token_ids), logits)
    assert _greedy(smollm2, token_ids, 12) == tokens


def test_leaving_at_once_equals_a_model_of_dequantised_weights(
    smollm2: PreTrainedModel,
    quantised: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attach: Attach,
) -> None:
    token_ids = _encode(tokenizer, PROMPTS[1])
    backbone_logits = _logits(smollm2, token_ids)
    attach(ExitPolicy.always())
    logits = _logits(smollm2, token_ids)
    torch.testing.assert_close(logits, _logits(quantised, token_ids), rtol=1e-4, atol=1e-3)
    assert _relative_error(logits, backbone_logits) > 0.05
    assert _greedy(smollm2, token_ids, 6) == _greedy(quantised, token_ids, 6)


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy.fixed(10),
        ExitPolicy.similarity(0.8),
        ExitPolicy.similarity(0.973),
        ExitPolicy.similarity(0.94, 8),
    ],
    ids=lambda policy: policy.describe(),
)
def test_tokens_behind_the_prompt_leave_as_the_policy_says(
    smollm2: PreTrainedModel,
    river: River,
    tokenizer: PreTrainedTokenizerBase,
    attach: Attach,
    policy: ExitPolicy,
) -> None:
    tokens, length = tokenizer(PARAGRAPH).input_ids[:32], 24
    thresholds = policy.thresholds(30)
    expected, layers = decode_with_exits(smollm2, river, tokens, thresholds, prompt_length=length)
    logits, exit_layers = decode_along(TorchEngine(attach(policy)), tokens, length, policy)
    assert exit_layers.tolist() == layers
    assert min(layers) < 30
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def test_the_packed_kernel_is_as_exact_as_dequantising(
    smollm2_bf16: PreTrainedModel,
    quantised: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attach: Attach,
) -> None:
    """In bfloat16; the truth is the same weights in float32. (The plain backbone's own bfloat16
    error on this text is 0.02.)"""
    token_ids = _encode(tokenizer, PARAGRAPH)[:, :48]
    truth = _logits(quantised, token_ids)
    logits = {}
    for kernel in ("packed", "dequantize"):
        attached = attach(ExitPolicy.always(), smollm2_bf16, kernel=kernel)
        logits[kernel] = _logits(smollm2_bf16, token_ids)
        attached.detach()
    assert not torch.equal(logits["packed"], logits["dequantize"])
    packed_error = _relative_error(logits["packed"], truth)
    assert packed_error < 0.035
    assert packed_error < 1.2 * _relative_error(logits["dequantize"], truth)
    assert _relative_error(logits["packed"], logits["dequantize"]) < 0.045


@pytest.mark.parametrize(
    "policy",
    [ExitPolicy.never(), ExitPolicy.similarity(0.95), ExitPolicy.fixed(20, prefill="token")],
    ids=lambda policy: policy.kind,
)
def test_river_lm_gives_the_tokens_of_transformers_generate(
    smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, attach: Attach, policy: ExitPolicy
) -> None:
    attached = attach(policy)
    question = "What is the capital of France?"
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    token_ids = _encode(tokenizer, text)
    lm = RiverLM(
        TorchEngine(attached),
        tokenizer,
        attached.config,
        frozenset({tokenizer.eos_token_id}),
        policy,
    )
    result = lm.generate(question, max_new_tokens=12)
    attached.policy = policy
    assert result.tokens == _greedy(smollm2, token_ids, 12)
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)


def test_hqq_is_nearer_to_the_backbone_than_rounding_and_8_bits_far_nearer(
    smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, river: River, attach: Attach
) -> None:
    token_ids = _encode(tokenizer, PARAGRAPH)
    assert token_ids.shape[1] >= 200
    backbone = _logits(smollm2, token_ids).log_softmax(-1)

    def divergence(river: River) -> float:
        """Mean KL(backbone || river) per token, in nats."""
        attached = attach(ExitPolicy.always(), river=river)
        logits = _logits(smollm2, token_ids).log_softmax(-1)
        attached.detach()
        return float(F.kl_div(logits[0], backbone[0], reduction="batchmean", log_target=True))

    hqq = divergence(river)
    rounding = divergence(River.build(smollm2, RiverConfig(quantizer="rtn")))
    eight_bits = divergence(River.build(smollm2, RiverConfig(bits=8, quantizer="rtn")))
    assert 0.02 < hqq < 0.9 * rounding
    assert 0 < eight_bits < hqq / 50


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    token_ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
    return token_ids


@torch.no_grad()
def _logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    logits: Tensor = model(token_ids).logits.float()
    return logits


def _greedy(model: PreTrainedModel, token_ids: Tensor, max_new_tokens: int) -> list[int]:
    generated = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    new_tokens: list[int] = generated[0, token_ids.shape[1] :].tolist()
    return new_tokens


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
