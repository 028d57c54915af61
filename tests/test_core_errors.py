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
    POSITIONS,
    VOCABULARY,
    angles,
    codes,
    empty_core,
    ready_core,
    run_pass,
    run_python,
    weights,
)

from river_llm import _core

GENERATOR = np.random.default_rng(1)


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
    "negative threads": ({"threads": -3}, "threads have to be 1 to 1024"),
    "too many threads": ({"threads": 1025}, "threads have to be 1 to 1024"),
    "threads beyond an int": ({"threads": 2**40}, "incompatible"),
    "unknown kernels": ({"kernels": "sse9"}, "no kernels named 'sse9'; it has .*portable"),
    "negative tables": ({"rotary_tables": -1}, "rotary"),
    "an odd width": ({"hidden_size": 72}, "multiples of 16"),
    "an odd inner width": ({"intermediate_size": 100}, "multiples of 16"),
    "an odd head dim": ({"head_dim": 24, "rotary_dim": 24}, "multiples of 16"),
    "heads that share no keys": ({"num_heads": 3}, "multiple of the key-value heads"),
    "65 heads for one key": ({"num_heads": 65, "num_kv_heads": 1}, "more than 64 heads"),
    "an odd rotary dim": ({"rotary_dim": 15}, "rotary dim"),
    "a rotary dim above the head's": ({"rotary_dim": 32}, "rotary dim"),
    "a negative rotary dim": ({"rotary_dim": -2}, "rotary dim"),
    "a group of 48": ({"river": (4, 48)}, "groups of 32, 64 or 128"),
    "a group that is too wide": ({"river": (4, 128)}, "a width is no multiple of the group"),
    "3 bits": ({"river": (3, GROUP)}, "16, 8, 6 or 4 bits"),
    "8 bits without groups": ({"head": (8, 0)}, "groups of 32, 64 or 128"),
    "a size that is no number": ({"num_layers": "two"}, "num_layers"),
    "half a layer": ({"num_layers": 2.5}, "num_layers"),
    **{
        f"{name} {value}": ({name: value}, "size|zero|negative|large|head")
        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "vocab_size")
        for value in (0, -16)
    },
    **{
        f"{name} {value}": ({name: value}, "size|zero|negative|large|group")
        for name in ("intermediate_size", "head_dim")
        for value in (0, -32, 2**30)
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
        _core.Engine({}, (16, 0), (4, 32), (16, 0), 1, 1, "", 0)


Call = Callable[[_core.Engine], Any]
MATRIX = _weights(64, HIDDEN)
WRONG_WEIGHTS: dict[str, tuple[Call, str]] = {
    "of float32": (lambda core: core.set_weights(0, 1, [_floats(64, 64)]), "incompatible"),
    "of float16": (lambda core: core.set_weights(0, 1, [MATRIX.view(np.float16)]), "incompatible"),
    "of one dimension": (lambda core: core.set_weights(0, 1, [_weights(4096)]), "incompatible"),
    "with gaps": (lambda core: core.set_weights(0, 1, [MATRIX[:, ::-1]]), "incompatible"),
    "no array": (lambda core: core.set_weights(0, 1, [None]), "incompatible"),
    "too narrow": (lambda core: core.set_weights(0, 1, [_weights(64, 32)]), "wrong width"),
    "too few rows": (lambda core: core.set_weights(0, 1, [_weights(32, 64)]), "number of outputs"),
    "none": (lambda core: core.set_weights(0, 1, []), "number of outputs"),
    "gate without up": (
        lambda core: core.set_weights(0, 2, [_weights(2 * INNER, HIDDEN)]),
        "gate and up",
    ),
    "more gate than up": (
        lambda core: core.set_weights(0, 2, [_weights(112, 64), _weights(80, 64)]),
        "gate and up",
    ),
    "of no layer": (lambda core: core.set_weights(2, 1, [MATRIX]), "no such layer"),
    "of a negative layer": (lambda core: core.set_weights(-1, 1, [MATRIX]), "no such layer"),
    "of no projection": (lambda core: core.set_weights(0, 4, [MATRIX]), "no such projection"),
    "of projection -1": (lambda core: core.set_weights(0, -1, [MATRIX]), "no such projection"),
    "codes for bfloat16": (lambda core: core.set_codes(0, 1, 0, [_codes(64, 64)]), "not codes"),
    "codes of no side": (lambda core: core.set_codes(0, 1, 2, [_codes(64, 64)]), "no such side"),
    "too few groups": (
        lambda core: core.set_codes(0, 1, 1, [_codes(64, 64, scales=_weights(64, 1))]),
        "don't fit together",
    ),
    "codes of 8 bits": (
        lambda core: core.set_codes(0, 1, 1, [_codes(64, 64, packed=np.zeros((64, 64), np.uint8))]),
        "don't fit together",
    ),
    "scales of float32": (
        lambda core: core.set_codes(0, 1, 1, [_codes(64, 64, scales=_floats(64, 2))]),
        "incompatible",
    ),
    "codes of int32": (
        lambda core: core.set_codes(0, 1, 1, [_codes(64, 64, packed=np.ones((64, 32), np.int32))]),
        "incompatible",
    ),
    "an LM head's rows": (lambda core: core.set_head_weights(_weights(96, 64)), "LM head"),
    "an LM head's width": (lambda core: core.set_head_weights(_weights(97, 32)), "LM head"),
    "an LM head in codes": (lambda core: core.set_head_codes(_codes(97, 64)), "not codes"),
    "an LM head of float32": (lambda core: core.set_head_weights(_floats(97, 64)), "incompatible"),
    "embedding rows": (lambda core: core.set_embedding(_weights(96, 64)), "embedding"),
    "an embedding of float32": (lambda core: core.set_embedding(_floats(97, 64)), "incompatible"),
    "a final norm": (lambda core: core.set_final_norm(_floats(63)), "final norm"),
    "a norm's size": (lambda core: core.set_layer(0, {"mlp_norm": _floats(63)}), "mlp_norm"),
    "a norm's shape": (lambda core: core.set_layer(0, {"mlp_norm": _floats(64, 1)}), "mlp_norm"),
    "a norm in bits": (lambda core: core.set_layer(0, {"mlp_norm": _weights(64)}), "mlp_norm"),
    "a norm as a list": (lambda core: core.set_layer(0, {"mlp_norm": [1.0] * 64}), "mlp_norm"),
    "a bias's size": (lambda core: core.set_layer(0, {"qkv_bias": _floats(64)}), "qkv_bias"),
    "an unknown part": (lambda core: core.set_layer(0, {"norm": _floats(64)}), "unknown part"),
    "a window that is text": (lambda core: core.set_layer(0, {"window": "x"}), "window"),
    "no rotary table": (lambda core: core.set_layer(0, {"rope": 1}), "no such rotary table"),
    "angles of no table": (lambda core: core.set_rotary(1, 0, *angles(4)), "rotary angles"),
    "angles with a gap": (lambda core: core.set_rotary(0, 65, *angles(4)), "gap"),
    "angles from -1 on": (lambda core: core.set_rotary(0, -1, *angles(4)), "gap"),
    "angles too narrow": (lambda core: core.set_rotary(0, 0, *angles(4, 14)), "wrong shape"),
    "more cosines than sines": (
        lambda core: core.set_rotary(0, 0, angles(5)[0], angles(4)[1]),
        "wrong shape",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_change_nothing(case: str) -> None:
    call, message = WRONG_WEIGHTS[case]
    core = ready_core()
    run_pass(core, tokens=[5, 6, 7])
    before = core.logits()
    with pytest.raises((ValueError, TypeError), match=message):
        call(core)
    core.truncate(0, 0)
    run_pass(core, tokens=[5, 6, 7])
    np.testing.assert_array_equal(core.logits(), before)


WRONG_PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": [], "logit_rows": []}, "no rows"),
    "a token above the vocabulary": ({"tokens": [VOCABULARY]}, "no such token"),
    "a negative token": ({"tokens": [-1]}, "no such token"),
    "a token beyond an int": ({"tokens": [2**40]}, "incompatible"),
    "half a token": ({"tokens": [1.5]}, "incompatible"),
    "no such sequence": ({"sequences": [1]}, "no such sequence"),
    "sequence -1": ({"sequences": [-1]}, "no such sequence"),
    "two sequences of one token": ({"sequences": [0, 0]}, "differ in number"),
    "too few thresholds": ({"thresholds": [0.0]}, "one threshold for each layer"),
    "too many thresholds": ({"thresholds": [0.0] * 3}, "one threshold for each layer"),
    "no row for logits": ({"logit_rows": [1]}, "no such row"),
    "row -1": ({"logit_rows": [-1]}, "no such row"),
    "more logits than rows": ({"logit_rows": [0] * 3000}, "more rows of logits than rows"),
    "mean group 1 of 1": ({"mean_groups": [1]}, "group is out of range"),
    "minimum group -1": ({"minimum_groups": [-1]}, "group is out of range"),
    "groups of more rows": ({"mean_groups": [0, 0]}, "one mean group for each row"),
    "minimum groups of more rows": ({"minimum_groups": [0, 0]}, "one minimum group"),
    "more positions than there are": ({"tokens": [5] * POSITIONS}, "rotary table is too short"),
}


@pytest.mark.parametrize("case", WRONG_PASSES)
def test_a_pass_that_cannot_be_leaves_the_cache_as_it_was(case: str) -> None:
    changes, message = WRONG_PASSES[case]
    core, untouched = ready_core(), ready_core()
    for each in (core, untouched):
        run_pass(each, tokens=[5, 6, 7])
    with pytest.raises((ValueError, TypeError), match=message):
        run_pass(core, **changes)
    assert core.length(0) == 3
    for each in (core, untouched):
        run_pass(each)
    np.testing.assert_array_equal(core.logits(), untouched.logits())


def _page(core: _core.Engine) -> Any:
    run_pass(core)
    (page,) = core.read_pages(0, 1)
    return page.copy()


WRONG_CACHES: dict[str, tuple[Call, str]] = {
    "a negative number of sequences": (lambda core: core.resize(-1), "negative"),
    "a negative length": (lambda core: core.truncate(0, -1), "negative"),
    "no sequence to truncate": (lambda core: core.truncate(1, 0), "no such sequence"),
    "no sequence to measure": (lambda core: core.length(1), "no such sequence"),
    "sequence -1": (lambda core: core.length(-1), "no such sequence"),
    "no sequence to read": (lambda core: core.read_cache(1), "no such sequence"),
    "no sequence to read pages of": (lambda core: core.read_pages(1, 0), "no such sequence"),
    "pages of more positions": (lambda core: core.read_pages(0, 1), "no such positions"),
    "pages of -1 positions": (lambda core: core.read_pages(0, -1), "no such positions"),
    "no sequence to write to": (lambda core: core.write_pages(1, [], 0), "no such sequence"),
    "a page too many": (lambda core: core.write_pages(0, [_page(core)], 0), "in so many pages"),
    "a page too few": (lambda core: core.write_pages(0, [_page(core)], 65), "in so many pages"),
    "pages of a negative length": (lambda core: core.write_pages(0, [], -1), "in so many pages"),
    "half a page": (lambda core: core.write_pages(0, [_page(core)[::2].copy()], 1), "wrong size"),
    "no layer to weigh": (lambda core: core.layer_bytes(2, 0), "no such layer"),
    "layer -1": (lambda core: core.layer_bytes(-1, 0), "no such layer"),
}


@pytest.mark.parametrize("case", WRONG_CACHES)
def test_what_the_cache_does_not_hold(case: str) -> None:
    call, message = WRONG_CACHES[case]
    with pytest.raises(ValueError, match=message):
        call(ready_core())


def test_pages_of_other_values_than_bytes_or_with_gaps_are_refused() -> None:
    core = ready_core()
    page = _page(core)
    for other in (page.view(np.uint16), np.repeat(page, 2)[::2], page[None], page.tolist()):
        with pytest.raises(TypeError, match="incompatible"):
            core.write_pages(0, [other], 1)
    assert core.length(0) == 1
    core.write_pages(0, [page], 1)


def test_a_pass_before_positions_are_set() -> None:
    core = empty_core()
    core.resize(1)
    with pytest.raises(ValueError, match="rotary table is too short"):
        run_pass(core)


@pytest.mark.parametrize("settings", [{"tied_head": False}, {"head": (8, GROUP)}])
def test_a_pass_before_an_embedding_is_set(settings: dict[str, Any]) -> None:
    """Rows of the embedding can be read from the LM head's weights, but not from its codes."""
    core = empty_core(**settings)
    core.set_rotary(0, 0, *angles(4))
    core.resize(1)
    with pytest.raises(ValueError, match="no embedding is set"):
        run_pass(core)
    core.set_embedding(weights(GENERATOR, VOCABULARY, HIDDEN))
    run_pass(core)


def test_a_pass_before_weights_are_set_gives_zeros() -> None:
    core = empty_core()
    core.set_rotary(0, 0, *angles(4))
    core.resize(1)
    run_pass(core)
    assert not core.logits().any()


def test_logits_after_a_pass_that_failed_are_none() -> None:
    code = """
from tiny_core import ready_core, run_pass
core = ready_core()
run_pass(core)
for tokens in ([-1], []):
    try:
        run_pass(core, tokens=tokens)
    except ValueError:
        print(core.logits().shape)
"""
    assert run_python(code) == "(0, 97)\n" * 2


def test_a_model_without_positions_has_no_limit_of_positions() -> None:
    code = """
from tiny_core import empty_core, run_pass
core = empty_core(rotary_dim=0, rotary_tables=0)
for layer in range(2):
    core.set_layer(layer, {"rope": -1})
core.resize(1)
run_pass(core, tokens=[5] * 70)
print(core.length(0), core.positions > 70)
try:
    print(empty_core(rotary_dim=0).positions)
except ValueError as error:
    print(error)
"""
    first, second = run_python(code).splitlines()
    assert first == "70 True"
    assert "rotary" in second or int(second) >= 0


def test_arrays_outlive_the_core() -> None:
    core = ready_core()
    best, exits, similarities, _ = run_pass(core, tokens=[5, 6], record_similarities=True)
    arrays = [best, exits, similarities, core.logits(), core.read_cache(0)]
    run_pass(core, tokens=[5] * (POSITIONS - 2))
    arrays += core.read_pages(0, POSITIONS)
    kept = [array.copy() for array in arrays]
    for _ in range(20):  # its memory goes to others
        core = ready_core()
        run_pass(core)
    for array, copy in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_the_bandwidth_of_no_memory_or_thread() -> None:
    for arguments in ((5, 1), (1 << 20, 0), (1 << 20, -1)):
        with pytest.raises(ValueError, match="at least 1 MiB, with a thread"):
            _core.read_bandwidth(*arguments)
    with pytest.raises(ValueError, match="thread"):
        _core.read_bandwidth(1 << 20, 2000)
