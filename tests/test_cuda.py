"""What the torch engine promises, on a CUDA device: in float32, beside a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from command_line import run
from steps import append, begin
from tiny_lm import character_tokenizer, sharpened, tiny_lm
from tiny_models import ARCHITECTURES, VOCABULARY, fake_quantised, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import DraftConfig, ExitPolicy, River, RiverConfig, RiverLM, attach_river
from river_llm.engines import TorchEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

CONFIG = RiverConfig(group_size=32)
MIXED = ExitPolicy.similarity(0.65)
POLICIES = [ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.fixed(2), MIXED]
FIXED_EVERYWHERE = ExitPolicy.fixed(2, prefill="token")
any_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
TEXT = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))


def llama() -> PreTrainedModel:
    return sharpened(tiny_model("Llama", intermediate_size=128))


def engine_on(device: str, kv_bits: int = 16) -> TorchEngine:
    model = llama()
    river = River.build(model, CONFIG)
    return TorchEngine(attach_river(model.to(device), river), kv_bits)


def logits_of(model: PreTrainedModel) -> Tensor:
    """Of a prompt in one pass and two tokens more, on the CPU."""
    cache = DynamicCache(config=model.config)
    tokens = TEXT.to(model.device)
    pieces = tokens[:, :-2], tokens[:, -2:-1], tokens[:, -1:]
    with torch.no_grad():
        return torch.cat(
            [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1
        ).cpu()


def answers(engine: TorchEngine, policy: ExitPolicy, rows: int = 2) -> list[tuple[list[int], ...]]:
    """Greedy tokens and exit layers of two prompts of unequal length, step after step."""
    sequences = begin(engine, [0] * rows)
    prompts = {s: TEXT[s, : 14 - 5 * s].tolist() for s in sequences}
    ends = torch.tensor([len(prompt) for prompt in prompts.values()]).cumsum(0) - 1
    step = append(engine, prompts, logit_rows=ends.tolist())
    found = []
    for _ in range(12):
        best = step.best_tokens.tolist()
        step = append(engine, {s: [best[s]] for s in sequences}, policy)
        found.append((best, step.exit_layers.tolist()))
    return found


@every_architecture
class TestEveryArchitecture:
    @pytest.fixture
    def model(self, architecture: str) -> PreTrainedModel:
        return tiny_model(architecture, **ARCHITECTURES[architecture])

    def test_never_leaving_is_the_untouched_model(self, model: PreTrainedModel) -> None:
        model.cuda()
        logits = logits_of(model)
        attach_river(model, CONFIG, policy=ExitPolicy.never())
        assert torch.equal(logits_of(model), logits)

    def test_leaving_is_the_fake_quantised_model(self, model: PreTrainedModel) -> None:
        river = River.build(model, CONFIG)
        for policy, first in ((ExitPolicy.always(), 0), (FIXED_EVERYWHERE, 2)):
            expected = logits_of(fake_quantised(model, river, first))
            own = copy.deepcopy(model).cuda()
            attach_river(own, river, policy=policy)
            torch.testing.assert_close(logits_of(own), expected, rtol=1e-3, atol=1e-3)

    def test_packed_products_in_bfloat16(self, model: PreTrainedModel) -> None:
        model = model.to(torch.bfloat16)
        river = River.build(model, CONFIG)
        expected = logits_of(fake_quantised(model, river).float())
        attach_river(model.cuda(), river, policy=ExitPolicy.always())
        assert (logits_of(model).float() - expected).norm() < 0.05 * expected.norm()


class TestEngine:
    @any_policy
    @pytest.mark.parametrize("kv_bits", [16, 8])
    def test_answers_as_on_a_cpu(self, policy: ExitPolicy, kv_bits: int) -> None:
        found, expected = (answers(engine_on(d, kv_bits), policy) for d in ("cuda", "cpu"))
        assert found == expected
        if policy is MIXED:
            assert len({layer for _, layers in found for layer in layers}) > 1

    @any_policy
    def test_a_sequence_beside_another_is_that_alone(self, policy: ExitPolicy) -> None:
        engine = engine_on("cuda")
        together, alone = answers(engine, policy), answers(engine, policy, rows=1)
        assert [([t[0]], [e[0]]) for t, e in together] == alone

    def test_truncated_and_written_caches_go_on_alike(self) -> None:
        engine, other = engine_on("cuda"), engine_on("cuda")
        a, b = begin(engine, [0, 0])
        text = TEXT[0].tolist()
        append(engine, {a: text[:9], b: text})
        expected = append(engine, {a: text[9:11]}, MIXED).logits
        tensors = engine.read_cache(b, 9)
        assert not any(tensor.is_cuda for tensor in tensors.values())
        (taker,) = begin(other)
        other.write_cache(taker, tensors, 9)
        found = append(other, {taker: text[9:11]}, MIXED).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        engine.truncate(a, 9)
        again = append(engine, {a: text[9:11]}, MIXED).logits
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


class TestAnswers:
    @staticmethod
    def lm() -> RiverLM:
        return tiny_lm(llama().cuda(), MIXED, context_length=256)

    @pytest.mark.parametrize("drafts", [DraftConfig(), DraftConfig(tokens=4, exit_layer=0)])
    def test_lossless_gives_the_backbones_tokens(self, drafts: DraftConfig) -> None:
        lm = self.lm()
        options = {"raw": True, "max_new_tokens": 40}
        expected = lm.generate("Hello, river", policy=ExitPolicy.never(), **options)
        result = lm.generate("Hello, river", policy=None, drafts=drafts, **options)
        assert result.tokens == expected.tokens
        assert result.lossless is not None
        assert result.lossless.verifications > 0

    def test_a_batch_is_its_rows_and_a_seed_gives_the_same_answer(self) -> None:
        lm = self.lm()
        prompts = ["Hello, river", "y", "Who are you? Hm"]
        options = {"raw": True, "max_new_tokens": 16}
        rows = lm.generate_batch(prompts, **options)
        for prompt, row in zip(prompts, rows, strict=True):
            assert row.tokens == lm.generate(prompt, **options).tokens
        sampled = [lm.generate("y", temperature=1.0, seed=3, **options).tokens for _ in range(2)]
        assert sampled[0] == sampled[1]


def test_the_command_line_takes_the_device(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_model("Llama", dtype=torch.bfloat16).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    command = ["generate", "-m", directory, "--group-size", 32, "--raw", "--max-new-tokens", 8]
    chosen = run(*command, "--device", "cuda", "--json", "Hello").json
    by_default = run(*command, "--json", "Hello").json
    assert chosen["engine"] == by_default["engine"] == "torch"
    assert by_default["tokens"] == chosen["tokens"]
