"""Where a model's files lie: a folder, a .gguf file, or a hub id, and what tells one checkpoint from another."""

import functools
import hashlib
import sys
from pathlib import Path

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


PIECES = 1024  # of each weight file, read to tell checkpoints apart


def locate(path):
    """Return (folder or hub id, gguf file name or None) for transformers' from_pretrained.

    Raises ValueError when a local path lacks what a model needs, or a hub id cannot be reached.
    """
    path = str(path)
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"--model-path {path}: a file, but not .gguf; give a model folder or a .gguf file")
        return str(local.parent), local.name
    if local.is_dir():
        if not (local / "config.json").is_file():
            inside = sorted(f.name for f in local.glob("*.gguf"))
            hint = f"; it holds {inside[0]}: give that file" if inside else ""
            raise ValueError(f"--model-path {path}: folder without config.json{hint}")
        if not any(next(local.glob(pattern), None) for pattern in WEIGHTS):
            raise ValueError(f"--model-path {path}: folder without weights (no {', '.join(WEIGHTS)})")
        return str(local), None
    if path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"--model-path {path}: no such file or folder")
    _check_hub(path)
    return path, None


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
        raise ValueError(f"--model-path {name}: no such folder, and not a hub id (owner/name)") from None
    except GatedRepoError:
        raise ValueError(
            f"--model-path {name}: gated on the hub; accept its licence there and log in with `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ValueError(
            f"--model-path {name}: no such folder, and the hub answered {status}; check the name or log in"
        ) from None
    except Exception as error:  # the HTTP client's own connection errors have changed class over versions
        unreachable = type(error).__name__
    if unreachable and not cached:
        raise ValueError(
            f"--model-path {name}: no such folder here, and the hub cannot be reached ({unreachable}); "
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
