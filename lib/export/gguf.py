"""Write a pruned model as a GGUF file for llama.cpp, from a checkpoint or straight from a .gguf file.

Where the kept blocks repack into whole layers the file has the family's own architecture (lib.gguf_archs).
Else it is "deci" (Nemotron-NAS), whose layers may lack attention or MLP, and which runs the blocks of Llama and Qwen2.
From a .gguf file the tensors are copied byte for byte, quantised ones too; nothing is dequantised.

    save_gguf("pruned.gguf", prune(read_gguf("model.Q4_K_M.gguf"), removed))

What llama.cpp does with the zeros of a deci file, and what is written so that the model stays right: a
layer with feed_forward_length 0 loses its attention's output, so it gets an MLP of IDLE zero rows. Sizes
of heads come from layer 0, so its head_count is never 0: heads without key-value heads are a plain
matrix there, which is zero here and keeps no cache.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lib.edits import check_shape
from lib.export.checkpoint import check_space
from lib.export.decilm import check_attention, check_family, head_size, most_tokens, rotation, window_note
from lib.export.gguf_vocab import vocabulary
from lib.export.layers import places, repack
from lib.gguf_archs import ARCHS, BY_NAME, DECI, slides, window_fields
from lib.model import gguf_reader, llama3_factors, load_tokenizer, readable

IDLE = 256  # width of an MLP that stands for none: a multiple of every quantised type's block
OUTER = ("token_embd", "output_norm")  # a head too, where it is not tied
REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
BLOCK = re.compile(r"blk\.(\d+)\.((\w+)\.(?:weight|bias))")
FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


class Tensor(NamedTuple):
    """A tensor as GGUF keeps it: `load()` gives a numpy array of this shape and dtype, bytes where the type is packed.

    type: gguf.GGMLQuantizationType.
    """

    shape: tuple
    dtype: str
    type: int
    load: Callable


class Model(NamedTuple):
    """What a GGUF file holds: fields {key: gguf.GGUFValue}, tensors {name: Tensor}."""

    arch: str
    fields: dict
    tensors: dict

    def get(self, key, default=None):
        """Return the value of the architecture's own field `key`, e.g. "block_count"."""
        field = self.fields.get(f"{self.arch}.{key}")
        return default if field is None else field.value


def as_gguf(source, removed, info):
    """One file, model.gguf; a format of lib.export.FORMATS."""
    if source.gguf and (heads := source.edit.kept("mha")):
        raise ValueError(
            f"format gguf: mha{min(heads)} loses heads, which a .gguf file is not rewritten for; give the model's "
            "folder, or use format hf"
        )
    model = replaced(read_gguf(source.path), source.edit) if source.gguf else from_checkpoint(source, removed)
    pruned = prune(model, removed)
    padding = {i: _stored_width(model, i, width) - width for i, width in source.edit.kept("mlp").items()}
    if source.gguf and any(padding.values()):
        info["padded_channels"] = {str(i): n for i, n in padding.items() if n}
    note = "" if source.gguf else window_note(source, model.get("context_length"), info)

    def write(folder):
        save_gguf(folder / "model.gguf", pruned, info)

    return (
        write,
        f"A GGUF file of llama.cpp's architecture `{pruned.arch}`.\n\n{note}```bash\nllama-cli -m model.gguf\n```",
    )


def prune(model, removed):
    """Return the Model without the blocks `removed`; deci where some layer lacks its attention or MLP.

    Raises ValueError where no attention would be left, or neither deci nor the family's own can hold the model.
    """
    arch, n = BY_NAME[model.arch], model.get("block_count")
    layers = repack(n, removed)
    check_attention(layers, "gguf")
    short = [layer for layer in layers if None in layer]
    heads = model.get("attention.head_count")
    counts = {
        "attention.head_count": [_of(heads, layer.mha) for layer in layers],
        "attention.head_count_kv": [_of(model.get("attention.head_count_kv", heads), layer.mha) for layer in layers],
        "feed_forward_length": [_of(model.get("feed_forward_length"), layer.mlp) for layer in layers],
    }
    uneven = not short and next((key for key, values in counts.items() if len({*values}) > 1), None)
    if (short or uneven) and model.arch not in DECI:
        what = f"{short[0]} is left without its other half" if short else f"{uneven} differs from layer to layer"
        kind = "whole layers" if short else "layers of one width"
        raise ValueError(f"format gguf: {what}, and llama.cpp's {model.arch} has {kind} only; the nearest format is hf")
    if arch.large and arch.large in (n, len(layers)):
        raise ValueError(
            f"format gguf: llama.cpp takes a {model.arch} of {arch.large} layers for the largest, and scales its "
            "attention in another way; use format stock or hf"
        )
    where, tensors = places(layers), {}
    for name, tensor in model.tensors.items():
        if match := BLOCK.fullmatch(name):
            layer, rest, part = match.groups()
            block = ("mha" if part in arch.mha else "mlp", int(layer))
            if block not in where:
                continue
            name = f"blk.{where[block]}.{rest}"
        tensors[name] = tensor
    if short or uneven:
        return _deci(model._replace(tensors=tensors), layers, counts)
    if model.arch != "llama" and any(name.endswith("ffn_down.bias") for name in tensors):
        raise ValueError(
            f"format gguf: llama.cpp's {model.arch} has no ffn_down.bias, which the refit has made; use hf"
        )
    fields = model.fields | {f"{model.arch}.block_count": _number(len(layers))}
    fields |= {
        f"{model.arch}.{key}": _number(values[0]) for key, values in counts.items() if isinstance(model.get(key), list)
    }
    if arch.period:
        key = f"{model.arch}.attention.sliding_window"
        window = model.get(
            "attention.sliding_window", 4096 if model.arch == "gemma2" else 0
        )  # llama.cpp's own defaults
        before = slides(arch, model.get("attention.sliding_window_pattern", arch.period), n)
        kept = [before[layer.mha] and window > 0 for layer in layers]
        fields = {name: value for name, value in fields.items() if not name.startswith(key)}
        fields |= _window(arch, kept, window, model.get("context_length"))
    return model._replace(fields=fields, tensors=tensors)


def _of(values, layer):
    """Return a layer's number from a field that holds one for all, or a list; 0 for no layer."""
    return 0 if layer is None else values[layer] if isinstance(values, list) else values


def _window(arch, sliding, window, context):
    """Return the fields of window_fields, as GGUF has them."""
    import gguf

    values = window_fields(arch, sliding, window, context).items()
    array, boolean = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL
    return {
        f"{arch.name}.{key}": gguf.GGUFValue(value, array, boolean) if isinstance(value, list) else _number(value)
        for key, value in values
    }


def _deci(model, layers, counts):
    """Return the Model under the architecture deci; its tensors have moved already. counts: its fields, by layer."""
    width, size = model.get("embedding_length"), _head_size(model)
    heads, kv_heads, ffn = counts.values()
    fields = {key.replace(f"{model.arch}.", "deci.", 1): value for key, value in model.fields.items()}
    tensors = dict(model.tensors)
    for i, layer in enumerate(layers):
        if model.arch == "qwen2" and layer.mha is not None:  # its rotation pairs dimensions half a head apart
            for part, count in (("q", heads[i]), ("k", kv_heads[i])):  # deci's neighbouring ones
                for name in (f"blk.{i}.attn_{part}.weight", f"blk.{i}.attn_{part}.bias"):
                    if name in tensors:
                        tensors[name] = interleaved(tensors[name], count)
        if layer.mlp is None:
            tensors |= {f"blk.{i}.ffn_{part}.weight": zeros(IDLE, width) for part in ("gate", "up")}
            tensors |= {f"blk.{i}.ffn_down.weight": zeros(width, IDLE), f"blk.{i}.ffn_norm.weight": zeros(width)}
    if layers[0].mha is None:
        tensors |= {"blk.0.attn_norm.weight": zeros(width), "blk.0.attn_output.weight": zeros(width, width)}
    numbers = {
        "block_count": len(layers),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }
    heads = [max(heads), *heads[1:]] if layers[0].mha is None else heads
    ffn = [IDLE if layer.mlp is None else n for layer, n in zip(layers, ffn, strict=True)]
    lists = {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "feed_forward_length": ffn}
    fields |= {f"deci.{key}": _numbers(values) for key, values in lists.items()}
    fields |= {f"deci.{key}": _number(value) for key, value in numbers.items()}
    return Model("deci", fields, tensors)


# ---- a .gguf file --------------------------------------------------------------------------------


def read_gguf(path):
    """Return the Model of a .gguf file, its tensors still in the file.

    Raises ValueError for architectures without a row in gguf_archs, for experts, and for parts of a split file.
    """
    import gguf

    with readable(path, "gguf"):
        reader = gguf_reader(path)
        array = gguf.GGUFValueType.ARRAY
        fields = {
            key: gguf.GGUFValue(field.contents(), field.types[0], field.types[-1] if field.types[0] == array else None)
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
        tensors = {
            t.name: Tensor(t.data.shape, t.data.dtype, t.tensor_type, lambda t=t: t.data) for t in reader.tensors
        }
    model = Model(fields["general.architecture"].value, fields, tensors)
    _check_file(path, model, reader)
    return model


def replaced(model, edit):
    """Return the Model of a file with an Edit's tensors, each encoded as the file has the one that it replaces.

    Raises ValueError, naming the tensor, for one that the file has not, and for a type that the package gguf decodes
    only, such as Q4_K. Encoding rounds: the file's values are those of its type nearest to the edit's.
    """
    import gguf
    import numpy as np

    names = _names(model.arch, model.get("block_count"))
    tensors, heads, shift = dict(model.tensors), model.get("attention.head_count"), BY_NAME[model.arch].shift
    ffn = model.get("feed_forward_length")
    widths = {i: _stored_width(model, i, width) for i, width in edit.kept("mlp").items()}
    for name in edit.tensors:
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        part = BLOCK.fullmatch(new or "")
        narrow = widths.get(int(part[1])) if part and part[3] in BY_NAME[model.arch].mlp else None
        if narrow and new.endswith("ffn_down.bias"):  # of a refit; llama.cpp adds one where there is one
            tensors.setdefault(new, zeros(model.get("embedding_length")))
        if new not in tensors:
            raise ValueError(
                f"format gguf: the edit replaces {name}, which a file of {model.arch} has not; use format hf"
            )
        old = tensors[new]
        try:
            gguf.quantize(np.zeros((1, 256), "float32"), old.type)
        except NotImplementedError:
            raise ValueError(
                f"format gguf: the edit replaces {name}, and nothing here encodes the file's {old.type.name}; "
                "give a file of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, F16 or BF16, or use format stock or hf"
            ) from None
        more = shift if new.endswith("norm.weight") else 0
        dense = Tensor(
            (),
            "float32",
            gguf.GGMLQuantizationType.F32,
            lambda name=name, more=more: (edit.load(name).float().cpu() + more).numpy(),
        )
        if model.arch == "llama" and new.split(".")[-2] in ("attn_q", "attn_k"):
            dense = interleaved(dense, heads if "attn_q" in new else model.get("attention.head_count_kv", heads))

        if narrow and not new.endswith("ffn_down.bias"):
            shape, dim = list(edit.load(name).shape), int(new.endswith("ffn_down.weight"))
            dense, shape[dim] = _with_zeros(dense, dim, narrow), narrow
            old = old._replace(shape=_packed(shape, old))

        def load(name=name, dense=dense, old=old):
            data = gguf.quantize(np.ascontiguousarray(dense.load()), old.type).view(old.dtype)
            check_shape(name, data, old.shape)
            return data

        tensors[new] = old._replace(load=load)
    fields = dict(model.fields)
    if widths:
        every = [widths.get(i, ffn) for i in range(model.get("block_count"))]
        fields[f"{model.arch}.feed_forward_length"] = _numbers(every)
    return model._replace(fields=fields, tensors=tensors)


def _stored_width(model, layer, width):
    """Return the width of an MLP in the file: a quantised type packs so many weights of a row together."""
    import gguf

    types = (model.tensors[f"blk.{layer}.{part}.weight"].type for part in ("ffn_gate", "ffn_up", "ffn_down"))
    block = max(gguf.GGML_QUANT_SIZES[kind][0] for kind in types)
    return -(-width // block) * block


def _packed(shape, like):
    """Return the shape in which a Tensor's type and dtype keep a matrix of this shape."""
    import gguf

    return gguf.quant_shape_to_byte_shape(shape, like.type) if like.dtype == "uint8" else tuple(shape)


def _with_zeros(tensor, dim, size):
    """Return a dense Tensor with zeros behind it along `dim`, up to `size`."""

    def load():
        import numpy as np

        data = tensor.load()
        return np.pad(data, [(0, size - data.shape[d] if d == dim else 0) for d in range(data.ndim)])

    return tensor._replace(load=load)


def read_info(path):
    """Return the pruning_info of an exported file, None of another; raise ValueError where it cannot be read."""
    with readable(path, "gguf"):
        field = gguf_reader(path).get_field("pruning_info")
        return json.loads(field.contents()) if field else None


def _check_file(path, model, reader):
    def refuse(what, instead):
        raise ValueError(f"{path}: {what}; {instead}")

    if model.arch not in BY_NAME:
        refuse(
            f"architecture {model.arch}; format gguf prunes {', '.join(BY_NAME)}",
            "use format stock or hf, which read this file too",
        )
    missing = [key for key in REQUIRED if model.get(key) is None]
    if missing:
        refuse(f"it lacks {model.arch}.{missing[0]}", "give a complete file")
    if (splits := model.fields.get("split.count")) and splits.value > 1:
        refuse(f"one of {splits.value} parts", "join them with llama-gguf-split --merge and give the whole")
    if reader.byte_order != "I":
        refuse("of the other byte order", "convert it with gguf-convert-endian")
    for key, field in model.fields.items():
        own = key.startswith(f"{model.arch}.") and not key.endswith("sliding_window_pattern")
        if own and isinstance(field.value, list):
            refuse(f"{key} differs from layer to layer", "give the file of the model before it was changed")
    if model.get("rope.dimension_count", _head_size(model)) != _head_size(model):
        refuse("it rotates a part of each head", "use format stock or hf, which read this file too")
    parts = (*BY_NAME[model.arch].mha, *BY_NAME[model.arch].mlp)
    for name in model.tensors:  # experts, fused projections
        match = BLOCK.fullmatch(name)
        if name.startswith("blk.") and (not match or match[3] not in parts):
            refuse(f"{name} is of no known block", "use format stock or hf, which read this file too")
    for part in (*(f"blk.{i}.{p}" for i in range(model.get("block_count")) for p in parts), *OUTER):
        if f"{part}.weight" not in model.tensors:
            refuse(f"it lacks {part}.weight", "give a complete file")


# ---- a checkpoint --------------------------------------------------------------------------------


def from_checkpoint(source, removed):
    """Return the Model of a Source of lib.checkpoint: matrices in their dtype, vectors in fp32, as llama.cpp wants.

    Raises ValueError for families and tokenizers that llama.cpp would not run the same.
    """
    import gguf

    check_family(source, "gguf", {name: arch.activation for name, arch in ARCHS.items()})
    config = source.config
    source.verify_dense()
    row, heads, kv_heads = ARCHS[config.model_type], config.num_attention_heads, config.num_key_value_heads
    arch, names, tensors = row.name, _names(row.name, source.n_layers), {}
    narrow, ffn = source.edit.kept("mha"), config.intermediate_size
    for name in source.names():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None or new.endswith(".bias") and arch not in DECI:
            raise ValueError(f"{source.path}: {name}: llama.cpp's {arch} has no such tensor; use format hf")
        tensors[new] = _tensor(source.entry(name), row.shift if new.endswith("norm.weight") else 0)
        if arch == "llama" and new.split(".")[-2] in ("attn_q", "attn_k"):
            kv = narrow.get(int(BLOCK.fullmatch(new)[1]), kv_heads)
            tensors[new] = interleaved(tensors[new], kv * (heads // kv_heads) if "attn_q" in new else kv)
    matrices = source.entry(next(n for n in source.names() if n.endswith("embed_tokens.weight")))
    size, rope = head_size(config), rotation(config)
    most = config.max_position_embeddings if row.period else most_tokens(source, removed)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type("model")
    writer.add_name(Path(source.path).resolve().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[matrices.dtype]])
    writer.add_block_count(source.n_layers)
    writer.add_context_length(most)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(
        [source.widths.get(i, ffn) for i in range(source.n_layers)] if source.widths else ffn
    )
    kv = [narrow.get(i, kv_heads) for i in range(source.n_layers)]
    writer.add_head_count([n * (heads // kv_heads) for n in kv] if narrow else heads)
    writer.add_head_count_kv(kv if narrow else kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _constant(llama3_factors(config).numpy())
    _add_gemma(source, row, writer)
    fields = writer.kv_data[0]
    if row.period:
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        fields |= _window(row, sliding, config.sliding_window, most)
    tokenizer = load_tokenizer(source.path, source.trust_remote_code)
    return Model(arch, fields | vocabulary(tokenizer, config.vocab_size), tensors)


def _add_gemma(source, row, writer):
    """Add the fields that only Gemma's files have; raise ValueError where llama.cpp's code takes another value."""
    config = source.config

    def refuse(field, wanted):
        raise ValueError(
            f"{source.path}: its {field} is {getattr(config, field)}, and llama.cpp's {row.name} has {wanted}; use "
            "format hf"
        )

    if getattr(config, "query_pre_attn_scalar", size := head_size(config)) != size:
        refuse("query_pre_attn_scalar", f"the size of a head, {size}")
    if row.name == "gemma2":
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not getattr(config, field):
                refuse(field, "a number there")
            getattr(writer, f"add_{field}")(getattr(config, field))
    if row.name == "gemma3":
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, field):
                refuse(field, "none")
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default":
            raise ValueError(f"{source.path}: its local rotations are {local['rope_type']}, not default; use format hf")
        writer.add_rope_freq_base_swa(local["rope_theta"])


def _names(arch, n_layers):
    """Return the package gguf's map from a checkpoint's names of tensors to those of an architecture."""
    import gguf

    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(key, n_layers)


def _tensor(entry, shift=0):
    """Return the Tensor of an Entry of lib.checkpoint, its values larger by `shift`."""
    import gguf

    dtype = torch.float32 if len(entry.shape) == 1 else entry.dtype
    if dtype not in FILE_TYPES:
        raise ValueError(
            f"format gguf: {entry.name} is {dtype}, and a GGUF file's weights are fp32, fp16 or bf16; "
            "ask for one of them"
        )

    def load():
        tensor = (entry.load().to(dtype) + shift if shift else entry.load().to(dtype)).contiguous()
        return (tensor.view(torch.uint8) if dtype == torch.bfloat16 else tensor).numpy()

    if dtype == torch.bfloat16:  # numpy knows no such type
        *rows, columns = entry.shape
        return Tensor((*rows, 2 * columns), "uint8", gguf.GGMLQuantizationType.BF16, load)
    kind = gguf.GGMLQuantizationType.F16 if dtype == torch.float16 else gguf.GGMLQuantizationType.F32
    return Tensor(tuple(entry.shape), "float16" if dtype == torch.float16 else "float32", kind, load)


# ---- tensors and files ---------------------------------------------------------------------------


def interleaved(tensor, heads):
    """Return a query or key Tensor with the halves of each head's rows interleaved.

    A rotation that pairs rows i and i + size/2 of a head then pairs 2i and 2i+1. Rows are moved whole,
    so that quantised ones stay as they are.
    """

    def load():
        data = tensor.load()
        halves = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:])
        return halves.swapaxes(1, 2).reshape(data.shape)

    return tensor._replace(load=load)


def zeros(*shape):
    """Return a Tensor of zeros: a vector in fp32, a matrix in fp16."""
    import numpy as np

    return _constant(np.zeros(shape, "float32" if len(shape) == 1 else "float16"))


def save_gguf(path, model, info=None):
    """Write a Model to a new file, tensor by tensor; info goes into the field pruning_info, as JSON.

    Raises ValueError before writing where the disk is too small.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, model.arch)
    other = {"general.architecture", "general.alignment", "general.size_label"} | ({"pruning_info"} if info else set())
    for key, field in model.fields.items():
        if key not in other:
            writer.add_key_value(key, field.value, field.type, field.sub_type)
    if info:
        writer.add_string("pruning_info", json.dumps(info))
    total = 0
    for name, tensor in model.tensors.items():
        dtype = np.dtype(tensor.dtype)
        nbytes = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(name, tensor.shape, dtype, nbytes, tensor.type)
        total += nbytes
    check_space(Path(path).parent, total)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in model.tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(tensor.load()))
    finally:
        writer.close()


def _constant(array):
    import gguf

    kind = gguf.GGMLQuantizationType.F32 if array.dtype == "float32" else gguf.GGMLQuantizationType.F16
    return Tensor(array.shape, array.dtype, kind, lambda: array)


def _head_size(model):
    size = model.get("attention.key_length")
    return size or model.get("embedding_length") // model.get("attention.head_count")


def _number(value):
    import gguf

    return gguf.GGUFValue(value, gguf.GGUFValueType.UINT32)


def _numbers(values):
    import gguf

    return gguf.GGUFValue(values, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
