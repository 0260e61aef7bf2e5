"""A decoder from which single attention and MLP blocks are gone, built from transformers' own classes.

This file lies beside the weights of a pruned checkpoint; load it with trust_remote_code=True. A class
`BlockPruned<X>` is transformers' own X with other layers: layer k is the family's decoder layer around
the k-th attention that was kept, and where MLPs follow one another, or come before the first attention, a
chain of such layers in which the missing half is replaced by a module that adds nothing. No forward of a
family is copied. There are as many layers as attentions, so every cache works as in the family.

What the configuration says about it:
    source_blocks   for each layer the blocks of the source that it runs: "mha4 mlp4, mlp5" is a chain of two steps;
                    a plus before a step: the stream h becomes h + gap(h) there, a matrix for what is missing
    source_fields   the fields of the configuration that depend on the number of layers, as in the source
    source_shapes   for layers of the source the shapes of tensors that are narrower here, if any
    block_modules   the class of the family's decoder layer, and its sub-modules by branch
"""

import copy
import inspect

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer

PREFIX, MODEL_TYPE = "BlockPruned", "blockpruned_"
BARE = ("linear_attn", "conv")  # in the place of an attention, and return no weights


def __getattr__(name):
    """Make class BlockPruned<X>, a configuration or a model, from transformers' class X."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(transformers, name.removeprefix(PREFIX))
    if issubclass(base, PreTrainedConfig):
        made = type(name, (base,), {"model_type": MODEL_TYPE + base.model_type})
        _convert_like(made.model_type, base.model_type)
    elif issubclass(base, PreTrainedModel):
        config = _class(PREFIX + base.config_class.__name__)
        made = type(name, (_Pruned, base), {"config_class": config})
        _convert_like(name, base.__name__)
        inner = transformers.MODEL_MAPPING[base.config_class]
        if inner is not base:  # classifiers build theirs through AutoModel, without leave to run code
            transformers.AutoModel.register(config, _class(PREFIX + inner.__name__), exist_ok=True)
    else:
        raise AttributeError(f"transformers' {base.__name__} is neither a configuration nor a model")
    globals()[name] = made
    return made


def _class(name):
    return globals().get(name) or __getattr__(name)


def _convert_like(name, base):
    """Give a new model type or class what transformers does to weights of `base` while loading (fusing experts)."""
    mapping = get_checkpoint_conversion_mapping(base)
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


class _Pruned:
    """Mixed into a family's model: replaces the layers that the family has built."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if any(type(child).__name__.startswith(PREFIX) for child in self.children()):
            return  # it has its layers already
        kind, source = config.block_modules["layer"], copy.deepcopy(self.config)
        for field, value in config.source_fields.items():
            setattr(source, field, value)
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList) and len(m)]
        layers = next(m for m in lists if type(m[0]).__name__ == kind)
        family = type(layers[0])
        for k, chain in enumerate(config.source_blocks):
            words = [step.split() for step in chain.split(",")]
            chain = [{block[:3]: int(block[3:]) for block in step if block != "+"} for step in words]
            steps = [_step(family, source, step.get("mha"), step.get("mlp"), config.block_modules) for step in chain]
            for step, blocks in zip(steps, words, strict=True):
                step.gap = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if "+" in blocks else None
            anchor = next(i for i, step in enumerate(chain) if "mha" in step)
            layers[k] = steps[0] if len(steps) == 1 and steps[0].gap is None else _chain(family, steps, anchor)
            for module in layers[k].modules():
                if getattr(module, "layer_idx", None) is not None:
                    module.layer_idx = k  # where the cache keeps this attention's keys and values
                if getattr(module, "config", None) is source:
                    module.config = self.config
        self.post_init()


def _step(family, source, mha, mlp, names):
    """Return a decoder layer with the attention and the MLP of these source layers, without one that is None."""
    layer = _narrow(family, source, mlp if mha is None else mha)
    own_norm = any(getattr(layer, name, None) is not None for name in names["mlp_norms"])
    if mlp is None:
        _leave_out(layer, names["mlp"], names["mlp_norms"], False)
    elif mha is None:
        _leave_out(layer, names["mha"], names["mha_norms"] if own_norm else (), True)
    elif mha != mlp:
        other = _narrow(family, source, mlp)
        for name in (*names["mlp"], *names["mlp_norms"]):
            if getattr(other, name, None) is not None:
                setattr(layer, name, getattr(other, name))
    return layer


def _narrow(family, source, i):
    """Return layer i of the source, its MLP as wide as source_shapes says."""
    layer = family(source, i)
    for name, shape in getattr(source, "source_shapes", {}).get(str(i), {}).items():
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(module.weight.new_empty(shape)))
        if leaf == "weight":
            module.out_features, module.in_features = shape
    return layer


def _leave_out(layer, branch, norms, is_attention):
    """Replace a branch: of several modules the last one's output joins the stream."""
    *before, last = [name for name in branch if getattr(layer, name, None) is not None]
    for name in (*before, *(name for name in norms if getattr(layer, name, None) is not None)):
        setattr(layer, name, nn.Identity())
    setattr(layer, last, _Nothing(getattr(layer, last), is_attention and last not in BARE))


class _Nothing(nn.Module):
    """Stands for a branch's last module and adds nothing: zeros, or the residual where the module adds it itself."""

    def __init__(self, module, is_attention):
        super().__init__()
        self.names = list(inspect.signature(module.forward).parameters)
        self.is_attention = is_attention  # most attentions return their weights too

    def forward(self, *args, **kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        out = given["residual"] if "residual" in given else torch.zeros_like(given[self.names[0]])
        return (out, None) if self.is_attention else out


def _chain(family, steps, anchor):
    """Return one layer that runs several, to everyone else a layer of the family.

    The steps are no longer instances of the family's class, so that hidden states are recorded once a
    layer, and that a chain stays on one device; nor of a layer that recomputes itself, which the chain does
    for all of them. anchor: the step that has the attention.
    """
    members = {k: v for k, v in vars(family).items() if k not in ("__dict__", "__weakref__", "__init__")}
    bases = tuple(nn.Module if base is GradientCheckpointingLayer else base for base in family.__bases__)
    if bases != family.__bases__ and "__init_subclass__" in vars(GradientCheckpointingLayer):
        members["forward"] = family.forward.__wrapped__  # without the recomputing, which is in __call__ until 5.19
    for step in steps:
        step.__class__ = type(f"{family.__name__}Step", bases, members)
    chain = object.__new__(type(family.__name__, (family,), {"forward": _run_chain, "__init__": nn.Module.__init__}))
    nn.Module.__init__(chain)
    for key, value in vars(steps[anchor]).items():
        if not key.startswith("_") and key != "training":  # the attention's type, where a model asks its layers
            setattr(chain, key, value)
    # vLLM tells layers by the one number in a name
    chain.anchor, chain.steps = anchor, nn.ModuleDict({f"step{i}": step for i, step in enumerate(steps)})
    return chain


def _run_chain(self, hidden_states, *args, **kwargs):
    rest = None
    for i, step in enumerate(self.steps.values()):
        if step.gap is not None:
            hidden_states = hidden_states + step.gap(hidden_states)
        output = step(hidden_states, *args, **kwargs)
        hidden_states = output[0] if isinstance(output, tuple) else output
        if i == self.anchor and isinstance(output, tuple):
            rest = output[1:]
    return hidden_states if rest is None else (hidden_states, *rest)
