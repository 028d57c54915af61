"""What the torch engine promises, on a CUDA device: in float32, beside a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from command_line import run
from tiny_lm import character_tokenizer, sharpened, tiny_lm
from tiny_models import ARCHITECTURES, VOCABULARY, fake_quantised, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import DraftConfig, ExitPolicy, River, RiverConfig, RiverLM, attach_river
from river_llm.engines import Engine, TorchEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

CONFIG = RiverConfig(group_size=32)
MIXED = ExitPolicy.similarity(0.65)
POLICIES = [ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.fixed(2), MIXED]
FIXED_EVERYWHERE = ExitPolicy.fixed(2, prefill="token")
any_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
NEW_TOKENS = 12


def llama() -> PreTrainedModel:
    return sharpened(tiny_model("Llama", intermediate_size=128))


def engine_on(device: str, policy: ExitPolicy, kv_bits: int = 16) -> TorchEngine:
    model = llama()
    river = River.build(model, CONFIG)
    return TorchEngine(attach_river(model.to(device), river, policy=policy), kv_bits)


def lm_on_cuda(policy: ExitPolicy = MIXED) -> RiverLM:
    return tiny_lm(llama().cuda(), policy, context_length=256)


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Of a prompt in one pass and two tokens more, on the CPU."""
    cache = DynamicCache(config=model.config)
    tokens = tokens.to(model.device)
    pieces = tokens[:, :-2], tokens[:, -2:-1], tokens[:, -1:]
    with torch.no_grad():
        return torch.cat(
            [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1
        ).cpu()


def answer(engine: Engine, prompt: Tensor) -> tuple[list[int], list[int]]:
    """Greedy tokens and exit layers of all sequences, step after step."""
    engine.truncate(0)
    step = engine.prefill(prompt)
    tokens, layers = step.best_tokens.tolist(), step.exit_layers.tolist()
    for _ in range(NEW_TOKENS):
        step = engine.decode(step.best_tokens.cpu())
        tokens += step.best_tokens.tolist()
        layers += step.exit_layers.tolist()
    return tokens, layers


@every_architecture
class TestEveryArchitecture:
    @pytest.fixture
    def model(self, architecture: str) -> PreTrainedModel:
        return tiny_model(architecture, **ARCHITECTURES[architecture])

    def test_never_leaving_is_the_untouched_model(self, model: PreTrainedModel) -> None:
        model.cuda()
        tokens = tokens_of(2, 14)
        logits = logits_of(model, tokens)
        attach_river(model, CONFIG, policy=ExitPolicy.never())
        assert torch.equal(logits_of(model, tokens), logits)

    def test_leaving_is_the_fake_quantised_model(self, model: PreTrainedModel) -> None:
        river = River.build(model, CONFIG)
        tokens = tokens_of(2, 14)
        for policy, first in ((ExitPolicy.always(), 0), (FIXED_EVERYWHERE, 2)):
            expected = logits_of(fake_quantised(model, river, first), tokens)
            own = copy.deepcopy(model).cuda()
            attach_river(own, river, policy=policy)
            torch.testing.assert_close(logits_of(own, tokens), expected, rtol=1e-3, atol=1e-3)

    def test_packed_products_in_bfloat16(self, model: PreTrainedModel) -> None:
        model = model.to(torch.bfloat16)
        river = River.build(model, CONFIG)
        tokens = tokens_of(2, 14)
        expected = logits_of(fake_quantised(model, river).float(), tokens)
        attach_river(model.cuda(), river, policy=ExitPolicy.always())
        found = logits_of(model, tokens).float()
        assert (found - expected).norm() < 0.05 * expected.norm()


class TestEngine:
    @any_policy
    def test_answers_as_on_a_cpu(self, policy: ExitPolicy) -> None:
        prompt = tokens_of(3, 11)
        assert answer(engine_on("cuda", policy), prompt) == answer(engine_on("cpu", policy), prompt)

    def test_tokens_part_ways(self) -> None:
        layers = answer(engine_on("cuda", MIXED), tokens_of(3, 11))[1]
        assert len(set(layers)) > 1  # or the tests above and below say little

    @any_policy
    def test_a_row_of_a_batch_is_that_row_alone(self, policy: ExitPolicy) -> None:
        engine = engine_on("cuda", policy)
        prompt = tokens_of(3, 11)
        tokens, layers = answer(engine, prompt)
        for row in range(3):
            assert answer(engine, prompt[row : row + 1]) == (tokens[row::3], layers[row::3])

    @any_policy
    def test_truncating_and_going_on(self, policy: ExitPolicy) -> None:
        engine = engine_on("cuda", policy)
        prompt = tokens_of(2, 11)
        expected = answer(engine, prompt)
        engine.truncate(11)
        engine.decode(torch.tensor([5, 6]))
        engine.truncate(7)
        engine.truncate(0)
        assert answer(engine, prompt) == expected

    @any_policy
    def test_scores_are_those_of_a_cpu(self, policy: ExitPolicy) -> None:
        tokens = tokens_of(2, 20)
        found, expected = (engine_on(device, policy).score(tokens) for device in ("cuda", "cpu"))
        assert found.exit_layers.tolist() == expected.exit_layers.tolist()
        torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)

    def test_a_cache_comes_back(self) -> None:
        engine = engine_on("cuda", MIXED)
        prompt = tokens_of(1, 11)
        first = engine.prefill(prompt).best_tokens.cpu()
        expected = engine.decode(first).logits
        tensors = engine.read_cache(11)
        assert all(not tensor.is_cuda for tensor in tensors.values())
        other = engine_on("cuda", MIXED)
        other.write_cache(tensors, 11)
        assert torch.equal(other.decode(first).logits, expected)

    def test_a_cache_of_8_bits_is_as_on_a_cpu(self) -> None:
        prompt = tokens_of(3, 11)
        engines = [engine_on(device, MIXED, kv_bits=8) for device in ("cuda", "cpu")]
        found, expected = (answer(engine, prompt) for engine in engines)
        assert found == expected


class TestAnswers:
    @pytest.mark.parametrize("drafts", [DraftConfig(), DraftConfig(tokens=4, exit_layer=0)])
    def test_lossless_gives_the_backbones_tokens(self, drafts: DraftConfig) -> None:
        lm = lm_on_cuda()
        lm.policy = ExitPolicy.never()
        options = {"raw": True, "max_new_tokens": 40}
        expected = lm.generate("Hello, river", **options)
        result = lm.generate("Hello, river", mode="lossless", drafts=drafts, **options)
        assert result.tokens == expected.tokens
        assert result.lossless is not None
        assert result.lossless.verifications > 0

    def test_a_seed_gives_the_same_answer(self) -> None:
        lm = lm_on_cuda()
        options = {"raw": True, "max_new_tokens": 20, "temperature": 1.0, "seed": 3}
        first, second = (lm.generate("Hello, river", **options) for _ in range(2))
        assert first.tokens == second.tokens

    def test_a_ragged_batch_is_its_rows(self) -> None:
        lm = lm_on_cuda()
        prompts = ["Hello, river", "y", "Who are you? Hm"]
        rows = lm.generate_batch(prompts, raw=True, max_new_tokens=16)
        for prompt, row in zip(prompts, rows, strict=True):
            assert row.tokens == lm.generate(prompt, raw=True, max_new_tokens=16).tokens


def test_the_command_line_takes_the_device(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_model("Llama", dtype=torch.bfloat16).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    command = ["generate", "-m", directory, "--group-size", 32, "--raw", "--max-new-tokens", 8]
    chosen = run(*command, "--device", "cuda", "--json", "Hello").json
    by_default = run(*command, "--json", "Hello").json
    assert chosen["engine"] == by_default["engine"] == "torch"
    assert by_default["tokens"] == chosen["tokens"]
