"""A river on a model of `transformers`: the right weights, everywhere or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, REFUSED, VOCABULARY, fake_quantised, tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from river_llm import (
    ConfigError,
    ExitPolicy,
    River,
    RiverConfig,
    RiverError,
    RiverFileError,
    UnsupportedModelError,
    attach_river,
    detach_river,
)
from river_llm.river.attach import AttachedRiver

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

CONFIG = RiverConfig(group_size=32)
PROMPT = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, **ARCHITECTURES[architecture])


def logits_of(model: PreTrainedModel, tokens: Tensor, **settings: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, **settings).logits
    return logits


def greedy(model: PreTrainedModel) -> Tensor:
    generated: Tensor = model.generate(  # MPT's own config keeps no cache
        PROMPT, max_new_tokens=10, do_sample=False, use_cache=True
    )
    return generated


def median_thresholds(attached: AttachedRiver, tokens: Tensor) -> tuple[float, ...]:
    """For each layer a threshold in the widest gap between its middle similarities, so that some
    tokens leave there, some stay, and none is a matter of rounding."""
    attached.policy = ExitPolicy.never(prefill="token")
    attached.router.record_similarities = True
    logits_of(attached.model, tokens)
    attached.router.record_similarities = False
    assert attached.router.similarities is not None
    ordered = attached.router.similarities.flatten(1).double().sort(1).values  # [L, B * T]
    middle = ordered[:, ordered.shape[1] // 3 : -ordered.shape[1] // 3]
    gaps = middle.diff(dim=1)
    widest = gaps.argmax(1, keepdim=True)
    between = (middle.gather(1, widest) + gaps.gather(1, widest) / 2).flatten()
    return (math.inf, *between[:-1].tolist())


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """What every module holds: the names of its attributes, and how many hooks."""
    return {
        name: (
            sorted(set(module.__dict__) - {"_output_capturing_hooks_installed"}),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


@every_architecture
class TestEveryArchitecture:
    def test_never_leaving_is_the_untouched_model(self, model: PreTrainedModel) -> None:
        logits, tokens = logits_of(model, PROMPT), greedy(model)
        attach_river(model, CONFIG, policy=ExitPolicy.never())
        assert torch.equal(logits_of(model, PROMPT), logits)
        assert torch.equal(greedy(model), tokens)

    def test_leaving_at_once_is_the_fake_quantised_model(self, model: PreTrainedModel) -> None:
        river = River.build(model, CONFIG)
        quantised = fake_quantised(model, river)
        expected = logits_of(quantised, PROMPT)
        assert not torch.allclose(logits_of(model, PROMPT), expected, atol=1e-3)
        attach_river(model, river, policy=ExitPolicy.always())
        torch.testing.assert_close(logits_of(model, PROMPT), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(greedy(model), greedy(quantised))

    def test_a_fixed_exit_runs_the_rest_of_the_layers_quantised(
        self, model: PreTrainedModel
    ) -> None:
        river = River.build(model, CONFIG)
        half_quantised = fake_quantised(model, river, first_layer=2)
        first = torch.full((2, 1), 5)
        with torch.no_grad():
            cache = model(PROMPT, use_cache=True).past_key_values
            expected = logits_of(half_quantised, first, past_key_values=cache, use_cache=True)
            attached = attach_river(model, river, policy=ExitPolicy.fixed(2))
            cache = model(PROMPT, use_cache=True).past_key_values
        logits = logits_of(model, first, past_key_values=cache, use_cache=True)
        assert attached.last_exit_layers.tolist() == [[2], [2]]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    def test_a_text_in_one_pass_is_the_text_token_by_token(self, model: PreTrainedModel) -> None:
        attached = attach_river(model, CONFIG)
        thresholds = median_thresholds(attached, PROMPT)
        attached.policy = ExitPolicy.per_layer(thresholds, prefill="token")
        logits = logits_of(model, PROMPT)
        exit_layers = attached.last_exit_layers.clone()
        assert len(exit_layers.unique()) > 2
        cache = DynamicCache()
        attached.phase = "decode"
        for place in range(PROMPT.shape[1]):
            token = PROMPT[:, place : place + 1]
            step = logits_of(model, token, past_key_values=cache, use_cache=True)
            assert torch.equal(attached.last_exit_layers, exit_layers[:, place : place + 1])
            torch.testing.assert_close(step[:, 0], logits[:, place], rtol=1e-4, atol=1e-5)

    def test_the_model_is_itself_while_attached_and_after(self, model: PreTrainedModel) -> None:
        logits, before = logits_of(model, PROMPT), state_of(model)
        names = [name for name, _ in model.named_modules()]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        attach_river(model, CONFIG)
        assert [name for name, _ in model.named_modules()] == names
        assert list(model.state_dict()) == list(state)
        greedy(model)
        detach_river(model)
        assert state_of(model) == before
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(logits_of(model, PROMPT), logits)


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_is_no_plain_decoder_is_refused_by_name(architecture: str) -> None:
    settings, message = REFUSED[architecture]
    model = tiny_model(architecture, **settings)
    before = state_of(model)
    for refuse in (attach_river, River.build):
        with pytest.raises(UnsupportedModelError, match=message):
            refuse(model, CONFIG)
    assert state_of(model) == before


class TestAttaching:
    def test_takes_the_folder_of_a_saved_river(
        self, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        built = River.build(tiny_llama, RiverConfig(3, 32))
        built.save(tmp_path / "river")
        for folder in (tmp_path / "river", str(tmp_path / "river")):
            attached = attach_river(tiny_llama, folder, policy=ExitPolicy.always())
            assert attached.config == built.config
            detach_river(tiny_llama)
        with pytest.raises(RiverFileError, match=r"holds no river\.json"):
            attach_river(tiny_llama, str(tmp_path))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            *(({"river": x}, f"river is {x!r}; give the folder") for x in (True, 4, b"river")),
            ({"policy": "never"}, "policy is 'never'; give an ExitPolicy"),
            ({"policy": ExitPolicy.fixed(5)}, "exit layer is 5"),
        ],
    )
    def test_refuses_what_is_none_before_the_work(
        self,
        arguments: dict[str, Any],
        message: str,
        tiny_llama: PreTrainedModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = state_of(tiny_llama)
        monkeypatch.setattr(River, "build", lambda *args: pytest.fail("built for nothing"))
        with pytest.raises(ConfigError, match=message):
            attach_river(tiny_llama, **{"river": CONFIG, **arguments})
        assert state_of(tiny_llama) == before

    def test_refuses_a_river_of_other_weights(self, tiny_llama: PreTrainedModel) -> None:
        river, before = River.build(tiny_llama, CONFIG), state_of(tiny_llama)
        with torch.no_grad():
            tiny_llama.model.layers[2].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(RiverFileError, match="other weights"):
            attach_river(tiny_llama, river)
        assert state_of(tiny_llama) == before

    def test_twice_is_refused_and_after_detaching_works_again(
        self, tiny_llama: PreTrainedModel
    ) -> None:
        attach_river(tiny_llama, CONFIG)
        with pytest.raises(RiverError, match="has a river already"):
            attach_river(tiny_llama)
        detach_river(tiny_llama)
        detach_river(tiny_llama)
        assert attach_river(tiny_llama, CONFIG).model is tiny_llama

    @pytest.mark.parametrize("policy", [None, "never", ExitPolicy.fixed(99)])
    def test_keeps_its_policy_where_the_new_one_is_refused(
        self, tiny_llama: PreTrainedModel, policy: Any
    ) -> None:
        attached = attach_river(tiny_llama, CONFIG, policy=ExitPolicy.fixed(2))
        with pytest.raises(ConfigError, match=r"^(the )?exit policy"):
            attached.policy = policy
        assert attached.policy == ExitPolicy.fixed(2)

    def test_a_model_moved_to_another_dtype_says_what_to_do(
        self, tiny_llama: PreTrainedModel
    ) -> None:
        attach_river(tiny_llama, CONFIG, policy=ExitPolicy.always())
        tiny_llama.to(torch.bfloat16)
        with pytest.raises(RiverError, match="detach it, move the model, attach it again"):
            tiny_llama(PROMPT)

    @pytest.mark.parametrize("depth", [0, 2])
    def test_an_error_in_a_pass_leaves_a_usable_model(
        self, tiny_llama: PreTrainedModel, depth: int
    ) -> None:
        attach_river(tiny_llama, CONFIG, policy=ExitPolicy.similarity(0.5))
        expected = greedy(tiny_llama)
        layer = tiny_llama.model.layers[depth]
        handle = layer.register_forward_pre_hook(lambda module, args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            greedy(tiny_llama)
        handle.remove()
        assert torch.equal(greedy(tiny_llama), expected)

    def test_padding_has_no_say_in_the_batch_minimum(self) -> None:
        attached = attach_river(tiny_model("Llama"), CONFIG)
        mask = torch.ones_like(PROMPT)
        mask[1, :7] = 0
        for prefill in ("token", "sequence"):
            thresholds = median_thresholds(attached, PROMPT)
            exits = []
            for filler in (3, 90):
                tokens = PROMPT.where(mask.bool(), filler)
                attached.policy = ExitPolicy.per_layer(thresholds, prefill=prefill, batch="minimum")
                logits_of(attached.model, tokens, attention_mask=mask)
                exits.append(attached.last_exit_layers[mask.bool()])
            assert torch.equal(*exits)


def test_weights_are_saved_as_ever(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    expected = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    attach_river(tiny_llama, CONFIG)
    tiny_llama.save_pretrained(tmp_path)
    saved = type(tiny_llama).from_pretrained(tmp_path).state_dict()
    assert saved.keys() == expected.keys() == tiny_llama.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "a method of its own": lambda model: setattr(model, "generate", lambda *args: "mine"),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_detaching_gives_back_every_attribute(
    tiny_llama: PreTrainedModel, change: Callable[[PreTrainedModel], object]
) -> None:
    change(tiny_llama)
    before = dict(tiny_llama.__dict__)
    attach_river(tiny_llama, CONFIG)
    assert tiny_llama.__dict__.keys() != before.keys()
    detach_river(tiny_llama)
    assert tiny_llama.__dict__ == before
