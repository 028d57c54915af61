"""Tiny random models with a byte-level tokenizer, as folders and as GGUF files: what the tests of
loading and of prompts run on. The GGUF files are as llama.cpp's converter writes them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from river_llm import ExitPolicy, RiverConfig, RiverLM
from river_llm.generate.rows import new_sequence, prefill

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_REST = itertools.count(256)
BYTES = [chr(b) if b in _PRINTABLE else chr(next(_REST)) for b in range(256)]  # GPT-2's letters
TOKENS = ["<s>", "</s>", "<unk>", *BYTES, "ab"]  # 260
TYPES = [3, 3, 3] + [1] * 257  # of `gguf.TokenType`: control, normal
IDS = np.random.default_rng(0).integers(3, 259, 300).tolist()
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}assistant: "
)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}
_PRE_NORM = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_POST_NORM = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_SANDWICH_NORM = {
    **_POST_NORM,
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}
_PERMUTED = ("llama", "mistral3", "smollm3", "granite")
_GGUF_NORMS = {"olmo2": _POST_NORM, "gemma2": _SANDWICH_NORM, "gemma3": _SANDWICH_NORM}

Packed = tuple[np.ndarray, gguf.GGMLQuantizationType]


def byte_id(character: str) -> int:
    """The token of an ASCII character."""
    return 3 + BYTES.index(character)


def byte_model(
    architecture: str = "Llama",
    vocab_size: int = 260,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> PreTrainedModel:
    """A random model, the same at every call."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**{**_SIZES, "vocab_size": vocab_size, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def speaks_only(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """The model, so changed that its next token is always this one."""
    with torch.no_grad():
        hidden_state = model.model(torch.tensor([[1, 5, 6]])).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = hidden_state
    return model


def byte_tokenizer(
    special_tokens: Sequence[str] = (), chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A token for each byte, after <s>, </s> and <unk>; special tokens come behind them."""
    vocabulary = {token: index for index, token in enumerate(TOKENS[:-1])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if special_tokens:
        fast.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    fast.chat_template = chat_template
    return fast


def save_folder(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> Path:
    """Write a model directory; `config` changes its config.json."""
    model.save_pretrained(directory)
    (tokenizer or byte_tokenizer()).save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return directory


def save_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    *,
    tokens: Sequence[str] = TOKENS,
    types: Sequence[int] = TYPES,
    tokenizer: str = "gpt2",
    pre: str | None = None,
    merges: Sequence[str] = ("a b",),
    scores: Sequence[float] | None = None,
    bos: int | None = 0,
    eos: int | None = 1,
    chat_template: str | None = CHAT_TEMPLATE,
    only: Callable[[str], bool] = lambda name: True,
    pack: Callable[[str, np.ndarray], Packed | None] = lambda name, weight: None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a model as a GGUF file in float32.

    Args:
        metadata, tensors: further ones.
        pre, merges, scores, tokens, types, tokenizer: of the tokenizer.
        only: which tensors to write, by their GGUF names.
        pack: other bytes for one of them, and their kind.
    """
    config = model.config
    rope = config.rope_parameters
    rope = next((one for one in rope.values() if isinstance(one, dict)), rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(str(path), architecture, endianess=endianess)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (metadata or {}).items():
        adders[type(value)](key, value)
    writer.add_tokenizer_model(tokenizer)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    if scores is not None:
        writer.add_token_scores(list(scores))
    writer.add_token_types(list(types))
    if tokenizer == "gpt2":
        writer.add_token_merges(list(merges))
    if bos is not None:
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, weight in _gguf_tensors(model, architecture).items():
        packed = pack(name, weight)
        if packed is not None:
            writer.add_tensor(name, packed[0], raw_dtype=packed[1])
        elif only(name):
            writer.add_tensor(name, weight)
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    names = {**_GGUF_NORMS.get(architecture, _PRE_NORM), **_GGUF_NAMES}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for own, of_gguf in names.items():
            name = name.replace(own, of_gguf)
        weight = tensor.float().numpy()
        part = name.split(".")[-2]
        if architecture in _PERMUTED and part in ("attn_q", "attn_k"):
            # llama.cpp's order of the rows, for rotations of neighbours
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        if architecture.startswith("gemma") and part.endswith("norm"):
            weight = weight + 1
        tensors[name] = np.ascontiguousarray(weight)
    return tensors


def byte_lm(source: Path, **options: Any) -> RiverLM:
    """The model in a folder or file, with a river that it never enters."""
    return RiverLM.from_pretrained(
        source,
        **{
            "river": RiverConfig(group_size=32),
            "policy": ExitPolicy.never(),
            "device": "cpu",
            **options,
        },
    )


def logits_cosine(
    lm: RiverLM,
    model: PreTrainedModel,
    token_ids: Sequence[int] = IDS,
    policy: ExitPolicy | None = None,
) -> float:
    """Cosine of the next token's logits with those of the model itself; 0.999 and more is right."""
    with new_sequence(lm.engine, len(token_ids)) as sequence:
        ours = prefill(lm.engine, sequence, token_ids, policy).logits[0].float()
    with torch.no_grad():
        own = model(torch.tensor([list(token_ids)])).logits[0, -1].float()
    return float(torch.cosine_similarity(ours[: len(own)], own, 0))
