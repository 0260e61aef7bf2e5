"""The folder of an export: complete or not there, with all that lies around the weights.

Tokenizer, generation settings, licence and code come from the source; the model card says what was removed.

    with complete_or_nothing("pruned") as folder:
        copy_small_files(source, folder, "stock")
"""

import contextlib
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from lib.export.gguf import read_info
from lib.files import LONGEST, beside, expand, own, sweep, sync_folder
from lib.hub import locate, model_name
from lib.model import gguf_reader, parsed_once, quiet, readable

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
LICENCES = ("LICENSE*", "NOTICE*")
WRITTEN = (  # all that an export may consist of
    *TOKENIZER_FILES,
    *LICENCES,
    "README.md",
    "config.json",
    "generation_config.json",
    "laco.json",
    "model.gguf",
    "*.py",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


def check_target(folder, path, overwrite=False):
    """Raise ValueError where `folder` is taken: by files, or with `overwrite` by anything but an earlier export."""
    folder = _place(folder)
    sweep(folder)  # an export that was killed while it replaced an older one
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder}: a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder}: is not empty; give another folder, or ask to overwrite the export in it")
    if Path(path).exists() and folder in (Path(path).resolve(), *Path(path).resolve().parents):
        raise ValueError(f"{folder}: holds the model itself; give another folder")
    try:
        if (folder / "model.gguf").is_file():
            ours = read_info(folder / "model.gguf") is not None
        else:
            ours = "pruning_info" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    foreign = [f.name for f in folder.iterdir() if f.is_dir() or not any(fnmatch(f.name, p) for p in WRITTEN)]
    if foreign or not ours:
        what = f" ({min(foreign)})" if foreign else ""
        raise ValueError(f"{folder}: holds other things than an export{what}; empty it or give another folder")


def _place(folder):
    """Return where `folder` is, behind links: it is replaced on its own disk. Refuse what cannot be replaced."""
    place = Path(os.path.realpath(expand(folder)))
    if place.is_mount():
        raise ValueError(f"{folder}: a mount point, which no finished folder can replace; give a folder in it")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place.with_name(place.name + "x" * LONGEST))
            place.stat()
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}; give another name") from None
    return place


@contextlib.contextmanager
def complete_or_nothing(folder):
    """Give an empty folder beside `folder` that takes its place at the end, and is gone after an error.

    `folder` is ours meanwhile (lib.files.own): another run on it is refused. What a run that was killed has left goes.
    """
    folder = _place(folder)
    with own(folder):
        temporary, old = beside(folder, "tmp"), beside(folder, "old")
        temporary.mkdir()
        try:
            yield temporary
            for file in (path for path in temporary.rglob("*") if path.is_file()):
                with open(file, "rb") as opened:  # on the disk before it has its name
                    os.fsync(opened.fileno())
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise ValueError(f"{folder}: {error.strerror or error}; nothing was left there") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists():
                shutil.rmtree(old) if folder.exists() else old.rename(folder)


def copy_small_files(source, folder, format):
    """Copy tokenizer, generation configuration, licence, and the source's own code where its files name it."""
    patterns, coded = LICENCES, False  # a .gguf file holds all the rest
    if format != "gguf":
        _write_generation_config(source, folder)
        patterns = (*TOKENIZER_FILES, *LICENCES)
        if not source.gguf:
            settings = source.folder / "tokenizer_config.json"
            with readable(source.path, "tokenizer"):
                coded = settings.is_file() and "auto_map" in json.loads(settings.read_text(encoding="utf-8"))
            patterns += ("*.py",) if coded or getattr(source.config, "auto_map", None) else ()
    for file in {file for p in patterns for file in source.folder.glob(p)} if not source.gguf else ():
        if file.is_file() and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    new_type = format in ("hf", "decilm") and any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)
    if format != "gguf" and not coded and (source.gguf or new_type):
        _write_tokenizer(source, folder)


def _write_tokenizer(source, folder):
    """Write the tokenizer anew unless the files that are there say all: without a known model type, what it is.

    Transformers chooses a tokenizer's class by model type, too, where its files leave that open or are known to err.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    def rules(tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return backend.to_str() if backend else type(tokenizer), tokenizer.special_tokens_map

    with readable(source.path, "tokenizer"), quiet(), parsed_once():
        where, gguf = locate(source.path)
        kwargs = {"gguf_file": gguf} if gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=source.trust_remote_code, **kwargs)
        with contextlib.suppress(Exception):  # whatever a class that is not the right one raises
            if rules(AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig())) == rules(tokenizer):
                return
        tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        return
    path = folder / "tokenizer_config.json"  # in words that transformers 4 knows too
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_generation_config(source, folder):
    """Write generation_config.json: the source's, else what transformers finds in its configuration."""
    from transformers import GenerationConfig

    name, settings = "generation_config.json", getattr(source.bare, "generation_config", None)
    if not source.gguf:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
            return
        with readable(source.path, "configuration"), quiet():
            settings = GenerationConfig.from_pretrained(
                source.folder, config_file_name="config.json", _from_model_config=True
            )
    settings.to_json_file(folder / name)


def base_name(source):
    """Return the model's name for people: the hub id, or the name of its folder or file."""
    return model_name(source.path)


def pruned_before(source):
    """Return the pruning_info of a source that is an export itself, None of another."""
    if not source.gguf:
        return getattr(source.config, "pruning_info", None)
    with contextlib.suppress(ValueError):
        return read_info(source.path)


def card(source, info, how_to_load):
    """Return the model card: YAML for the hub, then what was removed and how to load the rest."""
    front = {"base_model": info["base_model"], **_licence(source)}
    front |= {} if info["format"] in ("decilm", "gguf") else {"library_name": "transformers"}
    front |= {"pipeline_tag": "text-generation", "tags": ["pruned", "blockpruner"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    n, search = len(info["removed"]), info["search"]
    lines += [f"# {Path(info['base_model']).stem} without {n} of its blocks", ""]
    metric, kind = search.get("metric", "ppl"), search.get("block_type", "mix")
    found = "found by BlockPruner" if (metric, kind) == ("ppl", "mix") else f"chosen by {metric}, block type {kind}"
    repaired = info.get("edit", {}).get("perplexity", {})  # of lib.repair: {which: {text: perplexity}}
    if metric == "list":
        found = "named one by one"
    if "edit" in info:
        by = f"by {info['edit'].get('method', 'an edit')}, which changes weights of the others, too"
        found = f"{found}, and repaired {by}" if repaired else by
    lines += [f"{info['base_model']} without {n} attention (mha) and MLP blocks, {found}:", ""]
    lines += [" ".join(info["removed"]) or "none", ""]
    if widths := info.get("edit", {}).get("widths"):
        lines += [
            f"Channels that the MLPs keep, by layer of the base: {', '.join(f'{i}: {n}' for i, n in widths.items())}",
            "",
        ]
    if "pruned_before" in info:
        lines += [f"{info['base_model']} was pruned before: `pruned_before` in `pruning_info` says how.", ""]
    lines += ["| | base | pruned |", "|---|---|---|"]
    less = f"(-{info['removed_percent']:.2f} %)"
    lines += [f"| parameters | {info['dense_parameters']:,} | {info['parameters']:,} {less} |"]
    if "stored_parameters" in info:
        lines += [f"| parameters in the file | | {info['stored_parameters']:,} |"]  # padding
    measured = [(info, f"{search.get('dataset', 'calibration')}, the search's text")]
    if evaluated := info["evaluated"]:
        measured.append((evaluated, ", ".join(filter(None, (evaluated["dataset"], evaluated.get("limit"))))))
    for values, text in measured:
        pair = values["dense_perplexity"], values["perplexity"]
        if all(isinstance(value, (int, float)) for value in pair):  # infinities are strings
            lines += ["| perplexity ({}) | {:.4f} | {:.4f} |".format(text, *pair)]
    for text, dense in repaired.get("dense", {}).items():
        after, before = (repaired[which][text] for which in ("repaired", "pruned"))
        lines += [f"| perplexity ({text}, held out) | {dense:.4f} | {after:.4f} (unrepaired {before:.4f}) |"]
    return "\n".join([*lines, "", "## Loading it", "", how_to_load.strip(), ""])


def in_python(arguments):
    """Return for the card how transformers loads a folder; arguments: Python's, "PATH" first."""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n```"
    )


def _licence(source):
    """Return the licence fields of a .gguf file's metadata, else of the YAML header of the base's card."""
    if source.gguf:
        field = gguf_reader(source.path).fields.get("general.license")
        return {"license": field.contents()} if field else {}
    import yaml
    from huggingface_hub.repocard import metadata_load

    keys, data = ("license", "license_name", "license_link"), {}
    if (readme := source.folder / "README.md").is_file():
        with contextlib.suppress(ValueError, yaml.YAMLError):  # a card that the hub refuses, too
            data = metadata_load(readme) or {}
    return {key: data[key] for key in keys if data.get(key)}
