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
TEXTS = [
    {"text": "A river runs to the sea."},
    {"text": "Each window holds as many tokens as the model's context. " * 4},
    {"text": "x"},
]
PROMPTS = [
    {"prompt": "Hello, river", "answer": "y"},
    {"prompt": "y", "answer": "n"},
    {"prompt": "abcabcabcab", "answer": "c"},
    {"prompt": "of this the beginning is left out, " * 4, "answer": "c"},
]
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
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "tiny_answer": (
        PROMPTS,
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


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """lm-eval's log goes to `caplog`, also after its command has taken it for itself."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    caplog.set_level(logging.INFO, logger="lm_eval")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("lm_eval") / "tiny"
    settings = {"max_position_embeddings": CONTEXT, "initializer_range": 0.3, "eos_token_id": END}
    return str(save_model(directory, **settings))


@pytest.fixture(scope="module")
def river(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_river(Path(model), tmp_path_factory.mktemp("lm_eval") / "r", RiverConfig()))


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' files, and their data beside them."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, (records, task) in TASKS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(directory / "cache"),
            },
            "test_split": "test",
            **task,
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return directory


@pytest.fixture(scope="module")
def evaluate(task_directory: Path) -> Callable[..., dict[str, Any]]:
    """All tasks with a model of lm-eval."""

    def evaluate(name: Any, arguments: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
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
def hf(evaluate: Callable[..., dict[str, Any]], model: str) -> dict[str, Any]:
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
            elif isinstance(found, float):
                assert found == pytest.approx(other, abs=2e-3)
            else:
                assert found == other
        for metric, value in expected["results"][task].items():
            assert results["results"][task][metric] == (
                pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            )


class TestBesideHf:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_a_policy_that_never_leaves_is_the_plain_model(
        self,
        evaluate: Callable[..., dict[str, Any]],
        hf: dict[str, Any],
        model: str,
        batch_size: int,
    ) -> None:
        arguments = {"pretrained": model, "policy": "never", **FLOAT32}
        check_same(evaluate("river-llm", arguments, batch_size=batch_size), hf)

    def test_lossless_mode_is_the_plain_model(
        self, evaluate: Callable[..., dict[str, Any]], hf: dict[str, Any], model: str, river: str
    ) -> None:
        text = f"pretrained={model},river={river},mode=lossless,dtype=float32,engine=torch"
        check_same(evaluate("river-llm", text, device="cpu", batch_size=2), hf)

    def test_the_items_tell_models_apart(
        self, evaluate: Callable[..., dict[str, Any]], hf: dict[str, Any], model: str
    ) -> None:
        arguments = {"pretrained": model, "exit_layer": 1, "bits": 2, **FLOAT32}
        results = evaluate("river-llm", arguments)
        for task in TASKS:
            assert responses(results, task) != responses(hf, task)

    def test_some_answers_end_by_a_stop_string_and_some_by_their_length(
        self, hf: dict[str, Any]
    ) -> None:
        lengths = [len(text) for text in responses(hf, "tiny_answer")]
        assert max(lengths) == 24
        assert min(lengths) < 24


class TestExits:
    def test_results_and_log_say_how_deep_tokens_went(
        self,
        evaluate: Callable[..., dict[str, Any]],
        model: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        arguments = {"pretrained": model, "exit_layer": 2, "prefill": "river", **FLOAT32}
        results = evaluate("river-llm", arguments, tasks=["tiny_choice"])
        info = results["config"]["river_llm"]
        assert info["mean_exit_layer"] == 2
        choices = sum(len(choice) for item in QUESTIONS for choice in item["choices"])
        assert info["exit_layers"] == {"2": choices}
        assert info["policy"]["exit_layer"] == 2
        assert info["mode"] == "river"
        assert f"likelihoods: mean exit depth 2.0 of 4 over {choices} tokens" in caplog.text

    def test_the_native_engine_answers_too(
        self, evaluate: Callable[..., dict[str, Any]], model: str
    ) -> None:
        alone = evaluate("river-llm", {"pretrained": model, "threshold": 0.8, "engine": "cpu"})
        text = f"pretrained={model},threshold=0.8,engine=cpu"
        batch = evaluate("river-llm", text, batch_size="4")
        for task in TASKS:
            assert responses(alone, task) == responses(batch, task)  # bit for bit


@pytest.fixture
def eval_lm(tiny_llama: PreTrainedModel) -> RiverEvalLM:
    return RiverEvalLM(tiny_lm(tiny_llama), batch_size=2)


class TestRequests:
    def test_a_greedy_continuation_is_known_as_one(self, eval_lm: RiverEvalLM) -> None:
        (answer,) = eval_lm.generate_until(requests(("river", {"max_gen_toks": 5})))
        assert len(answer) == 5
        other = answer[:-1] + ("a" if answer[-1] != "a" else "b")
        (_, first), (_, second) = eval_lm.loglikelihood(
            requests(("river", answer), ("river", other))
        )
        assert (first, second) == (True, False)

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

    def test_a_special_token_can_end_an_answer(self, eval_lm: RiverEvalLM) -> None:
        whole, stopped = eval_lm.generate_until(
            requests(("river", {"max_gen_toks": 9}), ("river", {"max_gen_toks": 9, "until": "X"}))
        )
        assert whole == stopped  # of which nothing is an X
        token = eval_lm.tokenizer.convert_tokens_to_ids(whole[4])
        place = whole.index(whole[4])
        eval_lm.tokenizer.add_special_tokens({"additional_special_tokens": [whole[4]]})
        assert eval_lm.tokenizer.convert_tokens_to_ids(whole[4]) == token
        settings = {"max_gen_toks": 9, "until": [whole[4]]}
        ended, again = eval_lm.generate_until(
            requests(("river", settings), ("river", {"max_gen_toks": 9}))
        )
        assert ended == whole[:place]  # a special token has no text to be found in
        assert again == whole.replace(whole[4], "")

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
        settings = {"max_gen_toks": 1}
        eval_lm.generate_until(requests(("river", settings)))
        eval_lm.loglikelihood(requests(("a", "b")))
        eval_lm.loglikelihood_rolling(requests(("abc",)))
        assert kept == [
            ("generate_until", ("river", settings)),
            ("loglikelihood", ("a", "b")),
            ("loglikelihood_rolling", ("abc",)),
        ]

    def test_a_context_that_does_not_fit_loses_its_beginning(
        self, eval_lm: RiverEvalLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        long = "a" * 40 + "b" * 62
        ((found, _),) = eval_lm.loglikelihood(requests((long, "cd")))
        ((expected, _),) = eval_lm.loglikelihood(requests((long[-63:], "cd")))
        assert found == expected
        assert "1 of 1 contexts lose their beginning: max_length is 64" in caplog.text

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
        vocabulary, a, b = state["model"]["vocab"], *tokenizer("ab").input_ids
        vocabulary["ab"] = vocabulary.pop("~")
        state["model"]["merges"] = [["a", "b"]]
        eval_lm.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<end>"
        )
        assert len(eval_lm.tok_encode("aab")) == 2
        found = eval_lm.loglikelihood(requests(("aa", "b"), ("aa", "c")))
        pairs = [(None, [a, a], [b]), (None, [a, a], tokenizer("c").input_ids)]
        assert found == eval_lm._loglikelihood_tokens(pairs)

    def test_a_prompt_without_room_for_the_answer_loses_its_beginning(
        self, eval_lm: RiverEvalLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = {"max_gen_toks": 24}
        long = "a" * 40 + "b" * 40
        (found,) = eval_lm.generate_until(requests((long, settings)))
        (expected,) = eval_lm.generate_until(requests((long[-40:], settings)))
        assert found == expected
        assert len(found) == 24
        assert caplog.text.count("1 of 1 prompts lose their beginning") == 1

    def test_an_answer_as_long_as_the_context_is_refused(self, eval_lm: RiverEvalLM) -> None:
        with pytest.raises(ConfigError, match="max_gen_toks is 64, which leaves no room"):
            eval_lm.generate_until(requests(("river", {"max_gen_toks": CONTEXT})))

    def test_an_empty_text_has_no_windows(self, eval_lm: RiverEvalLM) -> None:
        assert eval_lm.loglikelihood_rolling(requests(("",), ("a",)))[0] == 0


class TestChat:
    def test_a_message_goes_through_the_template(self, eval_lm: RiverEvalLM) -> None:
        turns = [{"role": "user", "content": "Hi"}]
        assert eval_lm.apply_chat_template(turns) == "u:Hi\na:"
        assert eval_lm.chat_template(True) == character_tokenizer().chat_template
        answered = [*turns, {"role": "assistant", "content": "Yes, "}]
        assert eval_lm.apply_chat_template(answered, add_generation_prompt=False).endswith("Yes, ")

    def test_a_task_is_asked_as_messages(
        self, evaluate: Callable[..., dict[str, Any]], model: str
    ) -> None:
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

    def test_a_system_message_that_the_template_refuses_goes_in_front(
        self, eval_lm: RiverEvalLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        eval_lm.tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'system' %}"
            "{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}{% endfor %}"
        )
        turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        assert eval_lm.apply_chat_template(turns) == "S\n\nU"
        assert "takes no system message" in caplog.text

    def test_arguments_reach_the_template(self, tiny_llama: PreTrainedModel) -> None:
        eval_lm = RiverEvalLM(tiny_lm(tiny_llama), chat_template_kwargs={"level": 3})
        eval_lm.tokenizer.chat_template = "{{ messages[0].content }}{{ level }}"
        assert eval_lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi3"

    def test_a_model_without_a_template_is_refused(self, eval_lm: RiverEvalLM) -> None:
        eval_lm.tokenizer.chat_template = None
        with pytest.raises(ConfigError, match="no chat template"):
            eval_lm.apply_chat_template([{"role": "user", "content": "Hi"}])

    def test_a_text_that_begins_as_the_template_writes_it_gets_no_second_beginning(
        self, eval_lm: RiverEvalLM
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


class TestTheName:
    def test_is_an_entry_point_that_gives_the_class(self) -> None:
        (point,) = [p for p in entry_points(group="lm_eval.models") if p.name == "river-llm"]
        assert point.load() is RiverEvalLM is get_model("river-llm")

    def test_is_known_to_the_command(
        self, model: str, task_directory: Path, tmp_path: Path
    ) -> None:
        outcome = run(
            "eval",
            "--model_args",
            f"pretrained={model},threshold=0.8,threads=1",
            "--tasks",
            "tiny_choice",
            "--include_path",
            task_directory,
            "--output_path",
            tmp_path,
        )
        assert outcome.exit_code == 0, outcome.stderr
        assert "|tiny_choice|" in outcome.stdout
        assert "likelihoods: mean exit depth" in outcome.stderr
        (path,) = tmp_path.rglob("results_*.json")
        written = json.loads(path.read_text("utf-8"))
        assert written["config"]["river_llm"]["policy"]["threshold"] == 0.8


SAMPLING: list[tuple[dict[str, Any], SamplingConfig]] = [
    ({}, SamplingConfig(max_new_tokens=256)),
    ({"until": "\n"}, SamplingConfig(stop="\n")),
    ({"until": ["a", "", None, "b"]}, SamplingConfig(stop=("a", "b"))),
    ({"until": None, "max_gen_toks": 5}, SamplingConfig(max_new_tokens=5)),
    ({"max_new_tokens": "5"}, SamplingConfig(max_new_tokens=5)),
    ({"temperature": 0.7}, SamplingConfig(temperature=0.7)),
    ({"do_sample": False, "temperature": 0.7}, SamplingConfig()),
    ({"do_sample": True}, SamplingConfig(temperature=1.0)),
    ({"do_sample": True, "temperature": 0.0}, SamplingConfig()),
    (
        {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 5, "seed": 3},
        SamplingConfig(temperature=0.2, top_p=0.95, top_k=5, seed=3),
    ),
    ({"num_beams": 1, "use_cache": True}, SamplingConfig()),
]


@pytest.mark.parametrize(("settings", "expected"), SAMPLING)
def test_answers_are_generated_as_the_task_says(
    settings: dict[str, Any], expected: SamplingConfig
) -> None:
    before = dict(settings)
    assert sampling_config(settings) == expected
    assert settings == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "no setting 'num_beams'"),
        ({"max_gen_toks": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2"),
    ],
)
def test_a_setting_that_is_wrong_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_config(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 65}, "max_length is 65, but the model's context holds 1 to 64"),
        ({"max_length": 0}, "max_length is 0"),
        ({"batch_size": 0}, "batch_size is 0; give 1 or more, or auto"),
    ],
)
def test_a_size_out_of_its_range_is_refused(
    tiny_llama: PreTrainedModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RiverEvalLM(tiny_lm(tiny_llama), **arguments)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [({"batch_size": "auto"}, (8, 64)), ({"batch_size": "3", "max_length": 10}, (3, 10))],
)
def test_sizes_may_be_left_to_the_program(
    tiny_llama: PreTrainedModel, arguments: dict[str, Any], sizes: tuple[int, int]
) -> None:
    eval_lm = RiverEvalLM(tiny_lm(tiny_llama), **arguments)
    assert (eval_lm.batch_size, eval_lm.max_length) == sizes
