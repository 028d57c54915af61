"""`generate()` of a model with a river: what it can't do is refused by name, the rest is exact."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lossless_lm import lm_on
from tiny_lm import sharpened, tiny_lm
from tiny_models import tiny_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from river_llm import ExitPolicy, RiverConfig, RiverError, attach_river, detach_river
from river_llm.engines import TorchEngine

CONFIG = RiverConfig(group_size=32)
PROMPT = torch.tensor([[5, 17, 3, 88, 42, 9, 5, 17, 3, 88, 42]])
APART = {
    "fixed": ExitPolicy.fixed(2),
    "similarity": ExitPolicy.similarity(0.8),
    "mean similarity": ExitPolicy.similarity(0.8, prefill="sequence"),
    "always, prompt in the backbone": ExitPolicy.always(prefill="backbone"),
}
ALIKE = {
    "never": ExitPolicy.never(),
    "always": ExitPolicy.always(),
    "fixed, all of a prompt": ExitPolicy.fixed(2, prefill="sequence"),
    "similarity, each token": ExitPolicy.similarity(0.8, prefill="token"),
}
MIXING: dict[str, Any] = {
    "assistant_model": None,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "use_cache": False,
}
every_mode = pytest.mark.parametrize("mode", MIXING)


@pytest.fixture
def model() -> PreTrainedModel:
    return sharpened(tiny_model("Llama"))


def setting_of(mode: str) -> dict[str, Any]:
    value = tiny_model("Llama", num_hidden_layers=1) if mode == "assistant_model" else MIXING[mode]
    return {mode: value}


def answer(model: PreTrainedModel, **settings: Any) -> list[int]:
    inputs = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False, "max_new_tokens": 10}
    tokens: Tensor = model.generate(PROMPT, **{**inputs, **settings})
    return tokens[0, PROMPT.shape[1] :].tolist()


class TestModesThatMixPromptAndAnswer:
    @every_mode
    @pytest.mark.parametrize("policy", APART.values(), ids=APART)
    def test_are_refused_by_name(
        self, model: PreTrainedModel, mode: str, policy: ExitPolicy
    ) -> None:
        attach_river(model, CONFIG, policy=policy)
        expected = answer(model)
        with pytest.raises(RiverError, match=rf"^generate\({mode}=.*detach_river") as caught:
            answer(model, **setting_of(mode))
        assert "\n" not in str(caught.value)
        assert answer(model) == expected

    @every_mode
    @pytest.mark.parametrize("policy", ALIKE.values(), ids=ALIKE)
    def test_are_exact_where_prompt_and_answer_leave_alike(
        self, model: PreTrainedModel, mode: str, policy: ExitPolicy
    ) -> None:
        attach_river(model, CONFIG, policy=policy)
        expected = answer(model)
        assert answer(model, **setting_of(mode)) == expected

    @pytest.mark.parametrize("own", [False, True], ids=["given", "the model's"])
    @pytest.mark.parametrize("mode", ["prompt_lookup_num_tokens", "use_cache"])
    def test_are_refused_from_a_generation_config(
        self, model: PreTrainedModel, mode: str, own: bool
    ) -> None:
        config = GenerationConfig(**setting_of(mode))
        attach_river(model, CONFIG, policy=APART["fixed"])
        if own:
            model.generation_config = config
        with pytest.raises(RiverError, match=rf"^generate\({mode}="):
            model.generate(PROMPT, None if own else config)

    def test_are_refused_where_sequences_share_their_passes(self, model: PreTrainedModel) -> None:
        settings = {"generation_config": GenerationConfig(max_new_tokens=2, eos_token_id=-1)}
        attach_river(model, CONFIG, policy=APART["fixed"])
        with pytest.raises(RiverError, match="continuous batching"):
            model.generate_batch(PROMPT.tolist(), **settings)
        with pytest.raises(RiverError, match="continuous batching"):
            model.generate(PROMPT, cache_implementation="paged")

    def test_are_refused_where_nobody_knows_their_name(self, model: PreTrainedModel) -> None:
        def in_pairs(model: PreTrainedModel, input_ids: Tensor, **settings: Any) -> None:
            cache = model(input_ids, use_cache=True).past_key_values
            model(input_ids[:, :2], past_key_values=cache)

        attach_river(model, CONFIG, policy=APART["fixed"])
        with pytest.raises(RiverError, match="several tokens at once"):
            model.generate(PROMPT, custom_generate=in_pairs, max_new_tokens=1)
        detach_river(model)
        model.generate(PROMPT, custom_generate=in_pairs, max_new_tokens=1)


@pytest.mark.parametrize("policy", [*APART.values(), *ALIKE.values()], ids=[*APART, *ALIKE])
class TestModesThatDoNot:
    @pytest.mark.parametrize("size", [1, 5, 10])
    def test_a_prompt_in_parts_is_a_prompt(
        self, model: PreTrainedModel, policy: ExitPolicy, size: int
    ) -> None:
        if policy is APART["mean similarity"]:
            pytest.skip("the mean is of the tokens that are read together")
        attach_river(model, CONFIG, policy=policy)
        expected = answer(model)
        assert answer(model, prefill_chunk_size=size) == expected

    @pytest.mark.parametrize("rest", [1, 4])
    def test_the_rest_of_a_prompt_is_a_prompt(
        self, model: PreTrainedModel, policy: ExitPolicy, rest: int
    ) -> None:
        if policy is APART["mean similarity"]:
            pytest.skip("the mean is of the tokens that are read together")
        attach_river(model, CONFIG, policy=policy)
        expected = answer(model)
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


def test_threads_take_turns(model: PreTrainedModel) -> None:
    attach_river(model, CONFIG, policy=APART["similarity"])
    prompts = [PROMPT, PROMPT[:, 3:], PROMPT[:, :4]]

    def answer_of(prompt: Tensor) -> list[int]:
        settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        tokens: list[int] = model.generate(prompt, max_new_tokens=20, **settings)[0].tolist()
        return tokens

    alone = [answer_of(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer_of, prompts * 3)) == alone * 3


class TestDetaching:
    @pytest.mark.parametrize("own", [False, True])
    def test_gives_back_every_attribute(self, model: PreTrainedModel, own: bool) -> None:
        if own:
            model.generate = lambda *args, **kwargs: "mine"
        before = dict(model.__dict__)
        attach_river(model, CONFIG)
        assert model.__dict__.keys() != before.keys()
        detach_river(model)
        assert model.__dict__ == before
        assert not own or model.generate(PROMPT) == "mine"


COPIES: dict[str, Callable[[PreTrainedModel], object]] = {
    "a copy": copy.deepcopy,
    "a copy of the decoder": lambda model: copy.deepcopy(model.model),
    "a copy of a layer": lambda model: copy.deepcopy(model.model.layers[1]),
    "a copy of its mlp": lambda model: copy.deepcopy(model.model.layers[1].mlp),
    "pickled": pickle.dumps,
    "saved whole": lambda model: torch.save(model, BytesIO()),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
class TestCopies:
    def test_of_a_model_with_a_river_are_refused(
        self, model: PreTrainedModel, make: Callable[[PreTrainedModel], object]
    ) -> None:
        attach_river(model, CONFIG, policy=APART["fixed"])
        expected = answer(model)
        with pytest.raises(RiverError, match=r"can't be copied .* detach_river\(model\) first"):
            make(model)
        assert answer(model) == expected
        detach_river(model)
        make(model)


@pytest.mark.parametrize("kind", ["torch", "cpu"])
@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_an_engine_is_not_copied(kind: str, make: Callable[[object], object]) -> None:
    lm = lm_on(kind)
    for one in (lm, lm.engine):
        with pytest.raises(RiverError, match="can't be copied or pickled; load another one"):
            make(one)


def test_weights_are_saved_as_ever(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    attach_river(model, CONFIG)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())


def in_a_fork(call: Callable[[], object]) -> str:
    """The error of a call in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call()
            os.write(write, b"no error")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as opened:
        said = opened.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("has_run", [False, True])
class TestForks:
    def test_may_not_run_the_model(self, model: PreTrainedModel, has_run: bool) -> None:
        attach_river(model, CONFIG)
        if has_run:
            answer(model)
        message = "RiverError: this river belongs to the process that made it"
        for call in (lambda: answer(model), lambda: model(PROMPT)):
            assert in_a_fork(call).startswith(message)
        assert len(answer(model)) == 10

    def test_may_not_run_an_engine(self, model: PreTrainedModel, has_run: bool) -> None:
        engine = TorchEngine(attach_river(model, CONFIG, policy=APART["fixed"]))
        if has_run:
            engine.prefill(PROMPT)
        message = "RiverError: this engine belongs to the process that made it; make another one"
        for call in (
            lambda: engine.prefill(PROMPT),
            lambda: engine.decode(PROMPT[0, :1]),
            lambda: engine.score(PROMPT),
        ):
            assert in_a_fork(call).startswith(message)

    def test_may_not_answer(self, model: PreTrainedModel, has_run: bool) -> None:
        model = sharpened(tiny_model("Llama", intermediate_size=128))
        lm = tiny_lm(model)
        if has_run:
            lm.generate("y", raw=True)
        message = "RiverError: this engine belongs to the process that made it; make another one"
        with lm._turn:  # as a thread that is lost to the fork
            assert in_a_fork(lambda: lm.generate("y", raw=True)).startswith(message)
            stream = lm.stream("y", raw=True) if has_run else None
        assert stream is None or in_a_fork(lambda: next(iter(stream))).startswith(message)
