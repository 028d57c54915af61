"""The paper's tables as data, the arithmetic of memory, and what counts as a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_model
from transformers import LlamaConfig

from river_llm import ConfigError, DataError, River, RiverConfig
from river_llm.evaluation.math_answer import MathVerifier
from river_llm.evaluation.tasks import TASKS as OURS
from river_llm.evaluation.tasks.math_examples import MATH_EXAMPLES
from river_llm.evaluation.tasks.task import GenerationTask
from river_llm.load.model import empty_model
from river_llm.reproduction.availability import runnable
from river_llm.reproduction.comparison import verdict
from river_llm.reproduction.memory import ModelSizes
from river_llm.reproduction.paper import MODELS, TASKS, find_model, find_tasks

GIB = 1 << 30
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


class TestPaper:
    def test_its_tasks_are_ours(self) -> None:
        for task in TASKS:
            assert OURS[task.name] is not None
        for model in MODELS:
            assert set(model.figures) <= {task.name for task in TASKS}

    def test_its_speed_up_is_that_of_its_speeds(self) -> None:
        figures = MODELS[0].figures["gsm8k"]
        speeds = figures.river.tokens_per_second, figures.backbone.tokens_per_second
        assert None not in speeds
        assert speeds[0] / speeds[1] == pytest.approx(figures.river.speed_up, abs=0.01)

    def test_figures_stand_beside_the_thresholds_that_they_may_be_of(self) -> None:
        llama, phi = find_model("llama-3.1-8b-instruct"), find_model("phi-4-mini")
        assert [llama.may_be_of(tau) for tau in (0.5, 0.7)] == [True, False]
        assert [phi.may_be_of(tau) for tau in (0.7, 0.8, 0.85, 0.9)] == [False, True, True, True]

    @pytest.mark.parametrize(
        "name",
        ["ministral-3-8b", "Ministral-3-8B", "mistralai/Ministral-3-8B-Instruct-2512-BF16"],
    )
    def test_a_model_is_found_by_its_names(self, name: str) -> None:
        assert find_model(name).num_layers == 34

    def test_a_model_that_it_lacks_is_told_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match=r"did you mean llama-3\.2-1b-instruct"):
            find_model("llama-3.2-1b")
        with pytest.raises(ConfigError, match=r"it has llama.*ministral-3-8b; --model runs"):
            find_model("smollm2")

    def test_a_task_that_it_lacks_is_told_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="no task 'gsm8'; did you mean gsm8k"):
            find_tasks(["gsm8"])
        with pytest.raises(ConfigError, match="no task 'blimp'; it has gsm8k, math500"):
            find_tasks(["blimp"])
        with pytest.raises(ConfigError, match="named twice"):
            find_tasks(["mmlu", "mmlu"])
        assert [task.name for task in find_tasks(["mmlu", "gsm8k"])] == ["mmlu", "gsm8k"]


class TestMemory:
    def test_is_that_of_the_tensors(self) -> None:
        model = tiny_model("Llama")
        river = River.build(model, RiverConfig(4, 32))
        sizes = ModelSizes.of(model, river.config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cache = 4 * 2 * 2 * 16 * 10 * 2  # layers, K and V, key heads, head dim, tokens, bytes
        assert sizes.held(10, 4, with_river=False) == 2 * parameters + cache
        assert sizes.held(10, 4) == 2 * parameters + river.num_bytes + cache
        assert sizes.held(10, 4) - sizes.held(10, 1) == 3 * sizes.backbone_layer
        assert sizes.context_length == 128

    def test_a_window_bounds_the_cache(self) -> None:
        model = tiny_model("Mistral", sliding_window=8)
        sizes = ModelSizes.of(model, RiverConfig(4, 32))
        assert sizes.held(8, 0) == sizes.held(100, 0) > sizes.held(7, 0)

    def test_of_the_backbone_is_the_papers_where_its_gb_are_gib(self) -> None:
        sizes = sizes_of(LLAMA_8B)
        memory = find_model("llama-3.1-8b-instruct").memory
        assert memory is not None
        found = sizes.held(65_536, 32, with_river=False) / GIB
        assert found == pytest.approx(memory.backbone, abs=0.005)

    def test_of_the_papers_other_arms_comes_out_with_two_heads(self) -> None:
        sizes = sizes_of(LLAMA_8B)
        memory = find_model("llama-3.1-8b-instruct").memory
        assert memory is not None
        head = 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
        exits = sizes.num_layers * sizes.backbone_layer // 4  # without scales and zeros
        bare = sizes.held(65_536, 0, with_river=False) + exits
        assert (bare - head * 3 // 4) / GIB == pytest.approx(memory.full, abs=0.005)
        assert (bare + 3.75 * sizes.backbone_layer) / GIB == pytest.approx(
            memory.offloaded, abs=0.005
        )
        assert sizes.held(65_536, 0) / GIB == pytest.approx(13.61, abs=0.005)  # with scales
        assert f"{bare / GIB:.2f} and 3.75 backbone layers of " in memory.reading
        assert f"layers of {sizes.backbone_layer / GIB:.2f}." in memory.reading

    def test_that_a_token_reads_is_the_backbone_without_a_lone_embedding(self) -> None:
        embedding = 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
        for config, name, idle, share in (
            (LLAMA_1B, "llama-3.2-1b-instruct", 0, 0.30),
            (LLAMA_8B, "llama-3.1-8b-instruct", embedding, 0.55),
        ):
            sizes, model = sizes_of(config), find_model(name)
            read = sizes.held(0, sizes.num_layers, with_river=False) - idle
            assert model.read_gb == pytest.approx(read / 1e9, abs=0.005)
            assert model.bandwidth_share == pytest.approx(share, abs=0.005)
        assert find_model("phi-4-mini").bandwidth_share is None


def sizes_of(config: LlamaConfig) -> ModelSizes:
    return ModelSizes.of(empty_model(config, "a Llama"), RiverConfig())


@pytest.mark.parametrize(
    ("paper", "expected"),
    [(0.50, "within"), (0.40, "within"), (0.35, "higher"), (0.65, "lower"), (None, None)],
)
def test_a_difference_is_one_beyond_the_interval(paper: float | None, expected: str) -> None:
    assert verdict(0.4, 0.6, paper, 0.0005) == expected


def test_a_difference_within_the_papers_rounding_is_none() -> None:
    assert verdict(0.4, 0.6, 0.3996, 0.0005) == "within"


class TestAvailability:
    def test_what_is_missing_is_left_out_unless_it_was_named(self, tmp_path: Path) -> None:
        boolq = '{"passage": "a", "question": "b", "answer": true}\n'
        (tmp_path / "boolq_dev.jsonl").write_text(boolq)
        can, left_out = runnable(list(TASKS), tmp_path, False, are_named=False)
        assert [task.name for task in can] == ["boolq"]
        assert left_out.keys() == {task.name for task in TASKS} - {"boolq"}
        assert "has no file gsm8k_test*.jsonl" in left_out["gsm8k"]
        assert left_out["humaneval"].startswith("it runs programs that the model wrote")
        with pytest.raises(DataError, match=r"mmlu: .* has no file mmlu_test"):
            runnable(find_tasks(["boolq", "mmlu"]), tmp_path, False, are_named=True)

    def test_a_task_that_may_not_run_programs_stops_no_other(self, tmp_path: Path) -> None:
        (tmp_path / "boolq_dev.jsonl").write_text('{"answer": true}\n')
        tasks = find_tasks(["humaneval", "boolq"])
        can, left_out = runnable(tasks, tmp_path, False, are_named=True)
        assert ([task.name for task in can], list(left_out)) == (["boolq"], ["humaneval"])
        with pytest.raises(ConfigError, match="--allow-code-execution"):
            runnable(tasks[:1], tmp_path, False, are_named=True)


class TestMathExamples:
    def test_end_in_their_answers(self) -> None:
        assert len(MATH_EXAMPLES) == 4
        for example in MATH_EXAMPLES:
            assert example.text("solution").endswith(f"\\boxed{{{example.text('answer')}}}$.")

    def test_are_right_to_the_scorer(self) -> None:
        pytest.importorskip("math_verify")
        verifier = MathVerifier()
        answers = [24, 78, "1/9", "36/5"]
        for example, answer in zip(MATH_EXAMPLES, answers, strict=True):
            assert verifier.is_right(example.text("solution"), str(answer))

    def test_are_the_tasks(self) -> None:
        task = OURS["math500"]
        assert isinstance(task, GenerationTask)
        assert task.solution is not None
        assert task.solution(MATH_EXAMPLES[0]).startswith(" Subtracting")
        assert task.shots == 0  # `river-llm eval` asks as before
