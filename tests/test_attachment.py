"""A model with its river under the `generate()` of `transformers`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import sharpened
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from river_llm import (
    ConfigError,
    ExitPolicy,
    River,
    RiverConfig,
    RiverError,
    RiverFileError,
    attach_river,
    detach_river,
)
from river_llm.attachment import AttachedRiver

CONFIG = RiverConfig(group_size=32)
PROMPT = torch.tensor([[5, 17, 3, 88, 42, 9]])


@pytest.fixture
def attached(tiny_llama: PreTrainedModel) -> AttachedRiver:
    """A policy under which tokens leave at every depth."""
    attached = attach_river(tiny_llama, CONFIG)
    attached.policy = ExitPolicy.never(prefill="token")
    attached.router.record_similarities = True
    tokens = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    tiny_llama(tokens)
    assert attached.router.similarities is not None
    medians = attached.router.similarities.flatten(1).quantile(0.6, dim=1)
    attached.router.record_similarities = False
    attached.policy = ExitPolicy.per_layer((math.inf, *medians[:-1].tolist()))
    attached.clear_counts()
    return attached


class TestAttach:
    def test_takes_the_folder_of_a_saved_river(
        self, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        built = River.build(tiny_llama, RiverConfig(3, 32))
        built.save(tmp_path)
        for folder in (tmp_path, str(tmp_path)):
            attached = attach_river(tiny_llama, folder, policy=ExitPolicy.always())
            assert attached.config == built.config
            detach_river(tiny_llama)

    def test_refuses_a_folder_without_one(
        self, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        with pytest.raises(RiverFileError, match=r"holds no river\.json"):
            attach_river(tiny_llama, str(tmp_path))

    @pytest.mark.parametrize("river", [True, False, 4, b"river"])
    def test_refuses_what_is_no_river(self, tiny_llama: PreTrainedModel, river: Any) -> None:
        with pytest.raises(ConfigError, match=f"river is {river!r}; give the folder of one"):
            attach_river(tiny_llama, river)

    def test_refuses_what_is_no_policy(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(ConfigError, match="policy is 'never'; give an ExitPolicy"):
            attach_river(tiny_llama, CONFIG, policy="never")  # type: ignore[arg-type]


class TestPolicy:
    @pytest.mark.parametrize("policy", [None, "never"])
    def test_stays_where_the_new_one_is_none(self, attached: AttachedRiver, policy: Any) -> None:
        before = attached.policy
        with pytest.raises(ConfigError, match=r"exit policy is .*; give an ExitPolicy"):
            attached.policy = policy
        assert attached.policy == before


class TestGenerate:
    def test_is_a_loop_of_single_steps(self, attached: AttachedRiver) -> None:
        tokens = _generate(attached, PROMPT, max_new_tokens=12)
        with torch.no_grad():
            step = attached.model(PROMPT, use_cache=True)
            for token in tokens[0, PROMPT.shape[1] :]:
                assert int(step.logits[0, -1].argmax()) == int(token)
                step = attached.model(
                    token.view(1, 1), past_key_values=step.past_key_values, use_cache=True
                )

    def test_takes_every_depth(self, attached: AttachedRiver) -> None:
        _generate(attached, PROMPT.repeat(3, 1) + torch.arange(3).unsqueeze(1), max_new_tokens=30)
        assert int(attached.exit_counts.sum()) == 3 * 29
        assert (attached.exit_counts > 0).tolist() == [False, True, True, True, True]
        layers = torch.arange(5)
        expected = float((attached.exit_counts * layers).sum() / (3 * 29))
        assert attached.mean_exit_layer == pytest.approx(expected)

    def test_samples_the_same_with_the_same_seed(self, attached: AttachedRiver) -> None:
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(_generate(attached, PROMPT, do_sample=True, max_new_tokens=20))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_searches_beams(self, attached: AttachedRiver) -> None:
        beams = _generate(attached, PROMPT, num_beams=3, num_return_sequences=3, max_new_tokens=8)
        greedy = _generate(attached, PROMPT, max_new_tokens=8)
        attached.policy = ExitPolicy.never()
        scores = [_log_likelihood(attached.model, row) for row in beams]
        assert beams.shape == (3, 14)
        assert len({tuple(row.tolist()) for row in beams}) == 3
        assert max(scores) >= _log_likelihood(attached.model, greedy[0]) - 0.1

    def test_feeds_a_streamer(self, attached: AttachedRiver) -> None:
        streamed: list[int] = []

        class Collect(BaseStreamer):
            def put(self, value: Tensor) -> None:
                streamed.extend(value.flatten().tolist())

            def end(self) -> None:
                streamed.append(-1)

        tokens = _generate(attached, PROMPT, streamer=Collect(), max_new_tokens=6)
        assert streamed == [*tokens[0].tolist(), -1]

    def test_obeys_stopping_criteria(self, attached: AttachedRiver) -> None:
        class Eight(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)

        criteria = StoppingCriteriaList([Eight()])
        tokens = _generate(attached, PROMPT, stopping_criteria=criteria, max_new_tokens=30)
        assert tokens.shape[1] == 8

    def test_returns_scores_hidden_states_and_attentions_of_every_layer(
        self, attached: AttachedRiver
    ) -> None:
        attached.model.set_attn_implementation("eager")
        output = attached.model.generate(
            PROMPT,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        assert len(output.scores) == 5
        assert all(len(step) == 5 for step in output.hidden_states)
        assert all(len(step) == 4 for step in output.attentions)
        last = attached.model.lm_head(output.hidden_states[-1][-1])[0, -1]
        torch.testing.assert_close(last, output.scores[-1][0])

    def test_is_the_same_with_a_static_cache(self, attached: AttachedRiver) -> None:
        expected = _generate(attached, PROMPT, max_new_tokens=20)
        counts = attached.exit_counts.clone()
        attached.clear_counts()
        static = _generate(attached, PROMPT, max_new_tokens=20, cache_implementation="static")
        assert torch.equal(static, expected)
        assert torch.equal(attached.exit_counts, counts)

    @pytest.mark.parametrize("rules", [{"batch": "minimum"}, {"prefill": "sequence"}], ids=str)
    def test_is_the_same_with_a_static_cache_and_masks_by_layer(
        self, rules: dict[str, Any]
    ) -> None:
        """Where layers differ in their masks, the decoder gets a dict of them."""
        model = sharpened(tiny_model("Qwen2"))
        policy = ExitPolicy.similarity(0.8, **rules)
        attached = attach_river(model, RiverConfig(group_size=32), policy=policy)
        expected = _generate(attached, PROMPT, max_new_tokens=12)
        static = _generate(attached, PROMPT, max_new_tokens=12, cache_implementation="static")
        assert torch.equal(static, expected)


class TestBatch:
    def test_a_padded_row_is_the_row_alone(self, attached: AttachedRiver) -> None:
        rows = [[5, 17, 3, 88, 42, 9], [7, 8], [60, 61, 62, 63]]
        batch = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])
        together = _generate(attached, batch, attention_mask=mask, max_new_tokens=16)[:, 6:]
        assert int((attached.exit_counts > 0).sum()) > 1
        for row, generated in zip(rows, together, strict=True):
            alone = _generate(attached, torch.tensor([row]), max_new_tokens=16)
            assert torch.equal(alone[0, len(row) :], generated)

    def test_by_the_minimum_all_rows_leave_together(self, attached: AttachedRiver) -> None:
        prompts = PROMPT.repeat(3, 1) + torch.arange(3).unsqueeze(1)
        depths: dict[str, list[Tensor]] = {"sequence": [], "minimum": []}
        thresholds = attached.policy.layer_thresholds
        assert thresholds is not None
        for rule, steps in depths.items():
            attached.policy = ExitPolicy.per_layer(thresholds, batch=rule)
            cache = attached.model(prompts, use_cache=True).past_key_values
            for token in range(10, 30):
                tokens = torch.tensor([[token], [token + 1], [token + 2]])
                attached.model(tokens, past_key_values=cache, use_cache=True)
                steps.append(attached.last_exit_layers[:, 0])
        assert any(len(step.unique()) > 1 for step in depths["sequence"])
        assert all(len(step.unique()) == 1 for step in depths["minimum"])
        first_alone, first_together = depths["sequence"][0], depths["minimum"][0]
        assert int(first_together[0]) >= int(first_alone.max())


class TestAttaching:
    def test_twice_is_refused(self, attached: AttachedRiver) -> None:
        with pytest.raises(RiverError, match="has a river already"):
            attach_river(attached.model)

    def test_after_detaching_works_again(self, attached: AttachedRiver) -> None:
        detach_river(attached.model)
        detach_river(attached.model)
        assert attach_river(attached.model, CONFIG).model is attached.model

    def test_refuses_a_policy_before_the_work_and_leaves_the_model_alone(
        self, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(River, "build", lambda *args: pytest.fail("built for nothing"))
        with pytest.raises(ConfigError, match="exit layer is 5"):
            attach_river(tiny_llama, CONFIG, policy=ExitPolicy.fixed(5))
        assert _untouched(tiny_llama)

    def test_refuses_a_river_of_other_weights_and_leaves_the_model_alone(
        self, tiny_llama: PreTrainedModel
    ) -> None:
        river = River.build(tiny_llama, CONFIG)
        with torch.no_grad():
            tiny_llama.model.layers[2].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(RiverFileError, match="other weights"):
            attach_river(tiny_llama, river)
        assert _untouched(tiny_llama)

    def test_refuses_a_new_policy_and_keeps_the_old(self, attached: AttachedRiver) -> None:
        policy = attached.policy
        with pytest.raises(ConfigError):
            attached.policy = ExitPolicy.fixed(99)
        assert attached.policy is policy
        _generate(attached, PROMPT, max_new_tokens=3)

    def test_a_model_moved_to_another_dtype_says_what_to_do(self, attached: AttachedRiver) -> None:
        attached.policy = ExitPolicy.always()
        attached.model.to(torch.bfloat16)
        with pytest.raises(RiverError, match="detach it, move the model, attach it again"):
            attached.model(PROMPT)

    @pytest.mark.parametrize("depth", [0, 2])
    def test_an_error_in_a_pass_leaves_a_usable_model(
        self, attached: AttachedRiver, depth: int
    ) -> None:
        expected = _generate(attached, PROMPT, max_new_tokens=8)
        with _failing(attached.model.model.layers[depth]), pytest.raises(ZeroDivisionError):
            _generate(attached, PROMPT, max_new_tokens=8)
        assert torch.equal(_generate(attached, PROMPT, max_new_tokens=8), expected)


def _generate(attached: AttachedRiver, tokens: Tensor, **settings: Any) -> Tensor:
    generated: Tensor = attached.model.generate(tokens, **{"do_sample": False, **settings})
    return generated


def _log_likelihood(model: PreTrainedModel, tokens: Tensor) -> float:
    """Of what follows `PROMPT`."""
    with torch.no_grad():
        log_probabilities = model(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
    chosen = log_probabilities.gather(1, tokens[1:].unsqueeze(1))
    return float(chosen[PROMPT.shape[1] - 1 :].sum())


def _untouched(model: PreTrainedModel) -> bool:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks == 0 and not any("forward" in m.__dict__ for m in model.modules())


@contextmanager
def _failing(layer: nn.Module) -> Iterator[None]:
    """While it lasts, a layer raises ZeroDivisionError."""
    handle = layer.register_forward_pre_hook(lambda module, args: 1 // 0)
    try:
        yield
    finally:
        handle.remove()
