"""A checkpoint as named tensors, read and written one at a time.

A pruned copy of a model needs none of its arithmetic, so no model is built: tensors go from file to
file, and the memory that takes is that of the largest of them. Their names in the file tell layer and
block (`Source.place`); names in memory would not do, because transformers renames and fuses weights
while loading.

    source = Source("models/Llama-2-7b-hf")
    write_shards("copy", [source.entry(name) for name in source.names()])
"""

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lib import hub
from lib.blocks import KINDS, Block
from lib.decoder import block_parameters, find_layers
from lib.edits import Edit, check_shape, name_in
from lib.export.config import config_json
from lib.families import FAMILIES
from lib.hub import WEIGHTS, locate
from lib.model import (
    DTYPES,
    check_whole,
    inside_another,
    load_config,
    load_model,
    parameter_count,
    quiet,
    readable,
    skeleton,
    text_name,
)

SHARD_BYTES = 5 * 10**9
CODES = {  # the names of safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|blocks?)\.)(\d+)\.(.+)")
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # what configurations call an MLP's channels
INDEX = {"model.safetensors": "model.safetensors.index.json", "pytorch_model.bin": "pytorch_model.bin.index.json"}


class Entry(NamedTuple):
    """A tensor to be written: `load()` gives it, in this shape and dtype."""

    name: str
    shape: tuple
    dtype: torch.dtype
    load: Callable

    @property
    def nbytes(self):
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


class Place(NamedTuple):
    """Where a layer's tensor belongs: its name is `{head}{layer}.{rest}`, and it goes with the last of `kinds`."""

    head: str
    layer: int
    rest: str
    kinds: tuple


class Source:
    """The checkpoint at a folder, hub id or .gguf file, its weights still in their files (a .gguf: in memory).

    Of a multimodal model it is the text decoder, its tensors named as where that stands alone.

    compute_dtype: a key of lib.model.DTYPES, or None for the dtype each tensor is stored in (.gguf: bf16).
    config: transformers' configuration. bare: the model without weights. layers, n_layers, family: its
    decoder layers, their number, and their row of FAMILIES. parallel: whether attention and MLP of a
    layer read the same state, so that an attention and the MLP of another layer are no layer.
    native: whether the model's code is transformers' own. edit: an Edit, whose tensors and
    configuration are read in place of the files'. widths: {layer: channels} of its narrowed MLPs, empty where the
    configuration says one width for all; dense: (the configuration, the model without weights) as they were before
    that. No weights are read before they are asked for.
    Raises ValueError, one line, for what cannot be read, and for a checkpoint that is quantised or pruned.
    """

    def __init__(self, path, compute_dtype=None, trust_remote_code=False, edit=Edit()):  # noqa: B008 (immutable)
        self.path, self.trust_remote_code, self.edit = str(path), trust_remote_code, edit
        self.config = load_config(path, trust_remote_code)
        quantised = getattr(self.config, "quantization_config", None)
        if quantised:
            method = (quantised if isinstance(quantised, dict) else quantised.to_dict()).get("quant_method", "?")
            raise ValueError(
                f"{path}: quantised ({method}), and packed weights are not pruned here; give the dense "
                "checkpoint and quantise the export"
            )
        check_whole(self.config, path)
        self._inside = inside_another(path, trust_remote_code)
        self.bare = skeleton(path, trust_remote_code)
        if edit.config:
            for field, value in edit.config.items():
                setattr(self.config, field, value)
            with torch.device("meta"):
                self.bare = type(self.bare)(copy.deepcopy(self.config)).eval()
        self.dense, self.widths = (self.config, self.bare), edit.kept("mlp")
        self._make_narrow()
        if not self.config.architectures:  # a .gguf file tells none, and other programs choose by it
            self.config.architectures = [type(self.bare).__name__]
        self.native = type(self.bare).__module__.startswith("transformers.")
        self.layers = find_layers(self.bare)
        self.n_layers = len(self.layers)
        self.family = FAMILIES[type(self.layers[0]).__name__]
        self._shared_norm = not any(getattr(self.layers[0], name, None) is not None for name in self.family.mlp_norms)
        flags = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
        self.parallel = self._shared_norm or any(getattr(self.config, flag, False) for flag in flags)
        where, self.gguf = locate(path)
        self.dtype = DTYPES[compute_dtype or "bf16"] if self.gguf or compute_dtype else None
        self._where = where

    def _make_narrow(self):
        """Where all MLPs that stay have one width that the configuration can say, have it say so."""
        layers = find_layers(self.bare)
        there = [i for i in range(len(layers)) if ("mlp", i) not in set(self.edit.removed)]
        field = next((name for name in WIDTHS if getattr(self.config, name, None)), None)
        if not self.widths or field is None or len({self.widths.get(i) for i in there}) > 1:
            return
        config = copy.deepcopy(self.config)
        setattr(config, field, next(iter(self.widths.values())))
        with torch.device("meta"):
            bare = type(self.bare)(copy.deepcopy(config)).eval()
        shapes = {name: p.shape for name, p in bare.named_parameters()}
        if all(shapes.get(name, shape) == shape for name, shape in self._new_shapes().items()):
            self.config, self.bare, self.widths = config, bare, {}

    def _new_shapes(self):
        """Return {name in memory: shape} of the tensors that the edit has made narrower, or added."""
        shapes, there = {}, {name: p.shape for name, p in self.dense[1].named_parameters()}
        for name in self.edit.tensors if self.edit.widths else ():
            shape = self.edit.load(name).shape
            weight = name_in(there, name.removesuffix("bias") + "weight" if name.endswith("bias") else name, self.bare)
            name = weight.removesuffix("weight") + name.rpartition(".")[2]
            if shape != there.get(name):
                shapes[name] = shape
        return shapes

    def parameters(self):
        """Return (parameters of the model as it was, those that the edit leaves)."""
        config, bare = self.dense
        there = {name: p.numel() for name, p in bare.named_parameters()}
        total, narrow = parameter_count(bare), self._new_shapes()
        less = sum(there.get(name, 0) - shape.numel() for name, shape in narrow.items())
        return total, total - block_parameters(find_layers(bare), self.edit.removed) - less

    def verify_dense(self):
        """Raise ValueError unless the files hold what the model as it was needs, as `verify`."""
        config, bare = self.dense
        verify(type(bare), config, [*self._stored.values()])

    @functools.cached_property
    def folder(self):
        """Where the files lie; a hub model is downloaded now."""
        return Path(self._where) if Path(self._where).is_dir() else _snapshot(self._where)

    @property
    def own_config(self):
        """What the source's config.json says, as a dict; None of a .gguf file."""
        own = None if self.gguf else json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return own["text_config"] if self._inside else own

    @functools.cached_property
    def _stored(self):
        with readable(self.path, "weights"):
            stored = self._read_gguf() if self.gguf else _read_files(_weight_files(self.folder))
        if self._inside:
            stored = {new: entry for name, entry in stored.items() if (new := text_name(name))}
        # old checkpoints hold the frequencies of rotations too, which loaders compute; llama.cpp refuses such a file
        stored = {name: entry for name, entry in stored.items() if not name.endswith("rotary_emb.inv_freq")}
        for name in self._unread(stored):
            del stored[name]
        self._untie(stored)
        found = {place.layer for place in map(self.place, stored) if place}
        if found != set(range(self.n_layers)):
            raise ValueError(
                f"{self.path}: weights of {len(found)} layers, where config.json says {self.n_layers}; "
                "give a complete checkpoint"
            )
        return stored

    def _unread(self, names):
        """Return the tensors that are none of the model's, as its class says: layers that predict more tokens, say."""
        path = next(path for path, module in self.bare.named_modules() if module is self.layers) + "."
        own = (path, path.removeprefix(f"{self.bare.base_model_prefix}."))  # the patterns are meant for all else

        def inside(name):
            match = LAYER.fullmatch(name)
            return match and match[1] in own and int(match[2]) < self.n_layers

        patterns = getattr(self.bare, "_keys_to_ignore_on_load_unexpected", None) or ()
        return [name for name in names if any(re.search(p, name) for p in patterns) and not inside(name)]

    def names(self):
        """Return the names of all tensors, as the files have them."""
        return [*self._stored, *(name for name in self._replaced if name not in self._stored)]

    @functools.cached_property
    def _replaced(self):
        """{name in the file: the edit's name of it}; a bias that the file has not is named after the weight's."""
        found = {}
        for name in self.edit.tensors:
            try:
                found[name_in(self._stored, name, self.bare)] = name
            except ValueError:
                if not (name.endswith(".bias") and self.edit.widths):
                    raise
                weight = name_in(self._stored, f"{name.removesuffix('bias')}weight", self.bare)
                found[f"{weight.removesuffix('weight')}bias"] = name
        return found

    def _narrow(self, name):
        """Whether a tensor is one whose shape the edit may change."""
        place = self.place(name) if self.edit.widths and name in self._replaced else None
        return place is not None and any(Block(kind, place.layer) in self.edit.widths for kind in place.kinds)

    def narrow_shapes(self):
        """Return {layer: {name within the layer: shape}} of tensors that the configuration says nothing of."""
        shapes = {}
        for name in self._replaced:
            place = self.place(name)
            if self._narrow(name) and (self.widths or name in self.added or place.kinds == ("mha",)):
                shapes.setdefault(str(place.layer), {})[place.rest] = list(self.entry(name).shape)
        return shapes

    @property
    def added(self):
        """The biases that the edit gives projections which have none."""
        return [name for name in self._replaced if name not in self._stored]

    def tensor(self, name):
        """Return one tensor, on the CPU: the edit's, where it replaces this one."""
        if name in self._replaced:
            tensor = self.edit.load(self._replaced[name]).cpu()
            if not self._narrow(name):
                check_shape(name, tensor, self._stored[name].shape)
            return tensor.to(self.entry(name).dtype)
        with readable(self.path, "weights"):
            tensor = self._stored[name].load()
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def entry(self, name, new_name=None):
        """Return the Entry that writes a tensor, under another name where one is given."""
        like = name if name in self._stored else f"{name.removesuffix('bias')}weight"
        _, shape, dtype, _ = self._stored[like]
        if self._narrow(name):
            shape = tuple(self.edit.load(self._replaced[name]).shape)
        dtype = self.dtype if self.dtype and dtype.is_floating_point else dtype
        return Entry(new_name or name, shape, dtype, lambda: self.tensor(name))

    def place(self, name):
        """Return the Place of a tensor, None for one outside the layers (embeddings, final norm, head)."""
        match = LAYER.fullmatch(name)
        if match is None:
            return None
        head, layer, rest = match.groups()
        module, row = rest.split(".")[0], self.family
        if module in (*row.mlp, *row.mlp_norms):
            kinds = ("mlp",)
        elif module in (*row.mha, *row.mha_norms):
            kinds = KINDS if module in row.mha_norms and self._shared_norm else ("mha",)
        else:
            raise ValueError(
                f"{self.path}: {name}: the row of {type(self.layers[0]).__name__} of FAMILIES in "
                f"lib/families.py has no {module}, so that nobody knows which block it goes with; correct the row"
            )
        return Place(head, int(layer), rest, kinds)

    def relabelled(self, where):
        """Return the Entries of a checkpoint whose blocks have moved.

        where: {(kind, layer): what stands for the layer's number in the new name}; blocks that it does
        not hold are left out. Tensors outside the layers stay.
        """
        entries = []
        for name in self.names():
            place = self.place(name)
            if place is None:
                entries.append(self.entry(name))
                continue
            labels = {where[kind, place.layer]: None for kind in place.kinds if (kind, place.layer) in where}
            entries += [self.entry(name, f"{place.head}{label}.{place.rest}") for label in labels]
        return entries

    def _untie(self, stored):
        """Leave one of tied tensors, under the name that the other refers to; refuse two that differ."""
        for names in getattr(self.bare, "all_tied_weights_keys", {}).items():
            short = [name.removeprefix(f"{self.bare.base_model_prefix}.") for name in names]  # files of the base model
            head, own = (s if s in stored else name for s, name in zip(short, names, strict=True))
            if head not in stored:
                continue
            if own not in stored:
                stored[own] = stored[head]
            with readable(self.path, "weights"):
                same = torch.equal(stored[head].load(), stored[own].load())
            if not same:
                raise ValueError(
                    f"{self.path}: its configuration ties {head} to {own}, but it holds both and they "
                    'differ; say "tie_word_embeddings": false in its config.json'
                )
            del stored[head]

    def _read_gguf(self):
        from transformers.core_model_loading import revert_weight_conversion

        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        model = load_model(self.path, dtype)
        tied = set(model.all_tied_weights_keys)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        return _entries(revert_weight_conversion(model, state))


def verify(model_class, config, entries):
    """Raise ValueError unless `entries` are all that the model of `config` needs, in its shapes; reads no weights."""
    state = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries}
    with quiet(), torch.device("meta"):
        _, info = model_class.from_pretrained(
            None, config=copy.deepcopy(config), state_dict=state, device_map="meta", output_loading_info=True
        )
    for key in ("missing_keys", "mismatched_keys", "error_msgs"):  # what is left over is ignored by every loader
        wrong = sorted(map(str, info.get(key, ())))
        if wrong:
            raise ValueError(
                f"the weights make no {model_class.__name__} ({key.replace('_', ' ')}: {', '.join(wrong[:3])}); "
                "give a complete source and the config.json it was saved with"
            )


def zeros(name, shape, dtype):
    """Return the Entry of a tensor of zeros."""
    return Entry(name, shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def check_space(folder, nbytes):
    """Raise ValueError unless the disk of `folder`, or of its nearest parent, has `nbytes` free."""
    path = Path(folder).expanduser().absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    if nbytes > free:
        raise ValueError(
            f"{folder}: {nbytes / 2**30:,.2f} GiB to write, {free / 2**30:,.2f} GiB free on that disk; "
            "free some, or give a folder on another disk"
        )


def write_checkpoint(folder, source, config, entries):
    """Write weights and configuration, which says the dtype that was asked for."""
    write_shards(folder, entries)
    if source.dtype:
        config.dtype = source.dtype
    text = json.dumps(config_json(config, source.own_config), indent=2)
    (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")


def write_shards(folder, entries, shard_bytes=SHARD_BYTES):
    """Write entries as model.safetensors, or as numbered shards with an index as transformers does; return bytes.

    One tensor at a time is in memory. Raises ValueError before writing where the disk is too small.
    """
    total = sum(entry.nbytes for entry in entries)
    check_space(folder, total)
    shards = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write_file(Path(folder) / "model.safetensors", entries)
        return total
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(Path(folder) / name, shard)
        weight_map |= {entry.name: name for entry in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (Path(folder) / INDEX["model.safetensors"]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(path, entries):
    """Write one .safetensors file: length of the header, header, tensors; wide dtypes first, which aligns all."""
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.load()
            assert (tuple(tensor.shape), tensor.dtype) == (tuple(entry.shape), entry.dtype), entry.name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _weight_files(folder):
    """Return the files that hold the weights: safetensors where there are any, as transformers chooses."""
    for name, index in INDEX.items():
        if (folder / index).is_file():
            names = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in dict.fromkeys(names)]
        if (folder / name).is_file():
            return [folder / name]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _read_files(files):
    """Return {name: Entry} of weight files; nothing is read but their headers."""
    from safetensors import safe_open

    stored, dtypes = {}, {code: dtype for dtype, code in CODES.items()}
    for file in files:
        if file.suffix == ".bin":
            with open(file, "rb") as opened:
                mapped = opened.read(2) == b"PK"  # not so before torch 1.6, whose files are no zip archives
            stored |= _entries(torch.load(file, map_location="cpu", mmap=mapped, weights_only=True))
            continue
        opened = safe_open(file, framework="pt", device="cpu")
        for name in opened.keys():
            part = opened.get_slice(name)
            if part.get_dtype() not in dtypes:
                raise ValueError(f"{name} is stored as {part.get_dtype()}: a quantised checkpoint")
            load = functools.partial(opened.get_tensor, name)
            stored[name] = Entry(name, tuple(part.get_shape()), dtypes[part.get_dtype()], load)
    return stored


def _entries(state):
    """Return {name: Entry} of tensors that are there already."""
    return {name: Entry(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}


def _snapshot(name):
    """Return the folder of a hub model, downloaded where it is not cached: safetensors, else .bin, and small files."""
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*"]
    for weights in WEIGHTS if hub.PICKLED else WEIGHTS[:1]:
        folder = Path(snapshot_download(name, allow_patterns=[*small, weights], ignore_patterns=["*/*"]))
        if _weight_files(folder):
            break
    return folder
