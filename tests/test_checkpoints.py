"""What a model folder tells of itself: quantised already, an adapter, pointers, lost parts,
settings that no model needs; and tensors that the model has no place for."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from byte_models import IDS, byte_lm, byte_model, byte_tokenizer, logits_cosine, save_folder
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from river_llm import ModelLoadError, UnsupportedModelError, attach_river
from river_llm.load.model import load_backbone

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("saved"), byte_model(vocab_size=272, **SIZES))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def _configure(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    file = folder / name
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, **changes}))
    return folder


def _put(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, {"format": "pt"})
    return folder


def _message(source: str | Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_backbone(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestQuantisedAlready:
    @pytest.mark.parametrize(
        ("settings", "how"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
            ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
            ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
            ({"quant_method": "some_new_one"}, "some_new_one"),
            ({"bits": 4}, "some method, 4 bits"),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
                },
                "compressed-tensors, 8 bits",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("part", [None, "text_config"])
    def test_is_told_by_the_configuration(
        self, folder: Path, settings: dict[str, Any], how: str, part: str | None
    ) -> None:
        changes: dict[str, Any] = {"quantization_config": settings}
        message = _message(_configure(folder, **({part: changes} if part else changes)))
        assert message == f"{folder} is quantised already ({how}); take the original weights"

    @pytest.mark.parametrize(
        ("file", "settings", "how"),
        [
            ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
            ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "FP8"),
            ("quantize_config.json", {"bits": 4, "group_size": 128}, "4 bits"),
            ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "4 bits"),
        ],
    )
    def test_is_told_by_other_tools(
        self, folder: Path, file: str, settings: dict[str, Any], how: str
    ) -> None:
        message = _message(_configure(folder, file, **settings))
        assert re.search(rf"is quantised already \(.*{how}\); take the original", message), message

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            (PROJECTION, torch.zeros(64, 64, dtype=torch.float8_e4m3fn)),
            (PROJECTION, torch.zeros(64, 64, dtype=torch.int8)),
            (PROJECTION, torch.zeros(64, 8, dtype=torch.uint32)),
            (f"{PROJECTION}_scale", torch.ones(1)),
            (f"{PROJECTION}_scale_inv", torch.ones(1)),
            (f"{PROJECTION}.absmax", torch.ones(24)),
            (f"{PROJECTION}.quant_state.bitsandbytes__nf4", torch.ones(24).to(torch.uint8)),
            ("model.layers.1.mlp.up_proj.qweight", torch.ones(8, 64).to(torch.int32)),
            ("model.layers.1.mlp.up_proj.scales", torch.ones(1, 64)),
            ("model.layers.1.mlp.up_proj.SCB", torch.ones(64)),
        ],
        ids=lambda value: str(value.dtype) if isinstance(value, torch.Tensor) else value[-12:],
    )
    def test_is_told_by_the_tensors(self, folder: Path, name: str, tensor: torch.Tensor) -> None:
        message = _message(_put(folder, {name: tensor}))
        assert re.search(rf"is quantised already \(.*{re.escape(name)}.*; take the", message)

    def test_a_quantised_kv_cache_is_none_of_the_weights(self, folder: Path) -> None:
        algorithms = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
        _configure(folder, "hf_quant_config.json", quantization=algorithms)
        for nothing in (None, {}):
            load_backbone(_configure(folder, quantization_config=nothing))


class TestFilesThatAreNotThere:
    @pytest.mark.parametrize(
        "name",
        [
            *(WEIGHTS, "tokenizer.json", "config.json", "tokenizer_config.json"),
            *("chat_template.jinja", "chat_template.json"),
        ],
    )
    def test_a_git_lfs_pointer_is_named(self, folder: Path, name: str) -> None:
        (folder / name).write_text(POINTER)
        message = _message(folder)
        assert message.startswith(f"{folder / name} is a Git LFS pointer")
        assert "git lfs pull" in message
        assert "hf download" in message

    def test_pointers_that_nothing_reads_are_no_matter(self, folder: Path) -> None:
        for name in ("consolidated.safetensors", "tokenizer.model", "picture.png"):
            (folder / name).write_text(POINTER)
        load_backbone(folder)

    def test_a_shard_that_is_a_pointer_is_named(self, folder: Path) -> None:
        shards = _in_shards(folder)
        shards[1].write_text(POINTER)
        assert _message(folder).startswith(f"{shards[1]} is a Git LFS pointer")

    def test_shards_with_their_index_are_one_model(self, folder: Path, saved: Path) -> None:
        _in_shards(folder)
        whole = load_file(saved / WEIGHTS)
        model = load_backbone(folder)[0]
        assert all(torch.equal(model.state_dict()[name], whole[name]) for name in whole)

    @pytest.mark.parametrize(
        ("lost", "cause"),
        [
            (1, "lacks model-00002-of-00002.safetensors, which its .* names; get all parts"),
            (INDEX, "holds 2 parts of weights, .*, without their .*index.json; get it too"),
        ],
    )
    def test_a_lost_part_is_named(self, folder: Path, lost: int | str, cause: str) -> None:
        shards = _in_shards(folder)
        (shards[lost] if isinstance(lost, int) else folder / lost).unlink()
        assert re.search(cause, _message(folder))

    @pytest.mark.parametrize(
        "place",
        [
            f"{WEIGHTS}.incomplete",
            f"{WEIGHTS}.aria2",
            f".cache/huggingface/download/{'0' * 20}.incomplete",
        ],
    )
    def test_a_download_that_is_not_finished_is_named(self, folder: Path, place: str) -> None:
        if not place.endswith("aria2"):  # which writes beside a file of the full size
            (folder / WEIGHTS).unlink()
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(b"abc")
        assert "is not finished" in _message(folder)

    @pytest.mark.parametrize("contents", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
    def test_an_index_without_tensors_is_named(
        self, folder: Path, contents: dict[str, Any]
    ) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(contents))
        assert f"{INDEX} names no tensors" in _message(folder)

    @pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
    def test_an_index_without_metadata_is_enough(
        self, folder: Path, metadata: dict[str, Any]
    ) -> None:
        _in_shards(folder)
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        (folder / INDEX).write_text(json.dumps({"weight_map": places, **metadata}))
        load_backbone(folder)

    @pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors"])
    def test_weights_under_another_name_are_named(self, folder: Path, name: str) -> None:
        (folder / WEIGHTS).rename(folder / name)
        assert f"holds {name} and no {WEIGHTS}, which is what is read; get it" in _message(folder)

    @pytest.mark.parametrize(
        ("pattern", "replacement"),
        [
            ("^", "module."),
            ("^", "_orig_mod."),
            ("^", "pretrained_model."),
            (r"^model\.", "model._orig_mod."),
            (r"(?=self_attn|mlp|model)", "_fsdp_wrapped_module."),
            ("^", "module._orig_mod."),
        ],
    )
    def test_weights_with_the_names_of_a_wrapper_are_told(
        self, folder: Path, pattern: str, replacement: str
    ) -> None:
        weights = load_file(folder / WEIGHTS)
        named = {re.sub(pattern, replacement, name): one for name, one in weights.items()}
        save_file(named, folder / WEIGHTS, {"format": "pt"})
        assert "was wrapped in names it; save the model itself" in _message(folder)

    @pytest.mark.parametrize(
        ("name", "content", "packages"),
        [
            ("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece protobuf"),
            ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
            ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ],
    )
    def test_the_package_of_a_tokenizer_is_named(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        content: bytes,
        packages: str,
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        (folder / "tokenizer.json").unlink()
        (folder / name).write_bytes(content)
        assert _message(folder).endswith(f"is not installed; run: pip install {packages}")

    def test_a_tensor_that_is_in_two_parts_is_named(self, folder: Path) -> None:
        shards = _in_shards(folder)
        save_file({**load_file(shards[0]), "model.norm.weight": torch.zeros(64)}, shards[0])
        save_file({**load_file(shards[1]), "model.norm.weight": torch.ones(64)}, shards[1])
        assert "holds model.norm.weight in more than one file" in _message(folder)

    def test_one_file_beside_an_index_is_taken_and_told(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shutil.copyfile(folder / WEIGHTS, folder / "other.safetensors")
        _in_shards(folder)
        (folder / "other.safetensors").rename(folder / WEIGHTS)
        load_backbone(folder)
        assert f"has an {INDEX} too, and {WEIGHTS} is taken" in caplog.text


class TestAdapter:
    def test_beside_its_model_is_refused(self, folder: Path) -> None:
        _configure(folder, "adapter_config.json", **ADAPTER)
        assert re.search(r"an adapter \(LORA\) of org/base .*merge_and_unload", _message(folder))

    def test_alone_is_refused(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        _configure(tmp_path, "adapter_config.json", **ADAPTER)
        byte_tokenizer().save_pretrained(tmp_path)
        assert re.search(r"an adapter \(LORA\) of org/base .*merge_and_unload", _message(tmp_path))

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapters.safetensors"])
    def test_without_its_settings_is_refused(self, folder: Path, name: str) -> None:
        save_file({"a": torch.zeros(1)}, folder / name)
        assert "has an adapter (PEFT) of another model in it" in _message(folder)

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1.mlp.up_proj.lora_A.weight",
            "model.layers.1.mlp.up_proj.base_layer.weight",
            "base_model.model.model.layers.1.mlp.up_proj.weight",
        ],
    )
    def test_among_the_weights_is_refused(self, folder: Path, name: str) -> None:
        message = _message(_put(folder, {name: torch.zeros(3)}))
        assert re.search(rf"weights of an adapter \({name}\).*merge_and_unload", message)

    def test_on_the_model_is_refused(self) -> None:
        class Linear(torch.nn.Linear):  # as PEFT's
            __module__ = "peft.tuners.lora.layer"

        model = byte_model(**SIZES)
        model.model.layers[1].self_attn.q_proj = Linear(64, 64)
        with pytest.raises(UnsupportedModelError, match=r"an adapter on it .*merge_and_unload\(\)"):
            attach_river(model)


class TestSettings:
    @pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("flash_attention_2", "sdpa"),
            ("flex_attention", "sdpa"),
            ("org/some-kernel", "sdpa"),
            ("nonsense", "sdpa"),
            (5, "sdpa"),
            ("eager", "eager"),
        ],
    )
    def test_the_attention_is_one_of_pytorch(
        self, folder: Path, key: str, value: object, expected: str
    ) -> None:
        model = load_backbone(_configure(folder, **{key: value}))[0]
        assert model.config._attn_implementation == expected

    def test_the_attention_is_no_matter_where_its_weights_are_wanted(self, folder: Path) -> None:
        load_backbone(
            _configure(folder, attn_implementation="flash_attention_2", output_attentions=True)
        )

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    @pytest.mark.parametrize("value", ["bf16", "auto", "torch.bfloat16", 5, ["float16"], "int8"])
    def test_the_dtype_is_the_one_asked_for(self, folder: Path, key: str, value: object) -> None:
        model = load_backbone(_configure(folder, **{key: value}))[0]
        assert model.dtype == torch.bfloat16
        assert model.name_or_path == str(folder)

    @pytest.mark.parametrize(
        "settings", [{"pad_token_id": 272}, {"pad_token_id": -273}, {"return_dict": False}]
    )
    def test_what_changes_no_answer_stops_no_load(
        self, folder: Path, settings: dict[str, Any]
    ) -> None:
        model = load_backbone(_configure(folder, **settings))[0]
        assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 272)

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_byte_order_marks_are_no_matter(self, folder: Path, encoding: str) -> None:
        expected = load_backbone(folder)[1]("Hi 12").input_ids
        _configure(folder, "generation_config.json", eos_token_id=[1, 7])
        for file in folder.glob("*.json"):
            file.write_text(file.read_text(), encoding=encoding)
        model, tokenizer = load_backbone(folder)
        assert model.generation_config.eos_token_id == [1, 7]
        assert tokenizer("Hi 12").input_ids == expected
        assert tokenizer.name_or_path == str(folder)

    @pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
    @pytest.mark.parametrize("name", ["rope_type", "type"])
    def test_an_unknown_rotary_type_is_named(self, folder: Path, key: str, name: str) -> None:
        rope = {name: "su2", "rope_theta": 1e4, "factor": 2.0}
        assert "names the rotary type 'su2'" in _message(_configure(folder, **{key: rope}))

    def test_an_unknown_rotary_type_of_one_kind_of_layer_is_named(self, tmp_path: Path) -> None:
        save_folder(tmp_path, byte_model("Gemma3Text", head_dim=16, **SIZES))
        default = {"rope_type": "default", "rope_theta": 1e4}
        rope = {"sliding_attention": default, "full_attention": {**default, "rope_type": "su2"}}
        message = _message(_configure(tmp_path, rope_parameters=rope))
        assert "names the rotary type 'su2'" in message

    def test_a_rotary_setting_that_is_missing_is_named(self, folder: Path) -> None:
        rope = {"rope_type": "yarn", "rope_theta": 1e4}
        message = _message(_configure(folder, rope_parameters=rope))
        assert re.search(r"the rotary settings of .*'factor'.*; correct config\.json", message)

    @pytest.mark.parametrize(
        ("settings", "cause"),
        [
            ({"hidden_act": "martian"}, r"what transformers doesn't know \('martian'\); upgrade"),
            ({"num_attention_heads": "4"}, r"config\.json of .* isn't valid \(.*; correct it$"),
        ],
    )
    def test_what_transformers_does_not_take_is_named(
        self, folder: Path, settings: dict[str, Any], cause: str
    ) -> None:
        assert re.search(cause, _message(_configure(folder, **settings)))

    def test_more_layers_than_tensors_are_no_model(self, folder: Path) -> None:
        message = _message(_configure(folder, num_hidden_layers=10**9))
        assert "speaks of 1000000000 layers" in message

    @pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
    def test_settings_that_are_damaged_are_named(self, folder: Path, name: str) -> None:
        (folder / name).write_text('{"eos_token_id": [1,')
        assert f"{name} is no valid JSON" in _message(folder)


class TestTensorsWithoutAPlace:
    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.2.mlp.up_proj.weight",
            "layers.2.mlp.up_proj.weight",
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.k_norm_scale",
            "model.layers.0.self_attn.bias",
            "model.norm.bias",
            "model.embed_norm.weight",
            "lm_head.bias",
        ],
    )
    def test_are_refused_where_they_change_the_answer(self, folder: Path, name: str) -> None:
        message = _message(_put(folder, {name: torch.zeros(3)}))
        assert f"holds 1 tensor ({name}) that LlamaForCausalLM" in message

    @pytest.mark.parametrize(
        "name",
        [
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
        ],
    )
    def test_are_left_out_where_another_part_has_them(
        self, folder: Path, caplog: pytest.LogCaptureFixture, name: str
    ) -> None:
        load_backbone(_put(folder, {name: torch.zeros(3)}))
        assert not [one for one in caplog.records if one.name.startswith("river_llm")]

    def test_are_told_where_nothing_is_known_of_them(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        load_backbone(_put(folder, {"something.weight": torch.zeros(3)}))
        assert "no part of the model takes 1 tensor (something.weight)" in caplog.text

    def test_layers_that_predict_further_tokens_are_left_out(self, folder: Path) -> None:
        name = "model.layers.2.mlp.up_proj.weight"
        _configure(_put(folder, {name: torch.zeros(3)}), num_nextn_predict_layers=1)
        load_backbone(folder)

    @pytest.mark.parametrize(
        ("architecture", "name"),
        [
            ("GPT2", "h.0.attn.bias"),
            ("GPT2", "transformer.h.0.attn.masked_bias"),
            ("GPTNeoX", "gpt_neox.layers.0.attention.bias"),
        ],
    )
    def test_masks_of_older_checkpoints_are_left_out(
        self, tmp_path: Path, architecture: str, name: str
    ) -> None:
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        load_backbone(_put(save_folder(tmp_path, model), {name: torch.zeros(1, 1, 8, 8)}))

    def test_a_tied_head_has_to_be_the_embedding(self, tmp_path: Path) -> None:
        model = byte_model(tie_word_embeddings=True, **SIZES)
        embedding = model.model.embed_tokens.weight.detach()
        _put(save_folder(tmp_path, model), {"lm_head.weight": embedding.clone()})
        load_backbone(tmp_path)
        _put(tmp_path, {"lm_head.weight": embedding + 1})
        assert "an LM head that differs from the embedding" in _message(tmp_path)
        loaded = load_backbone(_configure(tmp_path, tie_word_embeddings=False))[0]
        assert torch.equal(loaded.lm_head.weight, embedding + 1)


class TestTokenizer:
    TEXT = "Hi 1234 5\n\n  x = [\n    10,\n]\tÄé 漢字 e\u0301 <|im_end|> a's"

    @pytest.mark.parametrize("of_class", ["Qwen2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizer"])
    def test_is_that_of_tokenizer_json_whatever_its_class(
        self, folder: Path, of_class: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        _digits_in_threes(folder)
        _configure(folder, "tokenizer_config.json", tokenizer_class=of_class)
        caplog.set_level(logging.INFO)
        tokenizer = load_backbone(folder)[1]
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = own.encode(self.TEXT, add_special_tokens=False).ids
        assert tokenizer(self.TEXT, add_special_tokens=False).input_ids == expected
        assert tokenizer.eos_token == "</s>"
        assert tokenizer.chat_template == byte_tokenizer().chat_template
        is_told = "splits text otherwise than tokenizer.json" in caplog.text
        assert is_told == (of_class != "LlamaTokenizer")  # which transformers sees

    def test_of_a_class_that_agrees_stays_as_it_is(self, folder: Path) -> None:
        _configure(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        assert type(load_backbone(folder)[1]).__name__ == "Qwen2Tokenizer"

    @pytest.mark.parametrize("of_class", ["LlamaTokenizerFast", "GemmaTokenizer", "Qwen2Tokenizer"])
    def test_adds_what_its_class_adds_by_the_flags_of_its_settings(
        self, folder: Path, of_class: str
    ) -> None:
        settings = {"tokenizer_class": of_class, "add_bos_token": True, "add_eos_token": True}
        before = load_backbone(folder)[1]("Hi").input_ids
        _configure(folder, "tokenizer_config.json", **settings)
        has_flags = of_class != "Qwen2Tokenizer"
        expected = [0, *before, 1] if has_flags else before
        assert load_backbone(folder)[1]("Hi").input_ids == expected
        _configure(folder, "tokenizer_config.json", add_bos_token=False)
        assert load_backbone(folder)[1]("Hi").input_ids == expected[has_flags:]

    @pytest.mark.parametrize(
        "template", ["X{{ 1 }}", [{"name": "default", "template": "\ufeffX{{ 1 }}"}]]
    )
    def test_takes_the_template_of_an_old_processor_where_it_has_none(
        self, folder: Path, template: object
    ) -> None:
        _configure(folder, "chat_template.json", chat_template=template)
        assert load_backbone(folder)[1].chat_template == byte_tokenizer().chat_template
        (folder / "chat_template.jinja").unlink()
        assert load_backbone(folder)[1].get_chat_template() == "X{{ 1 }}"

    def test_has_no_byte_order_mark_in_its_template(self, folder: Path) -> None:
        file = folder / "chat_template.jinja"
        file.write_text(file.read_text(), encoding="utf-8-sig")
        assert load_backbone(folder)[1].chat_template == byte_tokenizer().chat_template

    @pytest.mark.parametrize(
        ("encoding", "cause"), [("utf-16", "is UTF-16 text"), ("latin-1", "is no UTF-8 text")]
    )
    def test_has_a_template_in_utf_8(self, folder: Path, encoding: str, cause: str) -> None:
        (folder / "chat_template.jinja").write_text("Grüße", encoding=encoding)
        assert _message(folder).startswith(f"{folder / 'chat_template.jinja'} {cause}")

    def test_is_the_same_from_a_packed_copy(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RIVER_LLM_CACHE", str(tmp_path / "cache"))
        _digits_in_threes(folder)
        _configure(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
        first, second = (byte_lm(folder).tokenizer(self.TEXT).input_ids for _ in range(2))
        assert first == second
        assert list(tmp_path.rglob("packed.json"))


class TestGemma3WithImages:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        "named",
        [
            lambda name: name,
            lambda name: (
                re.sub(r"^(?=vision|multi)|^language_model\.(?=lm_head)", "model.", name)
                .replace("model.lm_head", "lm_head")
                .replace("language_model.model.", "model.language_model.")
            ),
        ],
        ids=["language_model.model", "model.language_model"],
    )
    def test_runs_its_text_part_on_the_native_engine(
        self, tmp_path: Path, tied: bool, named: Callable[[str], str]
    ) -> None:
        whole = _gemma3(tied)
        save_folder(tmp_path, whole)
        weights = {named(name): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
        save_file(weights, tmp_path / WEIGHTS, {"format": "pt"})
        model = load_backbone(tmp_path, torch.float32)[0]
        assert type(model).__name__ == "Gemma3ForCausalLM"
        tokens = torch.tensor([IDS[:40]])
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, whole(input_ids=tokens).logits)
        lm = byte_lm(tmp_path)
        assert (lm.engine.name, lm.fallback_reason) == ("cpu", None)
        assert logits_cosine(lm, model, IDS[:40]) > 0.999

    def test_keeps_the_ends_of_the_whole_model(self, tmp_path: Path) -> None:
        save_folder(tmp_path, _gemma3(True), eos_token_id=[1, 106])
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
        return Path(
            shutil.copytree(saved, repository / "snapshots" / ("0" * 40), copy_function=os.link)
        )

    def test_a_model_in_its_cache_is_loaded(self, snapshot: Path) -> None:
        assert huggingface_hub.try_to_load_from_cache("org/name", "config.json")
        assert load_backbone("org/name")[0].config.num_hidden_layers == 2

    def test_a_model_in_its_cache_is_looked_at(self, snapshot: Path) -> None:
        (snapshot / "quantize_config.json").write_text('{"bits": 4}')
        assert _message("org/name").startswith("org/name is quantised already")

    def test_an_index_without_metadata_is_named(self, snapshot: Path) -> None:
        _in_shards(snapshot)
        places = json.loads((snapshot / INDEX).read_text())["weight_map"]
        (snapshot / INDEX).write_text(json.dumps({"weight_map": places}))
        assert _message("org/name").startswith(f"the {INDEX} of org/name has no metadata; download")

    def test_a_model_in_its_cache_has_the_template_and_flags_of_its_files(
        self, snapshot: Path
    ) -> None:
        (snapshot / "chat_template.jinja").unlink()
        _configure(snapshot, "chat_template.json", chat_template="X")
        settings = json.loads((snapshot / "tokenizer_config.json").read_text())
        (snapshot / "tokenizer_config.json").unlink()  # a link to the one of all tests
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        _configure(snapshot, "tokenizer_config.json", **settings)
        tokenizer = load_backbone("org/name")[1]
        assert tokenizer.chat_template == "X"
        assert tokenizer("Hi").input_ids[0] == 0


def _in_shards(folder: Path) -> list[Path]:
    """Write the weights in two files and their index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {}
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return shards


def _digits_in_threes(folder: Path) -> None:
    """A pre-tokenizer and merges that no class of transformers has."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    settings = json.loads(tokenizer.to_str())
    vocabulary = settings["model"]["vocab"]
    settings["model"]["merges"] = [["1", "2"], ["12", "3"], ["3", "4"], ["Ġ", "5"], ["Ċ", "Ċ"]]
    for token in ("12", "123", "34", "Ġ5", "ĊĊ"):
        vocabulary[token] = len(vocabulary)
    (folder / "tokenizer.json").write_text(json.dumps(settings))


def _gemma3(tied: bool) -> Gemma3ForConditionalGeneration:
    text = {
        **SIZES,
        "vocab_size": 260,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=tied
    )
    return Gemma3ForConditionalGeneration(config).eval()
