"""Load a causal language model and its tokenizer: hub id, local folder, or .gguf file.

Everything that can be refused is refused on the configuration alone (`skeleton`), before any
weight is read; a checkpoint that would leave weights at random values is refused after it.

    model = load_model("models/Llama-2-7b-hf", "bf16", "cuda")
    tokenizer = load_tokenizer("models/Llama-2-7b-hf")
"""

import contextlib
import copy
import functools
import json
import logging
import math
import platform
import re
import sys
from pathlib import Path
from reprlib import repr as brief
from textwrap import shorten

import torch

from lib import hub
from lib.blocks import MOST_LAYERS
from lib.files import beside, read_json, sweep
from lib.gguf_archs import BY_NAME, slides
from lib.hub import locate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
COUNTS = re.compile(r"(n|num)_(\w+_)?layers?|layers|\w+_layers")  # names of layers' numbers
MOST_EXPERTS = 4096  # of a layer
HINTS = {  # what to do where a part of a model cannot be read
    "configuration": "config.json must be of a model that this transformers knows; copy or download it again",
    "tokenizer": "tokenizer.json, or tokenizer.model, and tokenizer_config.json belong beside the weights",
    "weights": "a file is missing, cut short or damaged: copy or download it again",
    "gguf": "it is cut short, or of an architecture that this transformers cannot convert: give the model's folder",
}
TEXT_NAMES = {  # of a text decoder inside a multimodal model -> of the same one standing alone
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(language_model\.model|model\.language_model)\.": "model.",
}


def load_model(path, dtype="bf16", device="cpu", trust_remote_code=False, offload=False):
    """Return the model at `path` in eval mode, without gradients, on `device`.

    path: hub id, folder, or .gguf file (dequantised to dense weights of `dtype`).
    dtype: a key of DTYPES. device: "cpu", "cuda", "cuda:1"; plain "cuda" spreads a model that the
    first visible GPU cannot hold over all of them (accelerate's device map). offload: the layers'
    weights stay in host memory, or on the CPU in the checkpoint's files, and visit the device.
    Raises ValueError, one line, for everything a user can mend.
    """
    from transformers import AutoModelForCausalLM

    where, gguf = locate(path)
    kwargs = {"dtype": DTYPES[dtype], "trust_remote_code": trust_remote_code, "output_loading_info": True}
    kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
    if offload and gguf:
        raise ValueError(f"{path}: layers are not offloaded from a .gguf file; give a folder with *.safetensors")
    device_map = _device_map(path, dtype, device, trust_remote_code, offload)
    if device_map is not None:
        kwargs["device_map"] = device_map
    if offload:
        kwargs["offload_folder"] = _offload_folder()
    if gguf:
        kwargs |= {"gguf_file": gguf, **_dequantise()}
    else:
        kwargs |= {"use_safetensors": None if hub.PICKLED else True, "weights_only": True}
        _check_amount(path, where, trust_remote_code)
    kwargs["config"] = load_config(path, trust_remote_code)
    if inside_another(path, trust_remote_code):
        kwargs["key_mapping"] = TEXT_NAMES
    with readable(path, "weights"), quiet(), parsed_once():
        model, info = AutoModelForCausalLM.from_pretrained(where, **kwargs)
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, there, wanted = mismatched[0]
        raise ValueError(
            f"{path}: {len(mismatched)} weights have another shape than config.json says ({name}: "
            f"{tuple(there)} there, {tuple(wanted)} wanted); give a checkpoint and the config.json it was saved with"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} weights are not in the checkpoint and would be random "
            f"({', '.join(missing[:3])}, ...); give a complete checkpoint of {type(model).__name__}"
        )
    _check_complete(path, where, model, info, "key_mapping" in kwargs)
    if device_map is None:
        model.to(device)
    model.eval().requires_grad_(False)
    return model


def _check_amount(path, where, trust_remote_code):
    """Raise ValueError where a folder's files are far too small for its configuration: memory would be filled first."""
    stored = sum(file.stat().st_size for pattern in hub.WEIGHTS for file in Path(where).glob(pattern))
    wanted = parameter_count(skeleton(path, trust_remote_code))
    if stored and wanted > 2**24 + 16 * stored:  # half a bit for each
        raise ValueError(
            f"{path}: its config.json describes {wanted:,} parameters, its weight files hold {stored:,} bytes; give "
            "the config.json that they were saved with"
        )


def _check_complete(path, where, model, info, inside):
    """Raise ValueError where the files hold another model than the configuration: more layers, or a head of its own.

    inside: whether other parts of a multimodal model lie there too.
    """
    from safetensors import safe_open

    layers = r"^model\.layers\.\d+\." if inside else r"(layers|h|blocks?)\.\d+\."
    left = [name for name in info["unexpected_keys"] if re.search(layers, name)]
    if left:
        raise ValueError(
            f"{path}: {len(left)} weights of layers have no place in the model of its config.json "
            f"({sorted(left)[0]}, ...); give the config.json that it was saved with"
        )
    entries = {}
    for file in Path(where).glob("*.safetensors"):
        opened = safe_open(file, "pt")
        entries |= {text_name(name) if inside else name: (opened, name) for name in opened.keys()}
    ties = getattr(model, "_tied_weights_keys", None) if getattr(model.config, "tie_word_embeddings", False) else None
    for head, own in ties.items() if isinstance(ties, dict) else ():
        both = [file.get_tensor(name) for file, name in (entries[name] for name in (head, own) if name in entries)]
        if len(both) == 2 and not torch.equal(*both):
            raise ValueError(
                f"{path}: its configuration ties {head} to {own}, but it holds both and they differ; "
                'say "tie_word_embeddings": false in its config.json'
            )


def skeleton(path, trust_remote_code=False):
    """Return the model as modules without weights (device "meta"), built from its configuration."""
    from transformers import AutoModelForCausalLM

    config = load_config(path, trust_remote_code)
    with readable(path, "configuration"), quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()


def load_config(path, trust_remote_code=False):
    """Return the configuration of the model at `path`, of a multimodal one that of its text decoder.

    Raises ValueError for what holds no decoder-only model.
    """
    config = _read_config(path, trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{path}: {type(config).__name__} is an encoder-decoder; "
            "blocks are searched in decoder-only language models"
        )
    if not _is_multimodal(config):
        return config
    from transformers import AutoModelForCausalLM

    text = copy.deepcopy(getattr(config, "text_config", None))
    if text is None or type(text) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{path}: {', '.join(config.architectures)} is no causal language model, and transformers has "
            "none for a text decoder in it; use a checkpoint whose architecture ends in ForCausalLM or LMHeadModel"
        )
    stored = _stored_names(path)  # configurations of this kind contradict each other on whether the head is tied
    tied = config.tie_word_embeddings if stored is None else "lm_head.weight" not in map(text_name, stored)
    text.tie_word_embeddings, text.dtype = tied, text.dtype or config.dtype
    text.name_or_path = config.name_or_path
    if hasattr(config, "quantization_config"):
        text.quantization_config = config.quantization_config
    return text


def inside_another(path, trust_remote_code=False):
    """Whether the model at `path` is the text decoder inside a multimodal one, and its weights are named so."""
    return _is_multimodal(_read_config(path, trust_remote_code))


def text_name(name):
    """Return what a multimodal model's tensor is called where the text decoder stands alone, None of other parts."""
    for pattern, new in TEXT_NAMES.items():
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return name if name.startswith("lm_head.") else None


def _is_multimodal(config):
    classes = config.architectures or []
    return bool(classes) and not any("CausalLM" in name or "LMHead" in name for name in classes)


def _stored_names(path):
    """Return the names of a checkpoint's tensors, None where they are not known before it is downloaded."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    where, _ = locate(path)
    single, known = Path(where, "model.safetensors"), ("missing_entries", "connection_errors", "gated_repo")
    with readable(path, "weights"):
        if single.is_file():
            return list(safe_open(single, "pt").keys())
        quietly = {f"_raise_exceptions_for_{reason}": False for reason in known}
        index = cached_file(where, "model.safetensors.index.json", **quietly)
        return list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]) if index else None


def _read_config(path, trust_remote_code):
    """Return the configuration that transformers reads at `path`."""
    from transformers import AutoConfig

    where, gguf = locate(path)
    if gguf:
        return copy.deepcopy(_gguf_config(path, Path(where, gguf).stat().st_mtime_ns))
    with readable(path, "configuration"), quiet():
        if (file := Path(where) / "config.json").is_file():
            _check_counts(path, read_json(file))
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)


def _check_counts(path, values):
    """Raise ValueError where a configuration has more layers or experts than any model: building them takes hours."""
    for name, value in values.items() if isinstance(values, dict) else ():
        _check_counts(path, value)
        most = MOST_LAYERS if COUNTS.fullmatch(name) else MOST_EXPERTS if "experts" in name else math.inf
        if isinstance(value, (int, float)) and value > most:
            raise ValueError(f"{name} is {brief(value)}, more than {most}")


@functools.lru_cache(maxsize=1)
def _gguf_config(path, modified):
    """Return the configuration of a .gguf file; a vocabulary of 50,000 takes seconds each time it is read."""
    from transformers import AutoConfig

    where, gguf = locate(path)
    with readable(path, "configuration"), quiet(), parsed_once():
        fields = gguf_reader(path).fields
        counts = {
            key.rpartition(".")[2]: fields[key].contents() for key in fields if key.endswith(("_count", "length"))
        }
        _check_counts(path, {key.replace("block_count", "layers"): value for key, value in counts.items()})
        config = AutoConfig.from_pretrained(where, gguf_file=gguf)
    _read_the_rest(path, config)
    return config


def gguf_reader(path):
    """Return gguf's reader of a .gguf file, which is parsed once while it stays the same: that takes seconds."""
    path = Path(path).expanduser().resolve()
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _parsed(path, modified):
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    reader = GGUFReader(path)
    name = reader.fields.get("general.name")
    if name and name.contents() == "mistral":  # transformers would take it for the architecture, which no file has
        name.parts[name.data[0]] = np.frombuffer(b"Mistral", "uint8")
    return reader


@contextlib.contextmanager
def parsed_once():
    """Within this context transformers, which asks for a reader for configuration, tokenizer and weights, gets one."""
    try:
        import gguf
    except ImportError:  # then no .gguf file is read either
        yield
        return
    before = gguf.GGUFReader
    gguf.GGUFReader = gguf_reader
    try:
        yield
    finally:
        gguf.GGUFReader = before


def _read_the_rest(path, config):
    """Put into a .gguf file's configuration what transformers leaves out of it; raise ValueError where it cannot.

    That is: what llama.cpp's code of an architecture takes for granted, such as which layers slide; rotations that are
    slowed down by fields `rope.scaling`, or by a tensor `rope_freqs`, one factor for each pair of dimensions, in which
    llama.cpp's converter keeps the scaling of Llama 3.1 and later; and biases, which are weights of the file that the
    model built from this configuration has no place for.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    reader = gguf_reader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    arch = fields["general.architecture"]
    if fields.get("split.count", 1) > 1:
        raise ValueError(
            f"{path}: one of {fields['split.count']} parts; join them with llama-gguf-split --merge and give the whole"
        )
    if arch in BY_NAME:
        _read_arch(BY_NAME[arch], fields, config)
    every = getattr(config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)  # Gemma 3's local rotations are never scaled
    scaling = {key: fields[key] for key in fields if key.startswith(f"{arch}.rope.scaling.")}
    kind, factor = (scaling.get(f"{arch}.rope.scaling.{name}") for name in ("type", "factor"))
    if kind == "linear" and rope.get("rope_type") == "default":
        rope = rope | {"rope_type": "linear", "factor": factor}
        config.rope_parameters = every | {"full_attention": rope} if "full_attention" in every else rope
    if scaling and kind != "none" and rope.get("rope_type") != kind:
        raise ValueError(
            f"{path}: rotations that are scaled as {', '.join(scaling)} say are not read; give the model's folder"
        )
    if (freqs := tensors.get("rope_freqs.weight")) is not None:
        factors = torch.tensor(freqs.data)
        llama3 = {"rope_type": "llama3", "factor": factors.max().item(), "low_freq_factor": 1.0}
        llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # as in all of Llama 3.1 to 3.3
        if not torch.allclose(factors, torch.ones_like(factors)):
            config.rope_parameters = rope | llama3
            if not torch.allclose(llama3_factors(config), factors, rtol=1e-3):
                raise ValueError(
                    f"{path}: rope_freqs.weight holds other rotations than Llama 3.1's; give the model's folder"
                )
    if arch in gguf.MODEL_ARCH_NAMES.values():
        with torch.device("meta"):
            there = AutoModelForCausalLM.from_config(config).state_dict()
        which = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
        names = gguf.get_tensor_name_map(which, fields.get(f"{arch}.block_count", 0))
        experts = any("experts." in name and name.endswith("_bias") for name in there)  # in one tensor, of any name
        there = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in there}
        unread = sorted(name for name in tensors if name.endswith(".bias") and name not in there)
        if unread := [name for name in unread if not (experts and "_exps." in name)]:
            raise ValueError(
                f"{path}: {unread[0]} and {len(unread) - 1} more biases have no place in the model built from "
                "it; give the model's folder"
            )


def _read_arch(row, fields, config):
    """Put into a .gguf file's configuration what llama.cpp's code of an architecture does, and fields of its own."""

    def get(key, default=None):
        return fields.get(f"{row.name}.{key}", default)

    heads, size = config.num_attention_heads, get("attention.key_length")
    if size and hasattr(config, "head_dim"):
        config.head_dim = size
    if row.period:
        n, window = config.num_hidden_layers, get("attention.sliding_window", row.window)
        sliding = slides(row, get("attention.sliding_window_pattern", row.period), n) if window else [False] * n
        config.layer_types = ["sliding_attention" if slide else "full_attention" for slide in sliding]
        config.sliding_window = window or config.sliding_window
    if row.large:
        large = config.num_hidden_layers == row.large
        config.query_pre_attn_scalar = config.hidden_size // heads if large else config.head_dim
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            setattr(config, name, get(name, getattr(config, name)))
    if "sliding_attention" in (getattr(config, "rope_parameters", None) or {}):
        config.rope_parameters["sliding_attention"]["rope_theta"] = get("rope.freq_base_swa", 10000.0)


def llama3_factors(config):
    """Return by how much Llama 3.1's scaling slows down each rotation, (size/2,) float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slow, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / slow


def load_tokenizer(path, trust_remote_code=False):
    """Return the tokenizer that lies beside the model at `path`."""
    from transformers import AutoTokenizer

    where, gguf = locate(path)
    with readable(path, "tokenizer"), quiet(), parsed_once():
        kwargs = {"gguf_file": gguf} if gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **kwargs)
    # The text is tokenized once and then cut; the tokenizer's own limit would only print a warning.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def parameter_count(model):
    """Return the number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device):
    """Raise ValueError unless torch can use `device` here."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise ValueError(f"{device}: unknown device; use cpu, cuda or cuda:N") from None
    if kind == "cpu":
        return
    if kind != "cuda":
        raise ValueError(f"{device}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise ValueError(f"{device}: no CUDA GPU is visible to torch {torch.__version__}; use cpu")
    if index >= torch.cuda.device_count():
        raise ValueError(f"{device}: {torch.cuda.device_count()} GPU(s) visible, numbered from 0")


def dtype_note(device, dtype):
    """Return a line for the user where half precision is emulated on this CPU, slower than fp32; else None."""
    if str(device) != "cpu" or dtype not in ("bf16", "fp16"):
        return None
    native = "_is_amx_tile_supported", "_is_avx512_bf16_supported" if dtype == "bf16" else "_is_amx_fp16_supported"
    if any(getattr(torch.cpu, name, lambda: True)() for name in native):
        return None
    return f"this CPU computes {dtype} without instructions of its own; fp32 is likely faster here"


@contextlib.contextmanager
def readable(path, what):
    """Turn whatever transformers raises while reading `what` of `path` into one line."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {shorten(str(error), 250, placeholder=' ...')}"
        hint = HINTS["gguf" if str(path).endswith(".gguf") else what]
        if "trust_remote_code" in str(error):
            reason, hint = "it runs code of its own", "read that code, then allow it"
        elif isinstance(error, ImportError):
            hint = "install what it asks for"
        raise ValueError(f"{path}: cannot read its {what} ({reason}); {hint}") from error


@contextlib.contextmanager
def quiet():
    """Silence transformers' own loading bars and reports: what matters in them is raised."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.callback(hf_logging.set_verbosity, level)
        if bars:
            stack.callback(hf_logging.enable_progress_bar)
        if not sys.stderr.isatty():  # in a log file the GGUF reader's bar, which knows no switch, is one endless line
            stack.enter_context(_without_bar("transformers.modeling_gguf_pytorch_utils"))
        yield


@contextlib.contextmanager
def _without_bar(module_name):
    """Disable the tqdm bars of one module."""
    import importlib

    try:
        module = importlib.import_module(module_name)
        tqdm = module.tqdm
    except (ImportError, AttributeError):
        yield
        return
    module.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        module.tqdm = tqdm


def _dequantise():
    """Return from_pretrained's arguments that make a GGUF file a dense model."""
    try:
        from transformers import GgufConfig
    except ImportError:  # before transformers 5.20 dequantising was the only way
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _device_map(path, dtype, device, trust_remote_code, offload):
    """Return accelerate's device map: None for the CPU, one GPU, "auto" when one is too small, or offloaded layers."""
    cuda = str(device).startswith("cuda")
    if offload:
        bare = skeleton(path, trust_remote_code)
        lists = {name: m for name, m in bare.named_modules() if isinstance(m, torch.nn.ModuleList)}
        layers = max(lists, key=lambda name: parameter_count(lists[name]))
        place = {f"{layers}.{i}": "cpu" if cuda else "disk" for i in range(len(lists[layers]))}
        for name, module in bare.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and not name.startswith(f"{layers}."):
                place[name] = device
        return place
    if not cuda:
        return None
    if str(device) == "cuda" and torch.cuda.device_count() > 1:
        need = parameter_count(skeleton(path, trust_remote_code)) * DTYPES[dtype].itemsize
        free, _ = torch.cuda.mem_get_info(0)
        if need > 0.85 * free:  # the rest is for activations
            return "auto"
    return {"": device}


@functools.cache
def _offload_folder():
    """Return a folder, gone with this process, for weights that cannot be read from the checkpoint's own files."""
    import atexit
    import shutil
    import tempfile

    place = beside(Path(tempfile.gettempdir()) / "blockpruner", "")
    sweep(place.with_name("blockpruner"))  # of runs that were killed
    folder = tempfile.mkdtemp(prefix=place.name, suffix=".tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_whole(config, path):
    """Raise ValueError for an export of format hf: its blocks are not numbered as those of a whole model."""
    if hasattr(config, "source_blocks"):
        raise ValueError(
            f"{path}: a pruned export ({config.model_type}), whose blocks have moved; give its base model "
            f"{config.pruning_info['base_model']}, and an order that removes more"
        )


def versions():
    """Return the versions that decide numbers, for result files."""
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
