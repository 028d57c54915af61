"""River-LLM as a model of lm-eval: beside lm-eval's own `hf` model, on tasks over local data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command_line import run
from stored_models import save_model, save_river
from tiny_lm import END, character_tokenizer, tiny_lm

from river_llm import ConfigError, DataError, RiverConfig
from river_llm.config import SamplingConfig

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from river_llm.measure.lm_eval_model import RiverEvalLM, sampling_config  # noqa: E402

CONTEXT = 64
QUESTIONS = [
    {"question": "The river", "choices": [" runs", " stands still", "!"], "label": 0},
    {"question": "Q: 1+1? A:", "choices": [" 2", " 3", " 44"], "label": 0},
    {"question": "The river", "choices": [" sea", " a"], "label": 1},
    {"question": "", "choices": ["yes", "no"], "label": 1},  # nothing stands before the choice
    {"question": "long" + " too long" * 12, "choices": [" for it", " by far"], "label": 0},
]
TEXTS = ["A river runs to the sea.", "Each window holds as many tokens as fit. " * 4, "x"]
PROMPTS = ["Hello, river", "y", "abcabcabcab", "of this the beginning is left out, " * 4]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tiny_choice": (
        QUESTIONS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "target_delimiter": "",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "tiny_text": (
        [{"text": text} for text in TEXTS],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "tiny_answer": (
        [{"prompt": prompt, "answer": "c"} for prompt in PROMPTS],
        {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["e", "S"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
}
FLOAT32 = {"dtype": "float32", "engine": "torch", "device": "cpu"}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """lm-eval's log goes to `caplog`, also after its command has taken it for itself."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lm_eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("lm_eval") / "tiny"
    settings = {"max_position_embeddings": CONTEXT, "initializer_range": 0.3, "eos_token_id": END}
    return str(save_model(directory, **settings))


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' files, and their data beside them."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, (records, task) in TASKS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        files = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
        source = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        config = yaml.safe_dump({"task": name, **source, **task})
        (directory / f"{name}.yaml").write_text(config, "utf-8")
    return directory


@pytest.fixture(scope="module")
def evaluate(task_directory: Path) -> Evaluate:
    """All tasks with a model of lm-eval."""

    def evaluate(name: str, arguments: Any, **rest: Any) -> dict[str, Any]:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=name,
            model_args=arguments,
            tasks=rest.pop("tasks", list(TASKS)),
            task_manager=TaskManager(include_path=task_directory, include_defaults=False),
            bootstrap_iters=0,
            **rest,
        )
        return results

    return evaluate


@pytest.fixture(scope="module")
def hf(evaluate: Evaluate, model: str) -> dict[str, Any]:
    """What lm-eval's own model of `transformers` gives."""
    return evaluate("hf", {"pretrained": model, "dtype": "float32"}, device="cpu", batch_size=2)


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(args=one, task_name="tiny", doc_id=place)
        for place, one in enumerate(arguments)
    ]


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """Of each item, in order, as (log-likelihood, is greedy), log-likelihood, or text."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [one for sample in samples for one in sample["filtered_resps"]]


def check_same(results: dict[str, Any], expected: dict[str, Any]) -> None:
    for task in TASKS:
        for found, other in zip(responses(results, task), responses(expected, task), strict=True):
            if isinstance(found, tuple):
                assert found[0] == pytest.approx(other[0], abs=2e-3)
                assert found[1] == other[1]
            else:
                assert found == (
                    pytest.approx(other, abs=2e-3) if isinstance(found, float) else other
                )
        for metric, value in expected["results"][task].items():
            assert results["results"][task][metric] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            )


class TestTasks:
    def test_the_backbone_is_the_plain_model(
        self, evaluate: Evaluate, hf: dict[str, Any], model: str, tmp_path: Path
    ) -> None:
        river = save_river(Path(model), tmp_path / "river", RiverConfig())
        never = {"pretrained": model, "policy": "never", **FLOAT32}
        check_same(evaluate("river-llm", never), hf)
        check_same(evaluate("river-llm", never, batch_size=3), hf)
        lossless = f"pretrained={model},river={river},dtype=float32,engine=torch"
        check_same(evaluate("river-llm", lossless, device="cpu", batch_size=2), hf)
        lengths = [len(text) for text in responses(hf, "tiny_answer")]
        assert min(lengths) < max(lengths) == 24  # some end by a stop string

    def test_results_and_log_say_how_deep_tokens_went(
        self, evaluate: Evaluate, hf: dict[str, Any], model: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        arguments = {"pretrained": model, "exit_layer": 1, "bits": 2, "prefill": "river", **FLOAT32}
        results = evaluate("river-llm", arguments, tasks=["tiny_choice"])
        assert responses(results, "tiny_choice") != responses(hf, "tiny_choice")
        choices = sum(len(item["choices"]) for item in QUESTIONS)
        tokens = sum(len(choice) for item in QUESTIONS for choice in item["choices"])
        assert len(responses(results, "tiny_choice")) == choices
        info = results["config"]["river_llm"]
        assert (info["mean_exit_layer"], info["exit_layers"]) == (1, {"1": tokens})
        assert info["policy"]["exit_layer"] == 1
        assert f"likelihoods: mean exit depth 1.0 of 4 over {tokens} tokens" in caplog.text

    def test_the_native_engine_answers_too(self, evaluate: Evaluate, model: str) -> None:
        alone = evaluate("river-llm", {"pretrained": model, "threshold": 0.8, "engine": "cpu"})
        text = f"pretrained={model},threshold=0.8,engine=cpu"
        batch = evaluate("river-llm", text, batch_size="4")
        for task in TASKS:
            assert responses(alone, task) == responses(batch, task)  # bit for bit

    def test_a_task_is_asked_as_messages(self, evaluate: Evaluate, model: str) -> None:
        settings: dict[str, Any] = {
            "apply_chat_template": True,
            "system_instruction": "Be brief.",
            "tasks": ["tiny_answer"],
        }
        arguments = {"pretrained": model, "policy": "never", **FLOAT32}
        results = evaluate("river-llm", arguments, **settings)
        sample = results["samples"]["tiny_answer"][0]
        assert sample["arguments"][0][0] == "s:Be brief.\nu:Hello, river\na:"
        plain = {"pretrained": model, "dtype": "float32"}
        expected = evaluate("hf", plain, device="cpu", **settings)
        assert responses(results, "tiny_answer") == responses(expected, "tiny_answer")

    def test_the_command_runs_them(self, model: str, task_directory: Path, tmp_path: Path) -> None:
        arguments = f"pretrained={model},threshold=0.8,threads=1"
        options = ["--include_path", task_directory, "--output_path", tmp_path]
        outcome = run("eval", "--model_args", arguments, "--tasks", "tiny_choice", *options)
        assert outcome.exit_code == 0, outcome.stderr
        assert "|tiny_choice|" in outcome.stdout
        assert "likelihoods: mean exit depth" in outcome.stderr
        (path,) = tmp_path.rglob("results_*.json")
        written = json.loads(path.read_text("utf-8"))
        assert written["config"]["river_llm"]["policy"]["threshold"] == 0.8

    def test_the_name_is_an_entry_point_that_gives_the_class(self) -> None:
        (point,) = [p for p in entry_points(group="lm_eval.models") if p.name == "river-llm"]
        assert point.load() is RiverEvalLM is get_model("river-llm")


@pytest.fixture
def eval_lm(tiny_llama: PreTrainedModel) -> RiverEvalLM:
    return RiverEvalLM(tiny_lm(tiny_llama), batch_size=2)


class TestRequests:
    def test_answers_follow_the_settings_of_each_request(self, eval_lm: RiverEvalLM) -> None:
        short, long, again = eval_lm.generate_until(
            requests(
                ("river", {"max_gen_toks": 3}),
                ("river", {"max_gen_toks": 9, "until": []}),
                ("river", {"max_gen_toks": 3}),
            )
        )
        assert short == again == long[:3]
        assert len(long) == 9
        other = short[:-1] + ("a" if short[-1] != "a" else "b")
        found = eval_lm.loglikelihood(requests(("river", short), ("river", other)))
        assert [is_greedy for _, is_greedy in found] == [True, False]
        place = long.index(long[4])
        eval_lm.tokenizer.add_special_tokens({"additional_special_tokens": [long[4]]})
        (ended,) = eval_lm.generate_until(
            requests(("river", {"max_gen_toks": 9, "until": [long[4]]}))
        )
        assert ended == long[:place]  # a special token has no text to be found in

    def test_samples_depend_on_the_seed_of_pytorch(self, eval_lm: RiverEvalLM) -> None:
        asked = requests(*[("river", {"do_sample": True, "max_gen_toks": 12})] * 4)
        answers = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            answers.append(eval_lm.generate_until(asked))
        assert answers[0] == answers[1] != answers[2]
        assert len(set(answers[0])) == 4

    def test_what_was_answered_goes_to_lm_eval_s_cache(self, eval_lm: RiverEvalLM) -> None:
        kept: list[tuple[str, Any]] = []
        hook = SimpleNamespace(add_partial=lambda name, args, _: kept.append((name, args)))
        eval_lm.set_cache_hook(hook)
        asked = {
            "generate_until": ("river", {"max_gen_toks": 1}),
            "loglikelihood": ("a", "b"),
            "loglikelihood_rolling": ("abc",),
        }
        for name, arguments in asked.items():
            getattr(eval_lm, name)(requests(arguments))
        assert kept == list(asked.items())

    def test_what_does_not_fit_loses_its_beginning_but_no_answer(
        self, eval_lm: RiverEvalLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        long, settings = "a" * 40 + "b" * 62, {"max_gen_toks": 24}
        found = eval_lm.loglikelihood(requests((long, "cd")))
        assert found == eval_lm.loglikelihood(requests((long[-63:], "cd")))
        (answer,) = eval_lm.generate_until(requests((long, settings)))
        assert [answer] == eval_lm.generate_until(requests((long[-40:], settings)))
        assert len(answer) == 24
        for what in ("contexts", "prompts"):
            told = f"1 of 1 {what} lose their beginning: max_length is 64"
            assert caplog.text.count(told) == 1
        with pytest.raises(ConfigError, match="max_gen_toks is 64, which leaves no room"):
            eval_lm.generate_until(requests(("river", {"max_gen_toks": CONTEXT})))
        assert eval_lm.loglikelihood_rolling(requests(("",), ("a",)))[0] == 0

    @pytest.mark.parametrize(
        ("continuation", "message"),
        [("", "has 0 tokens"), ("x" * 65, "has 65 tokens, but max_length is 64: 'xxx")],
    )
    def test_a_continuation_without_a_likelihood_is_refused_before_the_first_pass(
        self, eval_lm: RiverEvalLM, continuation: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eval_lm._lm, "engine", None)
        with pytest.raises(DataError, match=message):
            eval_lm.loglikelihood(requests(("river", "s"), ("river", continuation)))

    def test_a_continuation_that_joins_the_context_s_last_token_is_encoded_alone(
        self, eval_lm: RiverEvalLM
    ) -> None:
        tokenizer = character_tokenizer()
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary, (a, b, c) = state["model"]["vocab"], tokenizer("abc").input_ids
        vocabulary["ab"] = vocabulary.pop("~")
        state["model"]["merges"] = [["a", "b"]]
        eval_lm.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<end>"
        )
        assert len(eval_lm.tok_encode("aab")) == 2
        found = eval_lm.loglikelihood(requests(("aa", "b"), ("aa", "c")))
        pairs = [(None, [a, a], [b]), (None, [a, a], [c])]
        assert found == eval_lm._loglikelihood_tokens(pairs)


def test_messages_go_through_the_template(eval_lm: RiverEvalLM) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    assert eval_lm.apply_chat_template(turns) == "u:Hi\na:"
    answered = [*turns, {"role": "assistant", "content": "Yes, "}]
    assert eval_lm.apply_chat_template(answered, add_generation_prompt=False).endswith("Yes, ")
    eval_lm.tokenizer.chat_template = "{{ messages[0].content }}{{ level }}"
    given = RiverEvalLM(eval_lm._lm, chat_template_kwargs={"level": 3})
    assert given.apply_chat_template(turns) == "Hi3"
    eval_lm.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        eval_lm.apply_chat_template(turns)


def test_a_text_that_begins_as_the_template_writes_it_gets_no_second_beginning(
    eval_lm: RiverEvalLM,
) -> None:
    eval_lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", END)]
    )
    eval_lm.tokenizer.chat_template = "<end>{{ messages[0].content }}"
    own = eval_lm.tok_encode("river", add_special_tokens=False)
    assert END not in own
    assert eval_lm.tok_encode("river") == eval_lm.tok_encode("<end>river") == [END, *own]
    prompt = eval_lm.apply_chat_template([{"role": "user", "content": "river"}])
    assert eval_lm.tok_encode(prompt) == [END, *own]


SAMPLED = {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 5, "seed": 3}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SamplingConfig(max_new_tokens=256)),
        ({"until": "\n"}, SamplingConfig(stop="\n")),
        ({"until": ["a", "", None, "b"]}, SamplingConfig(stop=("a", "b"))),
        ({"until": None, "max_gen_toks": 5}, SamplingConfig(max_new_tokens=5)),
        ({"max_new_tokens": "5"}, SamplingConfig(max_new_tokens=5)),
        ({"temperature": 0.7}, SamplingConfig(temperature=0.7)),
        ({"do_sample": False, "temperature": 0.7}, SamplingConfig()),
        ({"do_sample": True}, SamplingConfig(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.0}, SamplingConfig()),
        (SAMPLED, SamplingConfig(temperature=0.2, top_p=0.95, top_k=5, seed=3)),
        ({"num_beams": 1, "use_cache": True}, SamplingConfig()),
        ({"num_beams": 4}, "no setting 'num_beams'"),
        ({"max_gen_toks": 0}, "max_new_tokens is 0"),
        ({"top_p": 2}, "top_p is 2"),
    ],
)
def test_answers_are_generated_as_the_task_says(
    settings: dict[str, Any], expected: SamplingConfig | str
) -> None:
    before = dict(settings)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            sampling_config(settings)
    else:
        assert sampling_config(settings) == expected
    assert settings == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batch_size": "auto"}, (8, 64)),
        ({"batch_size": "3", "max_length": 10}, (3, 10)),
        ({"max_length": 65}, "max_length is 65, but the model's context holds 1 to 64"),
        ({"max_length": 0}, "max_length is 0"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more, or auto"),
    ],
)
def test_sizes_are_given_or_left_to_the_program(
    tiny_llama: PreTrainedModel, arguments: dict[str, Any], expected: tuple[int, int] | str
) -> None:
    lm = tiny_lm(tiny_llama)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            RiverEvalLM(lm, **arguments)
    else:
        eval_lm = RiverEvalLM(lm, **arguments)
        assert (eval_lm.batch_size, eval_lm.max_length) == expected
