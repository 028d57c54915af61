"""Damaged model folders and GGUF files, for the tests that the loader comes through them. Run as a
program (`python loader_fuzz.py FIRST COUNT`) it ends with 1 at the first that the loader doesn't:
so a crash of native code is seen too."""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from byte_models import byte_model, save_folder, save_gguf

from river_llm.errors import RiverError
from river_llm.load.model import load_backbone

GGUF = "model.gguf"
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", GGUF, GGUF)
_SECONDS = 30  # that a load may take


def whole_folder(directory: Path) -> Path:
    """A folder of a very small model, and its GGUF file in it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = byte_model(**sizes, **heads)
    save_gguf(directory / GGUF, model, pre="llama-bpe")
    return save_folder(directory, model)


def damaged(content: bytes, head: int, generator: random.Random) -> bytes:
    """A file cut short, or with some bits, bytes or a block of it changed; mostly in its first
    `head` bytes, where its structure is."""
    place = generator.randrange(len(content))
    if generator.random() < 0.7:
        place = min(place, generator.randrange(head))
    kind = generator.choice(("cut", "bits", "byte", "block", "insert"))
    if kind == "cut":
        return content[:place]
    changed = bytearray(content)
    if kind == "bits":
        for _ in range(generator.randint(1, 4)):
            at = min(place + generator.randrange(16), len(content) - 1)
            changed[at] ^= 1 << generator.randrange(8)
    elif kind == "byte":
        changed[place] = generator.choice(b'0123456789-.e"[]{}:, \x00\xff')
    elif kind == "block":
        end = min(place + generator.randint(1, 64), len(content))
        changed[place:end] = generator.randbytes(end - place)
    else:
        changed[place:place] = generator.randbytes(generator.randint(1, 16))
    return bytes(changed)


def outcome(whole: Path, seed: int) -> str:
    """What loading a folder comes to that is damaged by this seed: `loaded`, or the first words of
    the one line that it is refused with.

    Raises:
        AssertionError: the message has more than one line.
        Exception: whatever else than a `RiverError` the loader raises.
    """
    generator = random.Random(seed)
    name = generator.choice(FILES)
    with TemporaryDirectory() as place:
        folder = Path(place, "model")
        shutil.copytree(whole, folder, copy_function=os.link)
        (folder / name).unlink()
        content = (whole / name).read_bytes()
        head = content.rfind(b"output_norm.weight") if name == GGUF else 4000
        (folder / name).write_bytes(damaged(content, head, generator))
        try:
            load_backbone(folder / name if name == GGUF else folder)
        except RiverError as error:
            message = str(error)
        else:
            return "loaded"
    assert "\n" not in message, message
    return message.replace(str(folder), "")[:40]


def _main(first: int, count: int) -> None:
    faulthandler.enable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes: Counter[str] = Counter()
    with TemporaryDirectory() as place:
        whole = whole_folder(Path(place))
        for seed in range(first, first + count):
            signal.alarm(_SECONDS)  # which ends the process
            try:
                outcomes[outcome(whole, seed)] += 1
            except BaseException:
                sys.stderr.write(f"seed {seed}\n")
                raise
    sys.stdout.write(f"{outcomes.most_common(12)}\n")


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
