"""Where a model's files lie: a folder, a .gguf file, or a hub id, and what tells one checkpoint from another."""

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from lib.files import expand

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
PICKLED = False  # whether checkpoints are read that have no other weights than .bin; a script sets it where asked


PART = re.compile(r"-(?P<part>\d{5})-of-(?P<of>\d{5})\.gguf$", re.IGNORECASE)  # as llama.cpp names them
PIECES = 1024  # of each weight file, read to tell checkpoints apart


def locate(path):
    """Return (folder or hub id, gguf file name or None) for transformers' from_pretrained.

    Raises ValueError when a local path lacks what a model needs, or a hub id cannot be reached.
    """
    path = str(path)
    local = expand(path)
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise ValueError(f"{path}: a file, but not .gguf; give a model folder or a .gguf file")
        part = PART.search(local.name)
        if part and int(part["of"]) > 1:
            raise ValueError(
                f"{path}: part {int(part['part'])} of a .gguf in {int(part['of'])} parts; make it one file first: "
                f"llama-gguf-split --merge {local.name[: part.start()]}-00001-of-{part['of']}.gguf merged.gguf"
            )
        return str(local.parent), local.name
    if local.is_dir():
        _check_folder(path, local)
        return str(local), None
    if os.path.lexists(local):
        raise ValueError(f"{path}: neither a folder nor a regular file; give a model folder or a .gguf file")
    if path.lower().endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{path}: no such file or folder")
    _check_hub(path)
    return path, None


def model_name(path):
    """Return the name that people call the model at `path`: the folder's, the file's, or a hub id.

    The hub's cache keeps a model in models--owner--name/snapshots/<commit>: its id is owner/name.
    """
    local = expand(path)
    whole = Path(os.path.abspath(local))
    for place in (whole, whole.resolve()):
        folder = next((p for p in (place, *place.parents) if p.parent.name == "snapshots"), None)
        if folder and folder.parent.parent.name.startswith("models--"):
            name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            return name if place == folder else whole.name
    return whole.name if local.exists() else str(path)


def _check_folder(path, local):
    """Raise ValueError where a folder is no model, and say what it is."""
    files = sorted(f.name for f in local.iterdir())
    if local.name.startswith("models--") and "snapshots" in files:
        inside = sorted(f.name for f in (local / "snapshots").iterdir())
        raise ValueError(
            f"{path}: the hub's cache of {local.name.removeprefix('models--').replace('--', '/')}; give that name, or "
            f"the folder snapshots/{inside[0] if inside else '<commit>'} in it"
        )
    read = (
        name for name in files if Path(name).suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
    )
    for name in read:
        if not (local / name).is_file() and not (local / name).is_dir():  # a pipe would be waited for
            what = "a link to nothing" if (local / name).is_symlink() else "no regular file"
            raise ValueError(f"{path}: {name} in it is {what}; remove it, or copy the model again")
    weights = [f for f in files if any(fnmatch(f, pattern) for pattern in WEIGHTS) and not f.startswith("adapter_")]
    if "adapter_config.json" in files and not weights:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            settings = json.loads((local / "adapter_config.json").read_text(encoding="utf-8-sig"))
            base = settings.get("base_model_name_or_path")
            path = f"{path}: an adapter of {base}" if base else path
        raise ValueError(
            f"{path}: adapter_config.json and no weights of a model; merge the adapter into its base model (peft's "
            "merge_and_unload, then save_pretrained with the tokenizer) and give that folder"
        )
    if "config.json" not in files:
        inside = [f for f in files if f.lower().endswith(".gguf")]
        hint = f"; it holds {inside[0]}: give that file" if inside else ""
        raise ValueError(f"{path}: folder without config.json{hint}")
    if not weights:
        other = next((f for f in files if Path(f).suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")), None)
        hint = f"; {other} is of another format: convert it to *.safetensors first" if other else ""
        raise ValueError(f"{path}: folder without weights (no {', '.join(WEIGHTS)}){hint}")
    if not PICKLED and not any(fnmatch(f, WEIGHTS[0]) for f in weights):
        raise ValueError(
            f"{path}: its weights are pickled ({weights[0]}), a format that can hold code; convert them to "
            "*.safetensors, or allow pickled weights"
        )


def fingerprint(path):
    """Return 16 hex digits that tell one checkpoint's weights from another's at the same path.

    Of a folder or .gguf file: names and sizes of the weight files, and PIECES pieces of each, evenly spread, so that
    no change of a run of bytes longer than the gap between them is missed. Of a hub model: the commit that is cached.
    """
    where, gguf = locate(path)
    folder = Path(where)
    if not folder.is_dir():
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(where, "config.json")
        return Path(cached).parent.name[:16] if isinstance(cached, str) else "not cached"
    files = {f for pattern in ((gguf,) if gguf else WEIGHTS) for f in folder.glob(pattern)}
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for k in range(PIECES):
                opened.seek(k * size // PIECES)
                digest.update(opened.read(min(1024, size // PIECES + 1)))
    return digest.hexdigest()[:16]


def _check_hub(name):
    """Raise ValueError unless hub id `name` is cached or the hub knows it; asked once, without retries."""
    if name in _checked_hub:
        return
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    try:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
        unreachable = hub_error()
        if not cached and not unreachable:
            huggingface_hub.model_info(name, timeout=10)
    except HFValidationError:
        raise ValueError(f"{name}: no such folder, and not a hub id (owner/name)") from None
    except GatedRepoError:
        raise ValueError(
            f"{name}: gated on the hub; accept its licence there and log in with `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ValueError(f"{name}: no such folder, and the hub answered {status}; check the name or log in") from None
    except Exception as error:  # the HTTP client's own connection errors have changed class over versions
        unreachable = type(error).__name__
    if unreachable and not cached:
        raise ValueError(
            f"{name}: no such folder here, and the hub cannot be reached ({unreachable}); "
            "give a local path: a folder with config.json, tokenizer and *.safetensors, or a .gguf file"
        )
    _checked_hub.add(name)


_checked_hub = set()


@functools.cache
def hub_error():
    """Return None where the hub answers, else the name of the error; asked once.

    Without a hub this process goes offline, as HF_HUB_OFFLINE=1 would: cached files are still found,
    and the libraries do not ask for each of them six times, half a minute long.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # as above
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it copies the setting when imported
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return type(error).__name__
    return None
