"""A change to a checkpoint: blocks removed, tensors replaced, configuration changed; run in memory, or written.

Whatever changes weights returns an Edit and writes nothing itself: `applied` runs a model in memory as the edit would
have it, and lib.export.write.export writes it in any format that can hold it.

    with applied(decoder, edit):
        after = window_losses(decoder, windows, 8)
    export("models/Llama-2-7b-hf", edit, "merged")
"""

import contextlib
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

NOTHING = MappingProxyType({})


class Edit(NamedTuple):
    """removed: blocks, in the order of their removal. tensors: {name in the checkpoint: tensor, or function that loads
    it}, of the shape of what it replaces. matrices: {kept block behind removed ones: A (H, H)}, the stream h (..., H)
    that enters it becomes h + h A; only the format hf holds them. config: {field of the configuration: value}. about:
    how the edit was made, as JSON has it, with its "method"; goes into an export's pruning_info. widths:
    {Block("mlp", i): channels that its MLP keeps, Block("mha", i): key-value heads}; tensors of these blocks have
    shapes of their own, and may be a bias that there was not.
    """

    removed: tuple = ()
    tensors: Mapping = NOTHING
    config: Mapping = NOTHING
    matrices: Mapping = NOTHING
    about: Mapping = NOTHING
    widths: Mapping = NOTHING

    def kept(self, kind):
        """Return {layer: channels} of the narrowed MLPs that stay, or {layer: key-value heads} for kind "mha"."""
        return {i: n for (k, i), n in self.widths.items() if k == kind and (k, i) not in set(self.removed)}

    def load(self, name):
        """Return a replaced tensor."""
        value = self.tensors[name]
        return value() if callable(value) else value


@contextlib.contextmanager
def applied(decoder, edit):
    """Within this context the model in memory is the edited one: tensors replaced, removed blocks masked.

    Raises ValueError as `replaced`, and for an edit that changes the configuration, which modules have read already.
    """
    if edit.config:
        raise ValueError(
            f"the edit changes {', '.join(edit.config)} of the configuration: write it, and load the result"
        )
    with replaced(decoder, edit), decoder.masked(edit.removed):
        yield


@contextlib.contextmanager
def replaced(decoder, edit):
    """Within this context the model has the edit's tensors and matrices, its removed blocks still running.

    Nothing is copied but these. Raises ValueError for a name that the model in memory has not, and for other shapes.
    """
    model = decoder.model
    there = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    narrow = {id(p) for p in decoder.parameters(edit.widths)}
    with contextlib.ExitStack() as stack:
        for name in edit.tensors:
            tensor, owner = edit.load(name), None if name in there or not edit.widths else _no_bias(model, name)
            if owner is not None:
                stack.callback(setattr, owner, "bias", None)
                owner.bias = torch.nn.Parameter(tensor.to(owner.weight.device), requires_grad=False)
                continue
            parameter = there[name_in(there, name, model)]
            if id(parameter) not in narrow:
                check_shape(name, tensor, parameter.shape)
            stack.enter_context(holding([(parameter, tensor)]))
        for (_, i), A in edit.matrices.items():  # what is between a layer's input and the block is removed
            hook = decoder.layers[i].register_forward_pre_hook(functools.partial(_added, A), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _added(A, module, args, kwargs):
    """A hook before a layer: the stream h becomes h + h A."""
    h = args[0] if args else kwargs["hidden_states"]
    h = h + h @ A.to(h.device, h.dtype)
    return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})


def _no_bias(model, name):
    """Return the module of which `name` would be the bias, None unless it is one that has none."""
    owner = dict(model.named_modules()).get(name.removesuffix(".bias")) if name.endswith(".bias") else None
    return owner if owner is not None and getattr(owner, "bias", 0) is None else None


@contextlib.contextmanager
def holding(pairs):
    """Within this context each parameter of (parameter, tensor) has the tensor's values, in its own dtype and place."""
    before = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, tensor in pairs:
            parameter.data = tensor.to(parameter.device, parameter.dtype)
        yield
    finally:
        for (parameter, _), data in reversed([*zip(pairs, before, strict=True)]):
            parameter.data = data


def name_in(names, name, model):
    """Return which of `names` an edit's tensor has: its own, or that with or without the base model's prefix.

    Raises ValueError for none: transformers renames and fuses some weights while loading, and nothing is guessed.
    """
    prefix = f"{model.base_model_prefix}."
    for other in (name, prefix + name, name.removeprefix(prefix)):
        if other in names:
            return other
    raise ValueError(f"the edit replaces {name}, and {type(model).__name__} has no tensor of that name here")


def check_shape(name, tensor, shape):
    """Raise ValueError unless a replacement has the shape of what it replaces."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"the edit's {name} is {tuple(tensor.shape)}, and what it replaces {tuple(shape)}")
