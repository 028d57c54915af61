"""`generate()` of a model with a river: what it can't do is refused by name, the rest is exact."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pytest
import torch
from tiny_lm import sharpened
from tiny_models import tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

from river_llm import ExitPolicy, RiverConfig, RiverError, attach_river, detach_river
from river_llm.engines import TorchEngine
from river_llm.engines.step import Step
from river_llm.river.attach import AttachedRiver

CONFIG = RiverConfig(group_size=32)
PROMPT = torch.tensor([[5, 17, 3, 88, 42, 9, 5, 17, 3, 88, 42]])
MIXED = ExitPolicy.similarity(0.8)
APART = {
    "fixed": ExitPolicy.fixed(2),
    "similarity": MIXED,
    "mean similarity": ExitPolicy.similarity(0.8, prefill="sequence"),
    "always, prompt in the backbone": ExitPolicy.always(prefill="backbone"),
}
ALIKE = {
    "never": ExitPolicy.never(),
    "always": ExitPolicy.always(),
    "fixed, all of a prompt": ExitPolicy.fixed(2, prefill="sequence"),
    "similarity, each token": ExitPolicy.similarity(0.8, prefill="token"),
}
MODES: dict[str, Any] = {
    "assistant_model": None,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "use_cache": False,
}
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def model() -> PreTrainedModel:
    return sharpened(tiny_model("Llama"))


@pytest.fixture
def attached(model: PreTrainedModel) -> AttachedRiver:
    return attach_river(model, CONFIG, policy=MIXED)


def setting_of(mode: str) -> dict[str, Any]:
    value = tiny_model("Llama", num_hidden_layers=1) if mode == "assistant_model" else MODES[mode]
    return {mode: value}


def answer(model: PreTrainedModel, prompt: Tensor = PROMPT, **settings: Any) -> list[int]:
    inputs = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 10}
    tokens: Tensor = model.generate(prompt, **{**inputs, **settings})
    return tokens[0, prompt.shape[1] :].tolist()


class TestGenerate:
    def test_is_a_loop_of_single_steps(self, attached: AttachedRiver) -> None:
        tokens = answer(attached.model, max_new_tokens=20)
        counts = attached.exit_counts.clone()
        assert int(counts.sum()) == 19
        assert int((counts > 0).sum()) > 1
        expected = float((counts * torch.arange(5)).sum() / 19)
        assert attached.mean_exit_layer == pytest.approx(expected)
        with torch.no_grad():
            step = attached.model(PROMPT, use_cache=True)
            for token in tokens:
                assert int(step.logits[0, -1].argmax()) == token
                cache = step.past_key_values
                step = attached.model(torch.tensor([[token]]), past_key_values=cache)

    def test_is_the_engines_steps(self, attached: AttachedRiver) -> None:
        tokens = answer(attached.model)
        engine = TorchEngine(attached)
        sequence, prompt = engine.add_sequence(), PROMPT[0].tolist()
        never, mixed = (torch.tensor(p.thresholds(4)) for p in (ExitPolicy.never(), MIXED))
        step = engine.forward(Step(prompt, [sequence] * len(prompt), never, [len(prompt) - 1]))
        for token in tokens:
            assert step.best_tokens.tolist() == [token]
            step = engine.forward(Step([token], [sequence], mixed, [0]))

    def test_searches_beams(self, attached: AttachedRiver) -> None:
        def log_likelihood(tokens: Tensor) -> float:
            with torch.no_grad():
                of_all = attached.model(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
            chosen = of_all.gather(1, tokens[1:].unsqueeze(1))
            return float(chosen[PROMPT.shape[1] - 1 :].sum())

        attached.policy = ExitPolicy.fixed(2, prefill="token")
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        beams = attached.model.generate(PROMPT, num_beams=3, num_return_sequences=3, **settings)
        assert len({tuple(row.tolist()) for row in beams}) == 3
        best = max(map(log_likelihood, beams))
        assert best >= log_likelihood(attached.model.generate(PROMPT, **settings)[0]) - 1e-3

    def test_returns_scores_hidden_states_and_attentions_of_every_layer(
        self, attached: AttachedRiver
    ) -> None:
        attached.model.set_attn_implementation("eager")
        names = ("scores", "hidden_states", "attentions")
        output = attached.model.generate(
            PROMPT,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            **{f"output_{name}": True for name in names},
        )
        assert [len(getattr(output, name)) for name in names] == [5, 5, 5]
        assert all(len(step) == 5 for step in output.hidden_states)
        assert all(len(step) == 4 for step in output.attentions)
        last = attached.model.lm_head(output.hidden_states[-1][-1])[0, -1]
        torch.testing.assert_close(last, output.scores[-1][0])

    @pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])  # which has masks by layer
    @pytest.mark.parametrize("rules", [{}, {"batch": "minimum"}, {"prefill": "sequence"}], ids=str)
    def test_is_the_same_with_a_static_cache(
        self, architecture: str, rules: dict[str, Any]
    ) -> None:
        model = sharpened(tiny_model(architecture))
        attach_river(model, CONFIG, policy=ExitPolicy.similarity(0.8, **rules))
        assert answer(model, cache_implementation="static") == answer(model)

    def test_gives_a_padded_row_what_it_gives_the_row_alone(self, attached: AttachedRiver) -> None:
        rows = [[5, 17, 3, 88, 42, 9], [7, 8], [60, 61, 62, 63]]
        batch = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
        together = attached.model.generate(batch, attention_mask=mask, **settings)[:, 6:]
        assert int((attached.exit_counts > 0).sum()) > 1
        for row, generated in zip(rows, together.tolist(), strict=True):
            assert answer(attached.model, torch.tensor([row]), max_new_tokens=16) == generated

    def test_lets_one_thread_in_at_a_time(self, attached: AttachedRiver) -> None:
        prompts = [PROMPT, PROMPT[:, 3:], PROMPT[:, :4]]
        alone = [answer(attached.model, prompt) for prompt in prompts]
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(answer, attached.model, prompt) for prompt in prompts * 3]
            assert [job.result(60) for job in jobs] == alone * 3


class TestModesThatMixPromptAndAnswer:
    @every_mode
    @pytest.mark.parametrize("policy", APART.values(), ids=APART)
    def test_are_refused_by_name(
        self, model: PreTrainedModel, mode: str, policy: ExitPolicy
    ) -> None:
        attach_river(model, CONFIG, policy=policy)
        expected = answer(model)
        setting = setting_of(mode)
        with pytest.raises(RiverError, match=rf"^generate\({mode}=.*detach_river") as caught:
            answer(model, **setting)
        assert "\n" not in str(caught.value)
        if mode != "assistant_model":
            with pytest.raises(RiverError, match=rf"^generate\({mode}="):
                model.generate(PROMPT, GenerationConfig(**setting))
            own, model.generation_config = model.generation_config, GenerationConfig(**setting)
            with pytest.raises(RiverError, match=rf"^generate\({mode}="):
                model.generate(PROMPT)
            model.generation_config = own
        assert answer(model) == expected

    @every_mode
    @pytest.mark.parametrize("policy", ALIKE.values(), ids=ALIKE)
    def test_are_exact_where_prompt_and_answer_leave_alike(
        self, model: PreTrainedModel, mode: str, policy: ExitPolicy
    ) -> None:
        attach_river(model, CONFIG, policy=policy)
        assert answer(model, **setting_of(mode)) == answer(model)

    def test_are_refused_where_sequences_share_their_passes(self, model: PreTrainedModel) -> None:
        settings = {"generation_config": GenerationConfig(max_new_tokens=2, eos_token_id=-1)}
        attach_river(model, CONFIG, policy=MIXED)
        with pytest.raises(RiverError, match="continuous batching"):
            model.generate_batch(PROMPT.tolist(), **settings)
        with pytest.raises(RiverError, match="continuous batching"):
            model.generate(PROMPT, cache_implementation="paged")

    def test_are_refused_where_nobody_knows_their_name(self, model: PreTrainedModel) -> None:
        def in_pairs(model: PreTrainedModel, input_ids: Tensor, **settings: Any) -> None:
            cache = model(input_ids, use_cache=True).past_key_values
            model(input_ids[:, :2], past_key_values=cache)

        attach_river(model, CONFIG, policy=MIXED)
        with pytest.raises(RiverError, match="several tokens at once"):
            model.generate(PROMPT, custom_generate=in_pairs, max_new_tokens=1)
        detach_river(model)
        model.generate(PROMPT, custom_generate=in_pairs, max_new_tokens=1)


@pytest.mark.parametrize("policy", [*APART.values(), *ALIKE.values()], ids=[*APART, *ALIKE])
class TestModesThatDoNot:
    def test_a_prompt_in_parts_is_a_prompt(
        self, model: PreTrainedModel, policy: ExitPolicy
    ) -> None:
        if policy is APART["mean similarity"]:
            pytest.skip("the mean is of the tokens that are read together")
        attach_river(model, CONFIG, policy=policy)
        expected = answer(model)
        for size in (1, 5, 10):
            assert answer(model, prefill_chunk_size=size) == expected
        for rest in (1, 4):
            cache = DynamicCache()
            with torch.no_grad():
                model(PROMPT[:, :-rest], past_key_values=cache)
            assert answer(model, past_key_values=cache) == expected

    def test_a_second_prompt_that_guides_has_a_prompt_and_an_answer_of_its_own(
        self, model: PreTrainedModel, policy: ExitPolicy
    ) -> None:
        attach_river(model, CONFIG, policy=policy)
        negative = PROMPT[:, 3:7]
        expected: list[int] = []
        caches = DynamicCache(), DynamicCache()
        inputs = [PROMPT, negative]
        with torch.no_grad():
            for _ in range(10):
                pairs = zip(inputs, caches, strict=True)
                wanted, other = (
                    model(ids, past_key_values=cache).logits[0, -1].log_softmax(-1)
                    for ids, cache in pairs
                )
                expected.append(int((2 * (wanted - other) + other).argmax()))
                inputs = [torch.tensor([expected[-1:]])] * 2
        assert answer(model, guidance_scale=2, negative_prompt_ids=negative) == expected


COPIES: dict[str, Callable[[PreTrainedModel], object]] = {
    "a copy": copy.deepcopy,
    "a copy of a layer": lambda model: copy.deepcopy(model.model.layers[1]),
    "pickled": pickle.dumps,
    "saved whole": lambda model: torch.save(model, BytesIO()),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_of_a_model_with_a_river_are_refused(
    model: PreTrainedModel, make: Callable[[PreTrainedModel], object]
) -> None:
    engine = TorchEngine(attach_river(model, CONFIG, policy=MIXED))
    expected = answer(model)
    with pytest.raises(RiverError, match=r"can't be copied .* detach_river\(model\) first"):
        make(model)
    with pytest.raises(RiverError, match="can't be copied or pickled; load another one"):
        copy.copy(engine)
    assert answer(model) == expected
    detach_river(model)
    make(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("has_run", [False, True])
def test_forks_may_not_run_the_model(model: PreTrainedModel, has_run: bool) -> None:
    engine = TorchEngine(attach_river(model, CONFIG))
    sequence = engine.add_sequence()
    if has_run:
        answer(model)
    for call in (
        lambda: answer(model),
        lambda: model(PROMPT),
        lambda: engine.forward(Step([5], [sequence], torch.zeros(4), [0])),
    ):
        read, write = os.pipe()
        if os.fork() == 0:
            try:
                call()
            except BaseException as error:
                os.write(write, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            expected = "RiverError: this river belongs to the process that made it; make another"
            assert said.read().startswith(expected)
        os.wait()
    assert len(answer(model)) == 10
