"""A strategy's engine and the model it runs on: what it refuses, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategy_models import WITH_EXITS, check_close, engine_on, follow, model_of, tokens
from tiny_models import REFUSED, tiny_model
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from river_llm import (
    ConfigError,
    ExitPolicy,
    PromptCacheError,
    RiverConfig,
    RiverError,
    UnsupportedModelError,
    attach_river,
    detach_river,
)
from river_llm.config import Strategy
from river_llm.engines import DraftRule
from river_llm.residency import OffloadStatistics
from river_llm.strategies import STRATEGIES, make_strategy_engine

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
CONFIG = RiverConfig(group_size=32, quantizer="rtn")


class TestModel:
    @every_strategy
    def test_is_what_it_was_once_detached(self, strategy: Strategy) -> None:
        model, text = tiny_model("Llama"), tokens(1, 12, seed=1)
        before = _attributes(model)
        with engine_on(model, strategy) as engine:
            follow(engine, text, 6)
        assert _attributes(model) == before
        engine = make_strategy_engine(model, strategy)
        detach_river(model)
        assert _attributes(model) == before

    @every_strategy
    def test_runs_passes_of_others_meanwhile(self, strategy: Strategy) -> None:
        model, text = tiny_model("GPT2"), tokens(1, 12, seed=2)
        expected = model.generate(text, max_new_tokens=6, do_sample=False)
        policy = ExitPolicy.never() if strategy == "none" else ExitPolicy.fixed(1)
        with engine_on(model, strategy, policy) as engine:
            first = follow(engine, text, 6)[-1]
            assert torch.equal(model.generate(text, max_new_tokens=6, do_sample=False), expected)
            engine.truncate(11)
            check_close(engine.decode(text[:, 11]).logits, first.logits)

    def test_takes_one_thing_at_a_time(self) -> None:
        model = tiny_model("Llama")
        with engine_on(model, "mask"):
            with pytest.raises(RiverError, match="has a river or an exit strategy already"):
                make_strategy_engine(model, "mask")
            with pytest.raises(RiverError, match="call detach_river"):
                attach_river(model, CONFIG)
        attached = attach_river(model, CONFIG)
        with pytest.raises(RiverError, match="has a river or an exit strategy already"):
            make_strategy_engine(model, "none")
        attached.detach()
        make_strategy_engine(model, "none").detach()

    @pytest.mark.parametrize("architecture", REFUSED)
    def test_is_refused_by_name_where_it_is_no_plain_decoder(self, architecture: str) -> None:
        settings, message = REFUSED[architecture]
        model = tiny_model(architecture, **settings)
        with pytest.raises(UnsupportedModelError, match=message):
            make_strategy_engine(model, "recompute")
        assert _untouched(model)

    def test_is_refused_where_a_token_depends_on_its_batch(self) -> None:
        model = tiny_model("Llama")
        layer = model.model.layers[0]
        layer.mlp.register_forward_hook(lambda module, args, output: output + output.mean((0, 1)))
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: its layers make some"):
            make_strategy_engine(model, "recompute")
        assert _untouched(model)

    def test_is_refused_by_the_mask_alone_where_attention_takes_none(self) -> None:
        """As kernels do that align the causal mask at the last key themselves."""

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
            queries, keys = query.shape[2], key.shape[2]
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            return sdpa_attention_forward(module, query, key, value, mask)

        AttentionInterface.register("maskless", attention)
        model = tiny_model("Llama", attn_implementation="maskless")
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM gives its layers no att"):
            make_strategy_engine(model, "mask")
        assert _untouched(model)
        make_strategy_engine(model, "none").detach()


class TestPolicy:
    @pytest.mark.parametrize("strategy", WITH_EXITS)
    @pytest.mark.parametrize("prefill", ["river", "sequence"])
    def test_prompts_do_not_leave_as_a_whole(self, strategy: Strategy, prefill: str) -> None:
        policy = ExitPolicy.fixed(2, prefill=prefill)
        model = tiny_model("Llama")
        with pytest.raises(ConfigError, match=f"{strategy} runs prompts through the whole backb"):
            make_strategy_engine(model, strategy, policy)
        assert _untouched(model)
        with engine_on(model, strategy, ExitPolicy.fixed(1)) as engine:
            with pytest.raises(ConfigError, match=f"the prefill rule {prefill} is not for it"):
                engine.policy = policy
            assert engine.policy == ExitPolicy.fixed(1)

    def test_without_exits_there_is_none(self) -> None:
        with pytest.raises(ConfigError, match="goes with no exit policy but never"):
            make_strategy_engine(model_of("Llama"), "none", ExitPolicy.fixed(2))
        with engine_on(model_of("Llama"), "none") as engine:
            assert engine.policy == ExitPolicy.never()
            with pytest.raises(ConfigError, match="leave the policy out"):
                engine.policy = ExitPolicy.similarity(0.5)

    def test_names_no_more_layers_than_there_are(self) -> None:
        model = tiny_model("Llama")
        with pytest.raises(ConfigError, match="the exit layer is 5"):
            make_strategy_engine(model, "mask", ExitPolicy.fixed(5))
        assert _untouched(model)
        with engine_on(model, "mask") as engine, pytest.raises(ConfigError, match="layer is 5"):
            engine.policy = ExitPolicy.fixed(5)


@every_strategy
def test_refuses_what_needs_a_river(strategy: Strategy) -> None:
    with engine_on(model_of("Llama"), strategy) as engine:
        engine.prefill(tokens(1, 4, seed=3))
        for verb in (
            lambda: engine.verify(tokens(1, 2, seed=4)),
            lambda: engine.prepare_drafts(16),
            lambda: engine.draft([3], [2], DraftRule()),
        ):
            with pytest.raises(ConfigError, match=f"the strategy {strategy} has no river, so noth"):
                verb()
        with pytest.raises(ConfigError, match=f"{strategy} has no river to leave for, so all of"):
            engine.keep_layers(2)
        with pytest.raises(ConfigError, match="offloading goes with the strategy river"):
            engine.depth_limit = 2
        engine.depth_limit = None
        for verb in (
            lambda: engine.cache_identity([1, 2]),
            lambda: engine.read_cache(2),
            lambda: engine.write_cache({}, 2),
        ):
            with pytest.raises(PromptCacheError, match=f"strategy {strategy} keeps no prompt cach"):
                verb()
        assert engine.length == 4
        assert engine.resident_layers == engine.num_layers
        assert engine.offload_statistics == OffloadStatistics(4)


def test_counts_its_weights() -> None:
    model = model_of("Llama")
    with engine_on(model, "mask") as engine:
        linears = [
            sum(
                module.weight.nbytes
                for module in layer.modules()
                if isinstance(module, torch.nn.Linear)
            )
            for layer in model.model.layers
        ]
        assert list(engine.layer_bytes) == linears
        assert sum(linears) + engine.rest_bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("strategy", ["river", "quantised", "hope"])
def test_only_strategies_without_a_river_have_such_an_engine(strategy: Any) -> None:
    with pytest.raises(ConfigError, match="is none of mask, recompute, propagate, monotonic, none"):
        make_strategy_engine(model_of("Llama"), strategy)


def test_says_what_its_speed_depends_on() -> None:
    with engine_on(model_of("Llama"), "mask") as engine:
        assert engine.setting == f"torch cpu float32, {torch.get_num_threads()} threads"
        assert (engine.name, engine.strategy, engine.num_layers) == ("torch", "mask", 4)
        assert engine.context_length == 128
        assert engine.device == torch.device("cpu")


def _attributes(model: PreTrainedModel) -> dict[str, object]:
    """What every module holds: the names of its attributes, and how many hooks."""
    return {
        name: (sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def _untouched(model: PreTrainedModel) -> bool:
    return not hasattr(model, "_river_attachment") and not any(
        "forward" in module.__dict__ for module in model.modules()
    )
