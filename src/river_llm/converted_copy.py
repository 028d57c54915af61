"""One GGUF file's dequantised copy: a folder that loads many times faster than the file.

The folder is what `save_pretrained` writes of model and tokeniser, and a manifest beside: what the
copy was made from, and a digest of each file. It is written aside and then renamed, so that under
its name it is whole or not there; a copy that was damaged later is told by the digests.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST_NAME = "copy.json"
STAGING_PREFIX = ".writing-"
_HEADER_BYTES, _SAMPLES, _SAMPLE_BYTES = 2**20, 64, 4096


@dataclass(frozen=True, slots=True)
class ConvertedCopy:
    """The copy of one GGUF file in one dtype; it need not have been written yet.

    Attributes:
        directory: where it is.
        source: the GGUF file that it is made from.
        dtype: of its weights, `bfloat16`.
    """

    directory: Path
    source: Path
    dtype: str

    @classmethod
    def at(cls, directory: Path) -> ConvertedCopy:
        """The copy in a folder, damaged or not, by its manifest.

        Raises:
            OSError, ValueError: there is none, or it is no manifest.
        """
        manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        try:
            return cls(directory, Path(manifest["source"]), str(manifest["dtype"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / MANIFEST_NAME} is no manifest of a copy") from error

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.directory.iterdir())

    def is_whole(self) -> bool:
        """Whether it is there, and each file has the size and the samples that were written."""
        try:
            manifest = json.loads((self.directory / MANIFEST_NAME).read_text(encoding="utf-8"))
            files = manifest["files"].items()
            return all(file_digest(self.directory / name) == digest for name, digest in files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def read(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, its weights mapped from the file, and the tokeniser.

        Raises:
            Exception: whatever the loaders raise on files that they can't read.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        model, info = AutoModelForCausalLM.from_pretrained(
            self.directory,
            dtype=getattr(torch, self.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(f"{self.directory} lacks {sorted(info['missing_keys'])[0]}")
        name = str(self.source.parent)  # as if it had been parsed
        model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = name
        return model, tokenizer

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write it, whole or not at all; one that another process has written meanwhile stays.

        Raises:
            Exception: whatever `save_pretrained` raises, a full disk among it.
        """
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.directory.parent))
        config = model.config
        try:
            model.config = copy.deepcopy(config)  # save_pretrained changes it
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            files = {path.name: file_digest(path) for path in staging.iterdir()}
            manifest = {"source": str(self.source), "dtype": self.dtype, "files": files}
            (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for path in staging.iterdir():
                with path.open("r+b") as opened:
                    os.fsync(opened.fileno())  # on the disk before the name that says it is whole
            if not self.is_whole():
                self.remove()
                staging.rename(self.directory)
        finally:
            model.config = config
            shutil.rmtree(staging, ignore_errors=True)

    def remove(self) -> None:
        """Delete its folder, as far as the system lets go of files that a process has mapped."""
        shutil.rmtree(self.directory, ignore_errors=True)


def file_digest(file: Path) -> str:
    """Of a file's size, its first MiB and 64 samples over all of it, its last bytes among them.

    Costs milliseconds, whatever the size. Finds other weights, a file that is cut short and blocks
    that never reached the disk; it is no defence against someone who wants to fool it.

    Raises:
        OSError: the file can't be read.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEADER_BYTES))
        for sample in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
