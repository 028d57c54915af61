"""What the native core says to wrong arguments: a ValueError or TypeError that names what is wrong,
and nothing has changed. Never a crash, and never numbers taken for what they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("river_llm._core", reason="the native engine was not built")

from tiny_core import (
    GROUP,
    HIDDEN,
    INNER,
    LAYERS,
    POSITIONS,
    PROJECTIONS,
    SETTINGS,
    VOCABULARY,
    angles,
    codes,
    empty_core,
    load_positions,
    ready_core,
    run_pass,
    run_python,
    weights,
)

from river_llm import _core

GENERATOR = np.random.default_rng(1)
NONE = np.empty(0, np.float32)
FOUR_BITS = SETTINGS["river"][0]


def _weights(*shape: int) -> Any:
    return np.zeros(shape, np.uint16)


def _floats(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _codes(rows: int, columns: int, **parts: Any) -> Any:
    packed, scales, zeros = codes(GENERATOR, rows, columns)
    found = {"packed": packed, "scales": scales, "zeros": zeros, **parts}
    return tuple(found.values())


WRONG_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no thread": ({"threads": 0}, "threads have to be 1 to 1024"),
    "too many threads": ({"threads": 1025}, "threads have to be 1 to 1024"),
    "threads beyond an int": ({"threads": 2**40}, "incompatible"),
    "unknown kernels": ({"kernels": "sse9"}, "no kernels named 'sse9'; it has .*portable"),
    "negative kinds of angles": ({"rope_kinds": -1}, "rotary"),
    "17 kinds of angles": ({"rope_kinds": 17}, "rotary"),
    "a negative boundary": ({"rope_boundary": -1}, "boundary"),
    "an odd width": ({"hidden_size": 72}, "multiples of 16"),
    "an odd inner width": ({"intermediate_size": 100}, "multiples of 16"),
    "an odd head dim": ({"head_dim": 24, "rotary_dim": 24}, "multiples of 16"),
    "heads that share no keys": ({"num_heads": 3}, "multiple of the key-value heads"),
    "65 heads for one key": ({"num_heads": 65, "num_kv_heads": 1}, "more than 64 heads"),
    "an odd rotary dim": ({"rotary_dim": 15}, "rotary dim"),
    "a rotary dim above the head's": ({"rotary_dim": 32}, "rotary dim"),
    "a negative rotary dim": ({"rotary_dim": -2}, "rotary dim"),
    "a group of 48": ({"river": (FOUR_BITS, 48)}, "groups of 32, 64 or 128"),
    "a group that is too wide": (
        {"river": (FOUR_BITS, 128)},
        "a width is no multiple of the group",
    ),
    "7 bits": ({"river": ([[4] * 4, [4, 4, 4, 7]], GROUP)}, "16, 8 or 3 to 6 bits"),
    "a river of bfloat16": ({"river": ([[4] * 4, [4, 4, 4, 16]], GROUP)}, "weights are codes"),
    "bits of one layer": ({"river": (FOUR_BITS[1:], GROUP)}, "bits for each projection of each"),
    "bits of three projections": ({"river": ([[4] * 3] * LAYERS, GROUP)}, "incompatible"),
    "8 bits without groups": ({"head": (8, 0)}, "groups of 32, 64 or 128"),
    "a KV cache of 4 bits": ({"kv_bits": 4}, "a KV cache has 16 or 8 bits"),
    "heads too wide for codes": ({"kv_bits": 8, "head_dim": 528, "num_heads": 2}, "512 dims"),
    "a size that is no number": ({"num_layers": "two"}, "num_layers"),
    "half a layer": ({"num_layers": 2.5}, "num_layers"),
    **{
        f"{name} {value}": ({name: value}, "size|zero|negative|large|head|group")
        for name in ("num_layers", "hidden_size", "num_heads", "head_dim", "vocab_size")
        for value in (0, -16, 2**30)
    },
    "more heads than an int holds": ({"num_heads": 2**28, "num_kv_heads": 2**28}, "large|size"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_settings_that_no_core_has(case: str) -> None:
    changes, message = WRONG_SETTINGS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        empty_core(**changes)


def test_a_shape_that_lacks_a_size() -> None:
    with pytest.raises(KeyError, match="num_layers"):
        _core.Engine({}, (16, 0), (FOUR_BITS, 32), (16, 0), 1, "", 0)


def _side(projection: int = 1, matrices: Any = None, make: Any = _weights) -> list[Any]:
    """A side of a layer, with other matrices for one projection."""
    side = [[make(*size) for size in of] for of in PROJECTIONS]
    side[projection] = matrices
    return side


MATRIX = _weights(64, HIDDEN)
WRONG_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "weights of float32": ({"backbone": _side(1, [_floats(64, 64)])}, "bfloat16 in uint16"),
    "of float16": ({"backbone": _side(1, [MATRIX.view(np.float16)])}, "bfloat16 in uint16"),
    "of one dimension": ({"backbone": _side(1, [_weights(4096)])}, "bfloat16 in uint16"),
    "with gaps": ({"backbone": _side(1, [MATRIX[:, ::-1]])}, "without gaps"),
    "no array": ({"backbone": _side(1, [None])}, "bfloat16 in uint16"),
    "too narrow": ({"backbone": _side(1, [_weights(64, 32)])}, "the model's width"),
    "too few rows": ({"backbone": _side(1, [_weights(32, 64)])}, "number of outputs"),
    "none": ({"backbone": _side(1, [])}, "number of outputs"),
    "gate without up": ({"backbone": _side(2, [_weights(2 * INNER, HIDDEN)])}, "gate and up"),
    "more gate": ({"backbone": _side(2, [_weights(112, 64), _weights(80, 64)])}, "gate and up"),
    "three projections": ({"backbone": _side()[1:]}, "for each of four projections"),
    "a side that is no list": ({"river": 5}, "for each of four projections"),
    "codes for bfloat16": ({"backbone": _side(1, [_codes(64, 64)])}, "bfloat16 in uint16"),
    "bfloat16 for codes": ({"river": _side(1, [MATRIX], _codes)}, "codes, scales and zeros"),
    "too few groups": (
        {"river": _side(1, [_codes(64, 64, scales=_weights(64, 1))], _codes)},
        "don't fit together",
    ),
    "codes of 8 bits": (
        {"river": _side(1, [_codes(64, 64, packed=np.zeros((64, 64), np.uint8))], _codes)},
        "don't fit together",
    ),
    "scales of float32": (
        {"river": _side(1, [_codes(64, 64, scales=_floats(64, 2))], _codes)},
        "codes, scales and zeros",
    ),
    "a norm's size": ({"mlp_norm": _floats(63)}, "mlp_norm"),
    "a norm's shape": ({"mlp_norm": _floats(64, 1)}, "mlp_norm"),
    "a norm in bits": ({"mlp_norm": _weights(64)}, "mlp_norm"),
    "a norm as a list": ({"mlp_norm": [1.0] * 64}, "mlp_norm"),
    "a bias's size": ({"qkv_bias": _floats(64)}, "qkv_bias"),
    "an unknown part": ({"norm": _floats(64)}, "unknown part"),
    "a window that is text": ({"window": "x"}, "window"),
    "a negative window": ({"window": -1}, "window"),
    "no such angles": ({"rope": 1}, "no such rotary angles"),
}
Call = Callable[[_core.Engine], Any]
WRONG_LOADS: dict[str, tuple[Call, str]] = {
    **{
        name: (lambda core, parts=parts: core.load_layer(0, {"rope": 0, **parts}), message)
        for name, (parts, message) in WRONG_LAYERS.items()
    },
    "of no layer": (lambda core: core.load_layer(2, {}), "no such layer"),
    "of a negative layer": (lambda core: core.load_layer(-1, {}), "no such layer"),
    "an LM head's rows": (lambda core: core.load_head({"weights": _weights(96, 64)}), "LM head"),
    "its width": (lambda core: core.load_head({"weights": _weights(97, 32)}), "the model's width"),
    "one in codes": (lambda core: core.load_head({"weights": _codes(97, 64)}), "bfloat16"),
    "embedding rows": (lambda core: core.load_head({"embedding": _weights(96, 64)}), "embedding"),
    "a final norm": (lambda core: core.load_head({"final_norm": _floats(63)}), "final_norm"),
    "a drafts' head": (lambda core: core.load_draft_head(_codes(96, 64), 4, GROUP), "LM head"),
    "one of 16 bits": (lambda core: core.load_draft_head(_codes(97, 64), 16, GROUP), "codes have"),
    "one without groups": (lambda core: core.load_draft_head(_codes(97, 64), 4, 0), "codes have"),
    "angles of no table": (lambda core: core.load_positions(0, [], NONE), "each rotary table"),
    "angles with a gap": (lambda core: load_positions(core, POSITIONS + 1), "gap"),
    "angles from -1 on": (lambda core: load_positions(core, -1), "angles"),
    "angles too narrow": (lambda core: core.load_positions(0, [angles(4, 14)], NONE), "shape"),
    "more cosines than sines": (
        lambda core: core.load_positions(0, [(angles(5)[0], angles(4)[1])], NONE),
        "wrong shape",
    ),
    "scales with a gap": (lambda core: core.load_positions(9, [angles(4)], _floats(4)), "gap"),
}


@pytest.mark.parametrize("case", WRONG_LOADS)
def test_weights_that_do_not_fit_change_nothing(case: str) -> None:
    call, message = WRONG_LOADS[case]
    core = ready_core()
    before = core.logits(run_pass(core, tokens=[5, 6, 7])[-1])
    with pytest.raises((ValueError, TypeError), match=message):
        call(core)
    if "gap" not in case:  # else some angles are gone, which the engine sets again
        core.truncate(0, 0)
        number = run_pass(core, tokens=[5, 6, 7])[-1]
        np.testing.assert_array_equal(core.logits(number), before)


WRONG_PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": [], "logit_rows": []}, "no rows"),
    "a token above the vocabulary": ({"tokens": [VOCABULARY]}, "no such token"),
    "a negative token": ({"tokens": [-1]}, "no such token"),
    "a token beyond an int": ({"tokens": [2**40]}, "incompatible"),
    "half a token": ({"tokens": [1.5]}, "incompatible"),
    "no such sequence": ({"sequences": [1]}, "no such sequence"),
    "sequence -1": ({"sequences": [-1]}, "no such sequence"),
    "two sequences of one token": ({"sequences": [0, 0]}, "differ in number"),
    "too few thresholds": ({"thresholds": _floats(1)}, "one threshold for each layer"),
    "too many thresholds": ({"thresholds": _floats(3)}, "one threshold for each layer"),
    "thresholds of two rows": ({"thresholds": _floats(2, LAYERS)}, r"\[rows, layers\]"),
    "thresholds of one row too short": ({"thresholds": _floats(1, 1)}, "one threshold"),
    "one threshold alone": ({"thresholds": np.array(1, np.float32)}, "thresholds are"),
    "thresholds of 3 dims": ({"thresholds": _floats(1, 1, LAYERS)}, "thresholds are"),
    "thresholds with gaps": ({"thresholds": _floats(2 * LAYERS)[::2]}, "incompatible"),
    "thresholds of float64": ({"thresholds": np.ones(LAYERS)}, "incompatible"),
    "no row for logits": ({"logit_rows": [1]}, "no such row"),
    "row -1": ({"logit_rows": [-1]}, "no such row"),
    "more logits than rows": ({"logit_rows": [0] * 3000}, "more rows of logits than rows"),
    "mean group 1 of 1": ({"mean_groups": [1]}, "group is out of range"),
    "minimum group -1": ({"minimum_groups": [-1]}, "group is out of range"),
    "groups of more rows": ({"mean_groups": [0, 0]}, "one mean group for each row"),
    "minimum groups of more rows": ({"minimum_groups": [0, 0]}, "one minimum group"),
    "no head for drafts": ({"draft_head": True}, "no LM head for drafts"),
    "more positions than there are": ({"tokens": [5] * POSITIONS}, "rotary table is too short"),
}


@pytest.mark.parametrize("case", WRONG_PASSES)
def test_a_pass_that_cannot_be_leaves_the_cache_as_it_was(case: str) -> None:
    changes, message = WRONG_PASSES[case]
    core, untouched = ready_core(), ready_core()
    for each in (core, untouched):
        number = run_pass(each, tokens=[5, 6, 7])[-1]
    with pytest.raises((ValueError, TypeError), match=message):
        run_pass(core, **changes)
    assert core.length(0) == 3
    if "incompatible" not in message and "threshold" not in case:
        for gone in (number, number + 1):  # the last pass's logits have gone with it
            with pytest.raises(RuntimeError, match="logits are gone"):
                core.logits(gone)
    logits = [each.logits(run_pass(each)[-1]) for each in (core, untouched)]
    np.testing.assert_array_equal(*logits)


def _page(core: _core.Engine) -> Any:
    run_pass(core)
    (page,) = core.read_pages(0, 1)
    return page.copy()


WRONG_CACHES: dict[str, tuple[Call, str]] = {
    "a negative length": (lambda core: core.truncate(0, -1), "negative"),
    "no sequence to truncate": (lambda core: core.truncate(1, 0), "no such sequence"),
    "no sequence to drop": (lambda core: core.drop_sequence(1), "no such sequence"),
    "one dropped twice": (lambda core: [core.drop_sequence(0)] * 2 + [core.length(0)], "sequence"),
    "no sequence to measure": (lambda core: core.length(1), "no such sequence"),
    "sequence -1": (lambda core: core.length(-1), "no such sequence"),
    "no sequence to go on": (lambda core: core.longest_after([0, 1]), "no such sequence"),
    "no sequence to read pages of": (lambda core: core.read_pages(1, 0), "no such sequence"),
    "pages of more positions": (lambda core: core.read_pages(0, 1), "no such positions"),
    "pages of -1 positions": (lambda core: core.read_pages(0, -1), "no such positions"),
    "no sequence to write to": (lambda core: core.write_pages(1, [], 0), "no such sequence"),
    "a page too many": (lambda core: core.write_pages(0, [_page(core)], 0), "in so many pages"),
    "a page too few": (lambda core: core.write_pages(0, [_page(core)], 65), "in so many pages"),
    "pages of a negative length": (lambda core: core.write_pages(0, [], -1), "in so many pages"),
    "half a page": (lambda core: core.write_pages(0, [_page(core)[::2].copy()], 1), "wrong size"),
    "a page of words": (
        lambda core: core.write_pages(0, [_page(core).view(np.uint16)], 1),
        "incompatible",
    ),
    "a page with gaps": (
        lambda core: core.write_pages(0, [np.repeat(_page(core), 2)[::2]], 1),
        "incompatible",
    ),
    "no layer to weigh": (lambda core: core.layer_bytes(2, 0), "no such layer"),
    "layer -1": (lambda core: core.layer_bytes(-1, 0), "no such layer"),
    "rows of no head": (lambda core: core.head_rows(96, 2), "no such rows"),
    "bandwidth of no memory": (lambda core: _core.read_bandwidth(5, 1), "at least 1 MiB"),
    "bandwidth of no thread": (lambda core: _core.read_bandwidth(1 << 20, 0), "thread"),
}


@pytest.mark.parametrize("case", WRONG_CACHES)
def test_what_is_not_there(case: str) -> None:
    call, message = WRONG_CACHES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call(ready_core())


@pytest.mark.parametrize("settings", [{"tied_head": False}, {"head": (8, GROUP)}])
def test_a_pass_needs_positions_and_an_embedding(settings: dict[str, Any]) -> None:
    """Rows of the embedding can be read from the LM head's weights, but not from its codes."""
    core = empty_core(**settings)
    core.add_sequence()
    with pytest.raises(ValueError, match="no embedding is loaded"):
        run_pass(core)
    core.load_head({"embedding": weights(GENERATOR, VOCABULARY, HIDDEN)})
    with pytest.raises(ValueError, match="rotary table is too short"):
        run_pass(core)
    load_positions(core)
    assert not core.logits(run_pass(core)[-1]).any()  # weights are zero before they are loaded


def test_a_model_without_positions_has_no_limit_of_positions() -> None:
    code = """
from tiny_core import empty_core, run_pass
core = empty_core(rotary_dim=0, rope_kinds=0)
core.add_sequence()
try:
    run_pass(core)
except ValueError as error:
    print(error)
for layer in range(2):
    core.load_layer(layer, {"rope": -1})
run_pass(core, tokens=[5] * 70)
print(core.length(0), core.positions > 70)
"""
    assert run_python(code).splitlines() == ["a layer has no rotary angles", "70 True"]


def test_arrays_outlive_the_core() -> None:
    core = ready_core()
    records = {"record_similarities": True, "record_margins": True}
    *arrays, number = run_pass(core, tokens=[5, 6], **records)
    arrays += [core.logits(number), core.head_rows(0, 5)]
    run_pass(core, tokens=[5] * (POSITIONS - 2))
    arrays += core.read_pages(0, POSITIONS)
    arrays += core.packed_weights
    kept = [array.copy() for array in arrays]
    for _ in range(20):  # its memory goes to others
        core = ready_core()
        run_pass(core)
    for array, copy in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, copy)
