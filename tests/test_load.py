"""A model folder is loaded as it is: weights, settings that no answer needs, its own tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from byte_models import IDS, byte_lm, byte_model, byte_tokenizer, logits_cosine, save_folder
from folder_changes import (
    INDEX,
    POINTER,
    WEIGHTS,
    Change,
    configured,
    in_shards,
    in_turn,
    renamed,
    with_tensor,
    written,
)
from safetensors.torch import load_file
from tiny_lm import character_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedModel

from river_llm import (
    ExitPolicy,
    ModelLoadError,
    River,
    RiverConfig,
    RiverFileError,
    RiverLM,
)
from river_llm.load.model import load_backbone

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("saved"), byte_model(vocab_size=272, **SIZES))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def _index_without(metadata: dict[str, Any]) -> Change:
    def change(folder: Path) -> None:
        in_shards(folder)
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        (folder / INDEX).write_text(json.dumps({"weight_map": places, **metadata}))

    return change


def _one_file_beside_an_index(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    in_shards(folder)
    (folder / WEIGHTS).write_bytes(whole)


_OTHER_PARTS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.k_scale",
    "model.layers.0.self_attn.v_proj.v_scale",
    "model.layers.0.self_attn.k_proj.output_scale",
    "vision_tower.layers.0.mlp.weight",
    "model.visual.blocks.0.weight",
    "mtp.layers.0.mlp.weight",
    "score.weight",
)
_KV_ALONE = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
# name: (what is done to a folder, what is told)
HARMLESS: dict[str, tuple[Change, str | None]] = {
    "nothing": (lambda folder: None, None),
    "shards": (in_shards, None),
    "an index without metadata": (_index_without({}), None),
    "an index whose metadata is null": (_index_without({"metadata": None}), None),
    "one file beside an index": (_one_file_beside_an_index, f"has an {INDEX} too, and {WEIGHTS}"),
    **{
        f"a pointer in {name}": (written(name, POINTER), None)
        for name in ("consolidated.safetensors", "tokenizer.model", "picture.png")
    },
    **{
        f"quantization_config {nothing}": (
            in_turn(
                configured("hf_quant_config.json", quantization=_KV_ALONE),
                configured(quantization_config=nothing),
            ),
            None,
        )
        for nothing in (None, {})
    },
    **{f"tensor {name}": (with_tensor(name), None) for name in _OTHER_PARTS},
    "tensor something.weight": (
        with_tensor("something.weight"),
        r"no part of the model takes 1 tensor (something.weight)",
    ),
    "a layer that predicts further tokens": (
        in_turn(
            with_tensor("model.layers.2.mlp.up_proj.weight"),
            configured(num_nextn_predict_layers=1),
        ),
        "no part of the model takes 1 tensor (model.layers.2.mlp.up_proj.weight)",
    ),
    **{
        f"{key} {value}": (configured(**{key: value}), None)
        for key, values in {
            "attn_implementation": (
                "flash_attention_2",
                "flex_attention",
                "org/kernel",
                5,
                "eager",
            ),
            "_attn_implementation": ("flash_attention_2", "nonsense"),
            "dtype": ("bf16", "auto", "torch.bfloat16", 5, ["float16"], "int8"),
            "torch_dtype": ("bf16", "int8"),
            "pad_token_id": (272, -273),
            "return_dict": (False,),
        }.items()
        for value in values
    },
    "attention wanted": (configured(attn_implementation="x", output_attentions=True), None),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_answer_stops_no_load(
    name: str, folder: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, told = HARMLESS[name]
    change(folder)
    model, tokenizer = load_backbone(folder)
    messages = [one.getMessage() for one in caplog.records if one.name.startswith("river_llm")]
    assert [str(told) in message for message in messages] == [True] * (told is not None)
    expected = load_file(saved / WEIGHTS)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 272)
    assert not model.training
    assert model.config._attn_implementation == ("eager" if "eager" in name else "sdpa")
    assert model.name_or_path == tokenizer.name_or_path == str(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_weights_come_in_the_dtype_asked_for(folder: Path, dtype: torch.dtype) -> None:
    assert load_backbone(str(folder), dtype)[0].dtype == dtype


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_matter(folder: Path, encoding: str) -> None:
    expected = load_backbone(folder)[1]("Hi 12").input_ids
    configured("generation_config.json", eos_token_id=[1, 7])(folder)
    for file in folder.glob("*.json"):
        file.write_text(file.read_text(), encoding=encoding)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(), encoding="utf-8-sig")
    model, tokenizer = load_backbone(folder)
    assert model.generation_config.eos_token_id == [1, 7]
    assert tokenizer("Hi 12").input_ids == expected
    assert tokenizer.chat_template == byte_tokenizer().chat_template


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("GPT2", "h.0.attn.bias"),
        ("GPT2", "transformer.h.0.attn.masked_bias"),
        ("GPTNeoX", "gpt_neox.layers.0.attention.bias"),
    ],
)
def test_masks_of_older_checkpoints_are_left_out(
    tmp_path: Path, architecture: str, name: str
) -> None:
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    save_folder(tmp_path, transformers.AutoModelForCausalLM.from_config(config))
    with_tensor(name, torch.zeros(1, 1, 8, 8))(tmp_path)
    load_backbone(tmp_path)


def _digits_in_threes(folder: Path) -> None:
    """A pre-tokenizer and merges that no class of transformers has."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    settings = json.loads(tokenizer.to_str())
    vocabulary = settings["model"]["vocab"]
    settings["model"]["merges"] = [["1", "2"], ["12", "3"], ["3", "4"], ["Ġ", "5"], ["Ċ", "Ċ"]]
    for token in ("12", "123", "34", "Ġ5", "ĊĊ"):
        vocabulary[token] = len(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(settings))


class TestTokenizer:
    TEXT = "Hi 1234 5\n\n  x = [\n    10,\n]\tÄé 漢字 e\u0301 <|im_end|> a's"

    @pytest.mark.parametrize(
        "of_class", ["Qwen2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizer", "GemmaTokenizer"]
    )
    def test_is_that_of_tokenizer_json_whatever_its_class(
        self, folder: Path, of_class: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RIVER_LLM_CACHE", str(folder / "cache"))
        _digits_in_threes(folder)
        configured("tokenizer_config.json", tokenizer_class=of_class)(folder)
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = own.encode(self.TEXT, add_special_tokens=False).ids
        for _ in range(2):  # from its files, then from the store
            tokenizer = byte_lm(folder).tokenizer
            assert tokenizer(self.TEXT, add_special_tokens=False).input_ids == expected
            assert tokenizer.eos_token == "</s>"
            assert tokenizer.chat_template == byte_tokenizer().chat_template

    @pytest.mark.parametrize("of_class", ["LlamaTokenizerFast", "GemmaTokenizer", "Qwen2Tokenizer"])
    def test_adds_what_its_class_adds_by_the_flags_of_its_settings(
        self, folder: Path, of_class: str
    ) -> None:
        settings = {"tokenizer_class": of_class, "add_bos_token": True, "add_eos_token": True}
        before = load_backbone(folder)[1]("Hi").input_ids
        configured("tokenizer_config.json", **settings)(folder)
        has_flags = of_class != "Qwen2Tokenizer"
        expected = [0, *before, 1] if has_flags else before
        assert load_backbone(folder)[1]("Hi").input_ids == expected
        configured("tokenizer_config.json", add_bos_token=False)(folder)
        assert load_backbone(folder)[1]("Hi").input_ids == expected[has_flags:]

    @pytest.mark.parametrize(
        "template", ["X{{ 1 }}", [{"name": "default", "template": "\ufeffX{{ 1 }}"}]]
    )
    def test_takes_the_template_of_an_old_processor_where_it_has_none(
        self, folder: Path, template: object
    ) -> None:
        configured("chat_template.json", chat_template=template)(folder)
        assert load_backbone(folder)[1].chat_template == byte_tokenizer().chat_template
        (folder / "chat_template.jinja").unlink()
        assert load_backbone(folder)[1].get_chat_template() == "X{{ 1 }}"


def _with_images(architecture: str, tied: bool) -> PreTrainedModel:
    """A whole model, of which the text part is loaded."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2}
    text: dict[str, Any] = {**SIZES, **HEADS, "vocab_size": 260, "initializer_range": 0.1}
    kind, more = "pixtral", {}
    if architecture == "Gemma3":
        text["tie_word_embeddings"] = tied
        vision |= {"image_size": 28, "patch_size": 14}
        kind, more = "siglip_vision_model", {"mm_tokens_per_image": 4}
    else:
        text["model_type"] = "ministral3"
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        text_config=text,
        vision_config={"model_type": kind, **vision},
        tie_word_embeddings=tied,
        **more,
    )
    model: PreTrainedModel = getattr(transformers, f"{architecture}ForConditionalGeneration")(
        config
    )
    return model.eval()


class TestAModelThatTakesImagesToo:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("architecture", ["Gemma3", "Mistral3"])
    @pytest.mark.parametrize("is_new", [False, True])
    def test_runs_its_text_part_on_the_native_engine(
        self, tmp_path: Path, architecture: str, tied: bool, is_new: bool
    ) -> None:
        whole = _with_images(architecture, tied)
        save_folder(tmp_path, whole)
        if is_new:  # names of younger checkpoints
            renamed(r"^language_model\.model\.", "model.language_model.")(tmp_path)
            renamed(r"^language_model\.lm_head", "lm_head")(tmp_path)
            renamed(r"^(?=vision|multi)", "model.")(tmp_path)
        model = load_backbone(tmp_path, torch.float32)[0]
        tokens = torch.tensor([IDS[:40]])
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, whole(input_ids=tokens).logits)
        lm = byte_lm(tmp_path)
        assert (lm.engine.name, lm.fallback_reason) == ("cpu", None)
        assert logits_cosine(lm, model, IDS[:40]) > 0.999

    def test_keeps_the_ends_of_the_whole_model(self, tmp_path: Path) -> None:
        save_folder(tmp_path, _with_images("Gemma3", True), eos_token_id=[1, 106])
        (tmp_path / "generation_config.json").unlink()
        assert load_backbone(tmp_path)[0].generation_config.eos_token_id == [1, 106]


class TestHub:
    @pytest.fixture
    def snapshot(self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder of `org/name` in the Hub's local cache, without a network."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
        repository = tmp_path / "models--org--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        return Path(shutil.copytree(saved, repository / "snapshots" / ("0" * 40)))

    def test_a_model_in_its_cache_is_loaded_with_all_of_its_files(self, snapshot: Path) -> None:
        assert huggingface_hub.try_to_load_from_cache("org/name", "config.json")
        (snapshot / "chat_template.jinja").unlink()
        configured("chat_template.json", chat_template="X")(snapshot)
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        configured("tokenizer_config.json", **settings)(snapshot)
        model, tokenizer = load_backbone("org/name")
        assert model.config.num_hidden_layers == 2
        assert tokenizer.chat_template == "X"
        assert tokenizer("Hi").input_ids[0] == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (configured("quantize_config.json", bits=4), "org/name is quantised already"),
            (_index_without({}), f"the {INDEX} of org/name has no metadata; download"),
        ],
    )
    def test_a_model_in_its_cache_is_looked_at(
        self, snapshot: Path, change: Change, message: str
    ) -> None:
        change(snapshot)
        with pytest.raises(ModelLoadError, match=f"^{re.escape(message)}"):
            load_backbone("org/name")


class TestRiverLM:
    @pytest.fixture
    def directory(self, tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
        tiny_llama.save_pretrained(tmp_path / "saved")
        character_tokenizer().save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    def test_builds_the_river_and_takes_the_policy_asked_for(self, directory: Path) -> None:
        assert RiverLM.from_pretrained(directory).river_config == RiverConfig(4, 64, "hqq")
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
            RiverLM.from_pretrained(directory, river, ExitPolicy.always(), dtype=torch.float32)
            .generate("Hi", max_new_tokens=20)
            .tokens
            for river in (built, tmp_path / "river", str(tmp_path / "river"), RiverConfig(2, 32))
        ]
        assert answers[0] == answers[1] == answers[2] != answers[3]

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
