"""The format "hf": a checkpoint with a small modeling file, for blocks that do not pair up into whole layers."""

import shutil
from pathlib import Path

from lib.export import modeling_blockpruned as modeling
from lib.export.checkpoint import Entry, verify, write_checkpoint
from lib.export.config import reindexed
from lib.export.folder import in_python
from lib.export.layers import Layer, repack


def as_hf(source, removed, info):
    """A checkpoint with its own modeling file: one layer for each attention, MLPs chained to it."""
    chains = [with_matrices(chain, source.edit.matrices) for chain in anchored(source, removed)]
    family = type(source.config).__name__, type(source.bare.base_model).__name__, type(source.bare).__name__
    names = [modeling.PREFIX + name for name in family]
    config_class, _, model_class = (getattr(modeling, name) for name in names)
    anchors = [next(layer.mha for layer in chain if layer.mha is not None) for chain in chains]
    changed = reindexed(source.config, source.n_layers, [Layer(i, i) for i in anchors])
    values = source.config.to_dict()
    fields = {field: values[field] for field in changed}
    row = {key: list(names) for key, names in source.family._asdict().items()}
    auto = dict(zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), names, strict=True)) | _heads(source.config)
    config = config_class.from_dict(
        values
        | changed
        | {
            "model_type": config_class.model_type,
            "architectures": [names[-1]],
            "auto_map": {key: f"{Path(modeling.__file__).stem}.{name}" for key, name in auto.items()},
            "source_blocks": [", ".join(map(str, chain)) for chain in chains],
            "source_fields": fields,
            **({"source_shapes": shapes} if (shapes := source.narrow_shapes()) else {}),
            "block_modules": {"layer": type(source.layers[0]).__name__, **row},
            "pruning_info": info,
        }
    )
    labels = {}
    for k, chain in enumerate(chains):
        for j, step in enumerate(chain):
            label = str(k) if len(chain) == 1 and not isinstance(step, Mapped) else f"{k}.steps.step{j}"
            labels |= dict.fromkeys(step.blocks(), label)  # vLLM wants one number a name
    entries = source.relabelled(labels)
    head = next(place.head for place in map(source.place, source.names()) if place)
    for block, A in source.edit.matrices.items():
        weight = A.T.to("cpu", entries[0].dtype)  # as nn.Linear has it
        name = f"{head}{labels[block]}.gap.weight"
        entries.append(Entry(name, tuple(weight.shape), weight.dtype, lambda weight=weight: weight))
    verify(model_class, config, entries)

    def write(folder):
        shutil.copyfile(modeling.__file__, folder / Path(modeling.__file__).name)
        write_checkpoint(folder, source, config, entries)

    return write, in_python("PATH, trust_remote_code=True") + (
        f"\n\nThe code is `{Path(modeling.__file__).name}` beside the weights; it builds on the classes of "
        "transformers 5. A program that does not run it refuses the model type.\n"
    )


def _heads(config):
    """Return {name of an auto class: name of our class} for what else transformers puts on top of this family."""
    import transformers

    autos = [getattr(transformers, f"AutoModelFor{task}Classification") for task in ("Sequence", "Token")]
    there = {auto.__name__: auto._model_mapping.get(type(config), None) for auto in autos}
    return {auto: modeling.PREFIX + model.__name__ for auto, model in there.items() if model}


class Mapped(Layer):
    """A Layer before which a matrix is applied to the stream; the configuration marks it with a plus."""

    def __str__(self):
        return f"+ {super().__str__()}"


def with_matrices(chain, matrices):
    """Return a chain of Layers, cut so that each block behind a matrix is the first of a Mapped one."""
    steps = []
    for layer in chain:
        if layer.mha is not None and ("mlp", layer.mlp) in matrices:
            layers = [layer._replace(mlp=None), layer._replace(mha=None)]
        else:
            layers = [layer]
        steps += [Mapped(*some) if some.blocks()[0] in matrices else some for some in layers]
    return steps


def anchored(source, removed):
    """Return the kept blocks as chains of Layers, each with exactly one attention; refuse what has none."""
    name = type(source.bare).__name__
    if not source.native:
        raise ValueError(
            f"format hf: {name} is code of the checkpoint's own, and hf builds on transformers' classes; the nearest "
            "format is stock where whole layers are left, else zeroed"
        )
    chains = []
    for layer in repack(source.n_layers, removed, mix=not source.parallel):
        if chains and (layer.mha is None or all(other.mha is None for other in chains[-1])):
            chains[-1].append(layer)
        else:
            chains.append([layer])
    attentions = [layer.mha for chain in chains for layer in chain if layer.mha is not None]
    if all(any(hasattr(source.layers[i], name) for name in modeling.BARE) for i in attentions):
        raise ValueError(
            f"format hf: no attention of {name} is left, and the cache needs one; the nearest format is zeroed"
        )
    return chains
