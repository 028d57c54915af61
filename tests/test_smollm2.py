"""The whole method on the real SmolLM2, against slow plain references."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from river_llm import AttachedRiver, ExitPolicy, River, RiverConfig, RiverLM, attach_river
from river_llm.engines import TorchEngine
from river_llm.river.kernels import KernelChoice
from river_llm.river.quantize import QuantizedMatrix

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
    """A plain model whose decoder linears hold the river's dequantised weights."""
    model = copy.deepcopy(smollm2)
    for layer, exit_layer in zip(model.model.layers, river.exit_layers, strict=True):
        for name, matrix in exit_layer.items():
            layer.get_submodule(name).weight.data = _dequantise(matrix)
    return model


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


class TestExitDuringDecoding:
    """The prompt runs in the backbone; every further token runs it to its exit layer, then the
    exit layers, which fill the same cache."""

    def test_a_fixed_exit_equals_a_model_quantised_from_there(
        self,
        smollm2: PreTrainedModel,
        quantised: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        attach: Attach,
    ) -> None:
        token_ids = _encode(tokenizer, PROMPTS[0])
        expected = []
        with torch.no_grad(), _quantised_from(smollm2, quantised, 10) as hybrid:
            cache = DynamicCache()
            logits = smollm2(token_ids, past_key_values=cache).logits[0, -1]
            for _ in range(8):
                expected.append(logits)
                logits = hybrid(logits.argmax().view(1, 1), past_key_values=cache).logits[0, -1]
        attached = attach(ExitPolicy.fixed(10))
        actual, exit_layers = _decode_greedily(attached, token_ids, 8)
        assert exit_layers == [10] * 7
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(("threshold", "first_layer"), [(0.8, 1), (0.973, 1), (0.94, 8)])
    def test_similarity_leaves_at_the_first_layer_above_the_threshold(
        self,
        smollm2: PreTrainedModel,
        quantised: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        attach: Attach,
        threshold: float,
        first_layer: int,
    ) -> None:
        token_ids = _encode(tokenizer, PROMPTS[2])
        expected, expected_layers = [], []
        with torch.no_grad():
            cache = DynamicCache()
            logits = smollm2(token_ids, past_key_values=cache).logits[0, -1]
            for _ in range(7):
                expected.append(logits)
                token = logits.argmax().view(1, 1)
                hidden_states = smollm2(
                    token, past_key_values=copy.deepcopy(cache), output_hidden_states=True
                ).hidden_states
                expected_layers.append(_first_layer_above(threshold, first_layer, hidden_states))
                with _quantised_from(smollm2, quantised, expected_layers[-1]) as hybrid:
                    logits = hybrid(token, past_key_values=cache).logits[0, -1]
            expected.append(logits)
        attached = attach(ExitPolicy.similarity(threshold, first_layer))
        actual, exit_layers = _decode_greedily(attached, token_ids, 8)
        assert exit_layers == expected_layers
        assert first_layer <= min(exit_layers) < 30
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-3)


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


@torch.no_grad()
def _decode_greedily(
    attached: AttachedRiver, token_ids: Tensor, steps: int
) -> tuple[Tensor, list[int]]:
    """Logits `[steps, vocabulary]` from the prompt on, and the exit layer of every token fed."""
    cache = DynamicCache()
    logits = [attached.model(token_ids, past_key_values=cache).logits[0, -1]]
    exit_layers = []
    for _ in range(steps - 1):
        token = logits[-1].argmax().view(1, 1)
        logits.append(attached.model(token, past_key_values=cache).logits[0, -1])
        exit_layers.append(int(attached.last_exit_layers))
    return torch.stack(logits), exit_layers


@contextmanager
def _quantised_from(
    backbone: PreTrainedModel, quantised: PreTrainedModel, exit_layer: int
) -> Iterator[PreTrainedModel]:
    """A plain model whose first `exit_layer` layers are the backbone's."""
    layers = quantised.model.layers
    mixed = [*backbone.model.layers[:exit_layer], *layers[exit_layer:]]
    quantised.model.layers = nn.ModuleList(mixed)
    yield quantised
    quantised.model.layers = layers


def _first_layer_above(
    threshold: float, first_layer: int, hidden_states: tuple[Tensor, ...]
) -> int:
    """Hidden states as `transformers` gives them: the embedding, then one after each layer."""
    last_layer = len(hidden_states) - 1
    for layer in range(first_layer, last_layer):
        before, after = hidden_states[layer - 1].flatten(), hidden_states[layer].flatten()
        if before @ after / (before.norm() * after.norm()) > threshold:
            return layer
    return last_layer


def _dequantise(matrix: QuantizedMatrix) -> Tensor:
    """`(code - middle) * scale + zero`, group by group, with nothing of the package's own."""
    scales = matrix.scales.float().repeat_interleave(matrix.group_size, dim=1)
    zeros = matrix.zeros.float().repeat_interleave(matrix.group_size, dim=1)
    return (matrix.codes().float() - 2 ** (matrix.bits - 1)) * scales + zeros


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
