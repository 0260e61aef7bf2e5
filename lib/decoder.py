"""A decoder as embed -> layers -> head, and its residual blocks: find, mask, remove, step.

A layer is two residual branches, ("mha", i) and ("mlp", i) (paper, section 3.1). A branch is
masked by swapping its sub-modules for stand-ins that add nothing to the residual stream, so no
layer's forward is ever copied and every family of FAMILIES goes through the same few lines. What
a layer receives besides the stream (masks, rotary tables, positions) is caught from the model's
own forward, and the head (final norm, lm_head, scaling, soft-capping) is the model's own forward
with the layers bridged over.

    decoder = Decoder(model)                      # refuses what it cannot prove
    stream = decoder.embed(ids)                   # ids (B, T)
    h = decoder.run(0, ("mlp",), stream.h, stream)    # layer 0 without its attention
    losses = decoder.token_losses(h, ids)         # (B, T-1) next-token losses

Methods that remove whole layers name one as Block("layer", i): both its branches, whatever is left of them.
"""

import contextlib
import inspect
import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from lib.blocks import KINDS, Block, blocks_of
from lib.families import FAMILIES
from lib.losses import cross_entropy, divergence, top_divergence, top_logs
from lib.repeated import Repeated, with_tensors

HEAD_TOKENS = 512  # tokens per head call on a CPU: full logits of a batch never exist at once
HEAD_LOGITS = 2**26  # logits per head call on a GPU, where short calls wait for Python more than they compute


class Stream(NamedTuple):
    """A batch at the door of layer 0: h (B, T, H), and what each layer is called with besides h."""

    h: torch.Tensor
    calls: list  # per layer: (args, kwargs)


class Decoder:
    """A causal language model that can be stepped layer by layer with any blocks masked.

    Building one runs the proof on a few tokens: stepping with nothing masked must give the model's
    own logits bit for bit, and masking both blocks of a layer must make it the identity. Raises
    ValueError naming the layer class where a model is unknown or fails.

    counts: forwards done so far of "mha" and "mlp" blocks and of the "head", each in windows.
    split[i]: whether layer i is its attention step followed by its MLP step, bit for bit, so that
    the state between the two exists (not so where the branches are parallel).
    passes: {(layer, kinds that are off): factor}, by which a removed block, or both of a layer where it does not split,
    multiply the stream in `run`; empty, they pass it as it is. See `passing`.
    rows: windows that a layer or the head is given at once; a full memory halves them, and says so in `notes`, lines
    for people. on_full: a weak reference to a function that gives memory back first, and returns whether it had any.
    """

    def __init__(self, model):
        self.model = model
        self.layers = find_layers(model)
        self.family = FAMILIES[type(self.layers[0]).__name__]
        self.removed = set()
        self.counts = Counter()
        self.passes = {}
        self._parts = [_find_parts(layer, self.family) for layer in self.layers]
        self._repeated = Repeated()
        self.rows, self.notes, self.on_full = math.inf, [], lambda: None
        self.split = self._prove()

    @property
    def n_layers(self):
        return len(self.layers)

    @property
    def devices(self):
        """The devices on which states are: those of the layers, and of the tokens."""
        return {p.device for p in self.layers.parameters() if not p.is_meta} | {self.input_device}

    @property
    def offloaded(self):
        """Whether weights of layers are elsewhere and visit the device for each forward."""
        return any(p.is_meta for p in self.layers.parameters())

    def blocks(self, block_type="mix"):
        """Return the blocks still there, in the paper's order: mha 0..L-1, then mlp 0..L-1.

        block_type: "mix", "mha", "mlp", or "layer" for the layers of which anything is left.
        """
        kinds = KINDS if block_type == "mix" else (block_type,)
        every = [Block(kind, i) for kind in kinds for i in range(self.n_layers)]
        return [block for block in every if not self.removed.issuperset(blocks_of([block]))]

    @torch.inference_mode()
    def embed(self, ids):
        """Return the Stream of token ids (B, T): the state entering layer 0 and every layer's other arguments."""
        first, calls = [], [None] * self.n_layers

        def catch(i):
            def forward(*args, **kwargs):
                h, args, kwargs = _split_call(args, kwargs)
                if i == 0:
                    first.append(h)
                calls[i] = (args, kwargs)
                return self._as_output(h)

            return forward

        with self._layers_replaced(catch):
            self.model.base_model(input_ids=ids.to(self.input_device), use_cache=False)
        return Stream(first[0], self._repeated.in_place(calls))

    @torch.inference_mode()
    def run(self, i, kinds, h, stream):
        """Return h (B, T, H) after layer i with only the blocks of `kinds` on; the input is left as it is."""
        if self.passes and kinds != KINDS:
            return self._run_passing(i, kinds, h, stream)
        if not kinds:
            return h
        for kind in kinds:
            self.counts[kind] += len(h)

        def some(rows):
            call = with_tensors(stream.calls[i], lambda tensor: _rows(tensor, rows, len(h)))
            return self.step(i, kinds, h[rows], call)

        return self._fitting(len(h), lambda: self.step(i, kinds, h, stream.calls[i]), some)

    def _run_passing(self, i, kinds, h, stream):
        """As `run`, each step of the layer times its factor of `passes` where something of it is off."""
        for step in [(kind,) for kind in KINDS] if self.split[i] else [KINDS]:
            left = tuple(kind for kind in step if kind in kinds)
            self.counts.update(dict.fromkeys(left, len(h)))
            h = self.step(i, left, h, stream.calls[i]) if left else h
            h = h if left == step else h * self.passes[i, tuple(kind for kind in step if kind not in kinds)]
        return h

    @contextlib.contextmanager
    def passing(self, passes):
        """Within this context what is removed or masked multiplies the stream as `passes`, an attribute, says."""
        before, self.passes = self.passes, passes
        try:
            yield
        finally:
            self.passes = before

    def step(self, i, kinds, h, call, weights=None):
        """As `run`, under the caller's own gradient mode, with what the layer is called with besides h.

        weights: {name in the layer: tensor} in place of its own.
        """
        args, kwargs = call
        with self._layer_masked(i, [kind for kind in KINDS if kind not in kinds]):
            if weights:
                return _tensor(torch.func.functional_call(self.layers[i], weights, (h, *args), kwargs))
            return _tensor(self.layers[i](h, *args, **kwargs))

    def _fitting(self, B, whole, some):
        """Return whole(), or where memory is full, some(rows) of parts of the B rows, joined.

        What `on_full` can give back is tried first. Raises torch.OutOfMemoryError where one row does not fit.
        """
        while True:
            size = min(B, self.rows)
            try:
                return (
                    whole() if size == B else torch.cat([some(slice(k, min(B, k + size))) for k in range(0, B, size)])
                )
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                reason = str(error)  # the error itself would keep alive what the failed call had
            free = self.on_full()
            if free and free():
                continue
            if size == 1:
                raise torch.OutOfMemoryError(reason)
            self.rows = size // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.notes.append(f"memory is full: windows are run {self.rows} at a time from here, which is slower")

    @contextlib.contextmanager
    def resident(self, i):
        """Within this context an offloaded layer's weights stay on the device: moved once, not at each forward."""
        held = []
        try:
            for module in self.layers[i].modules():
                hook = getattr(module, "_hf_hook", None)  # accelerate's
                if getattr(hook, "offload", False):
                    hook.pre_forward(module)
                    hook.offload = False
                    held.append((hook, module))
            yield
        finally:
            for hook, module in held:
                hook.offload = True
                hook.post_forward(module, None)

    def kinds(self, i, masked=()):
        """Return the kinds of layer i that are neither removed nor in `masked`, a collection of blocks and layers."""
        if ("layer", i) in masked:
            return ()
        return tuple(k for k in KINDS if (k, i) not in self.removed and (k, i) not in masked)

    @torch.inference_mode()
    def head(self, x):
        """Return the logits (n, V) of last-layer states x (n, H): the model's own norm, lm_head and scaling."""
        with self._only_head() as head:
            return head(x.unsqueeze(0))

    @torch.inference_mode()
    def token_losses(self, h, ids):
        """Return the next-token losses (B, T-1) on the CPU, float32 (float64 where the model is).

        h: (B, T, H) after the last layer; ids: (B, T). Computed from the model's own logits, slice
        by slice: full logits never exist at once.
        """
        self.counts["head"] += len(h)
        return self._fitting(len(h), lambda: self._losses(h, ids), lambda rows: self._losses(h[rows], ids[rows]))

    def _losses(self, h, ids):
        B, T, _ = h.shape
        slices = self._head_slices(h[:, :-1], T)
        targets = ids[:, 1:].flatten().to(h.device).split([x.shape[:2].numel() for x in slices])
        with self._only_head() as head:
            losses = [cross_entropy(head(x), some) for x, some in zip(slices, targets, strict=True)]
        return torch.cat(losses).view(B, T - 1).cpu()

    @torch.inference_mode()
    def divergences(self, h, dense):
        """Return KL(softmax of the logits of `dense` || of h) for every position, (B, T) on the CPU, as token_losses.

        h, dense: (B, T, H) after the last layer. Both heads run slice by slice: neither's logits are kept.
        """
        self.counts["head"] += 2 * len(h)
        return self._fitting(
            len(h), lambda: self._divergences(h, dense), lambda rows: self._divergences(h[rows], dense[rows])
        )

    def _divergences(self, h, dense):
        B, T, _ = h.shape
        pairs = zip(self._head_slices(h, T), self._head_slices(dense, T), strict=True)
        with self._only_head() as head:
            losses = [divergence(head(y), head(x)) for x, y in pairs]
        return torch.cat(losses).view(B, T).cpu()

    @torch.inference_mode()
    def top_logs(self, h, k):
        """Return the most likely tokens of every position of h (B, T, H), as lib.losses.top_logs, in pieces."""
        B, T, _ = h.shape
        self.counts["head"] += B
        with self._only_head() as head:
            return [top_logs(head(x), k) for x in self._head_slices(h, T)]

    @torch.inference_mode()
    def top_divergences(self, h, teacher):
        """Return lib.losses.top_divergence for every position, (B, T) on the CPU; teacher: what `top_logs` returned."""
        B, T, _ = h.shape
        self.counts["head"] += B
        with self._only_head() as head:
            losses = [
                top_divergence(logs, tokens, head(x))
                for x, (logs, tokens) in zip(self._head_slices(h, T), teacher, strict=True)
            ]
        return torch.cat(losses).view(B, T).cpu()

    @property
    def input_device(self):
        return self.model.get_input_embeddings().weight.device

    @contextlib.contextmanager
    def masked(self, blocks):
        """Within this context the model itself runs without `blocks`."""
        blocks = blocks_of(blocks)
        with contextlib.ExitStack() as stack:
            for i in {block[1] for block in blocks}:
                stack.enter_context(self._layer_masked(i, [k for k in KINDS if (k, i) in set(blocks)]))
            yield

    def parameters(self, blocks):
        """Return the parameters that go with `blocks`, norms included; those already removed are none."""
        return _leaving(self._parts, {*blocks_of(blocks), *self.removed})

    def block_parameters(self, blocks):
        """Return how many parameters go with `blocks`, as `parameters`."""
        return sum(p.numel() for p in self.parameters(blocks))

    def remove(self, blocks):
        """Take `blocks` out of the model for good and free their weights; the layer shells stay."""
        for block in blocks_of(blocks):
            self.removed.add(Block(*block))
            gone = [kind for kind in KINDS if (kind, block[1]) in self.removed]
            for owner, name, _, stand_in in self._swaps(block[1], gone):
                setattr(owner, name, stand_in)
            # a later mask of the other block must not bring the weights back
            self._parts[block[1]] = [
                (owner, name, getattr(owner, name), stand_in, kinds)
                for owner, name, _, stand_in, kinds in self._parts[block[1]]
            ]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- masking: swap sub-modules for stand-ins -------------------------------------------------

    def _swaps(self, i, kinds):
        return [part[:4] for part in self._parts[i] if part[4] <= set(kinds)]

    @contextlib.contextmanager
    def _layer_masked(self, i, kinds):
        swaps = self._swaps(i, kinds) if kinds else ()
        before = [owner._modules[name] for owner, name, _, _ in swaps]  # a stand-in already, where masks are nested
        try:
            for owner, name, _, stand_in in swaps:
                owner._modules[name] = stand_in  # setattr's checks cost more than a small layer
            yield
        finally:
            for (owner, name, _, _), module in zip(swaps, before, strict=True):
                owner._modules[name] = module

    # ---- bridging the layers ---------------------------------------------------------------------

    @contextlib.contextmanager
    def _layers_replaced(self, forward_of):
        """Within this context layer i's forward is forward_of(i)."""
        before = [vars(layer).get("forward") for layer in self.layers]  # accelerate's hooks live there
        try:
            for i, layer in enumerate(self.layers):
                layer.forward = forward_of(i)
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    @contextlib.contextmanager
    def _only_head(self):
        """Within this context: the function of last-layer states x (b, n, H) to their logits (b * n, V)."""
        x = None

        def head(states):
            nonlocal x
            x = states
            ids = torch.zeros(x.shape[:2], dtype=torch.long, device=self.input_device)
            return self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)

        with self._layers_replaced(lambda i: lambda *args, **kwargs: self._as_output(x)):
            yield head

    def _head_slices(self, x, T):
        """Return states x (B, n, H) in pieces (b, m, H) for the head, m at most T: learned positions may end there."""
        tokens = max(1, HEAD_LOGITS // self.model.config.vocab_size) if x.is_cuda else HEAD_TOKENS
        if x.is_cuda and tokens >= x.shape[1]:
            return x.split(tokens // x.shape[1])
        return x.reshape(1, -1, x.shape[2]).split(min(tokens, T), dim=1)

    def _as_output(self, h):
        return h if self._output_len is None else (h,) + (None,) * (self._output_len - 1)

    # ---- the proof -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _prove(self):
        """Prove the family's row on this model; return for each layer whether it splits in two steps."""
        name = type(self.layers[0]).__name__
        refusal = f"{name}: %s; its row of FAMILIES in lib/families.py does not describe this model"
        ids = torch.arange(16, device=self.input_device).unsqueeze(0) % self.model.config.vocab_size
        logits = self._learn_forms(ids)
        stream = self.embed(ids)
        h, split = stream.h, []
        for i in range(self.n_layers):
            given = h.clone()
            args, kwargs = stream.calls[i]
            with self._layer_masked(i, KINDS):
                if not _same(_tensor(self.layers[i](h, *args, **kwargs)), h):
                    raise ValueError(refusal % f"layer {i} with both blocks masked is not the identity")
            both = self.run(i, KINDS, h, stream)
            halves = self.run(i, ("mlp",), self.run(i, ("mha",), h, stream), stream)
            if not _same(h, given):
                raise ValueError(refusal % f"layer {i} changes its input in place")
            split.append(_same(both, halves))
            h = both
        if not _same(self.head(h[0]), logits):
            raise ValueError(refusal % "stepping through the layers does not give the model's own logits")
        self.counts.clear()
        return split

    def _learn_forms(self, ids):
        """Run the model once on ids; note which modules return tuples. Returns the logits (T, V)."""
        hooks, seen = [], {}

        def note(key):
            def hook(module, args, output):
                seen[key] = len(output) if isinstance(output, tuple) else None

            return hook

        try:
            hooks.append(self.layers[0].register_forward_hook(note("layer")))
            for parts in self._parts:
                hooks += [m.register_forward_hook(note(s)) for _, _, m, s, _ in parts if isinstance(s, _AddNothing)]
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        self._output_len = seen.pop("layer")
        for stand_in, length in seen.items():
            stand_in.output_len = length
        return logits


def find_layers(model):
    """Return the ModuleList of decoder layers of a transformers model, weights not needed.

    Raises ValueError naming the class of an unknown layer and what to add.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    for layers in lists:
        names = {type(layer).__name__ for layer in layers}  # a pruned export has layers of two classes of one name
        if len(names) == 1 and names <= FAMILIES.keys():
            return layers
    classes = sorted({type(layer).__name__ for layer in max(lists, key=len, default=())})
    raise ValueError(
        f"{type(model).__name__}: unknown decoder layer {' + '.join(classes) or '(no layer list found)'}; add a row to "
        "FAMILIES in lib/families.py that names its attention, its MLP and their norms, and a toy to tests/families.py"
    )


def block_parameters(layers, blocks):
    """Return how many parameters go with `blocks`, norms included; no weights and no proof are needed."""
    return sum(p.numel() for p in leaving_parameters(layers, blocks))


def leaving_parameters(layers, blocks):
    """Return the parameters that go with `blocks`, as `block_parameters` counts them."""
    parts = [_find_parts(layer, FAMILIES[type(layer).__name__]) for layer in layers]
    return _leaving(parts, blocks_of(blocks))


def _find_parts(layer, row):
    """Return [(owner, name, module, stand-in, kinds)]: the module is swapped once all of `kinds` are masked.

    The owner is the layer, or in a pruned export one of the steps that a layer chains.
    """
    parts = []
    for owner in layer.steps.children() if hasattr(layer, "steps") else [layer]:

        def present(names, owner=owner):
            return [(name, getattr(owner, name)) for name in names if getattr(owner, name, None) is not None]

        norms = {"mha": present(row.mha_norms), "mlp": present(row.mlp_norms)}
        for kind in KINDS:
            modules = present(getattr(row, kind))
            if not modules:
                raise ValueError(
                    f"{type(layer).__name__} has none of the modules {', '.join(getattr(row, kind))} that its row of "
                    "FAMILIES in lib/families.py names; correct the row"
                )
            parts += [(owner, name, module, nn.Identity(), {kind}) for name, module in modules[:-1]]
            name, last = modules[-1]
            parts.append((owner, name, last, _AddNothing(last), {kind}))
            goes_with = {kind} if norms["mlp"] else set(KINDS)
            parts += [(owner, name, module, nn.Identity(), goes_with) for name, module in norms[kind]]
    return parts


def _leaving(parts, blocks):
    """Return the parameters of the modules that go with `blocks`; parts: each layer's."""
    gone, blocks = {}, set(blocks)
    for i in {i for _, i in blocks}:
        kinds = {kind for kind in KINDS if (kind, i) in blocks}
        for _, _, module, _, goes_with in parts[i]:
            if goes_with <= kinds:
                gone |= {id(p): p for p in module.parameters()}
    return list(gone.values())


class _AddNothing(nn.Module):
    """Stands for a branch's last module: returns zeros, or the residual where the module adds it itself (Bloom)."""

    def __init__(self, module):
        super().__init__()
        self.signature = inspect.signature(module.forward)
        self.adds_residual = "residual" in self.signature.parameters
        self.output_len = None  # length of the tuple that the module returns, None for a tensor

    def forward(self, *args, **kwargs):
        if self.adds_residual:
            out = self.signature.bind(*args, **kwargs).arguments["residual"]
        else:
            out = torch.zeros_like(_split_call(args, kwargs)[0])
        return out if self.output_len is None else (out,) + (None,) * (self.output_len - 1)


def _split_call(args, kwargs):
    """Return (h, other args, other kwargs) of a call that passes the stream first or by its usual name."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), args, kwargs


def _rows(tensor, rows, B):
    """Return the part of a layer's argument that belongs to some windows, a slice, of B; all of what all share."""
    if tensor.dim() < 2 or B == 1:
        return tensor
    n = len(tensor) // B if tensor.dim() == 3 and tensor.shape[1] == 1 else 1  # ALiBi's slopes: a row a window and head
    return tensor[rows.start * n : rows.stop * n] if len(tensor) == n * B else tensor


def _tensor(output):
    return output[0] if isinstance(output, tuple) else output


def _same(a, b):
    """Whether two tensors are equal, NaN to NaN: a broken model is the search's to report, not the proof's."""
    b = b.to(a.device)  # a layer's output may be on another GPU than its input
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
