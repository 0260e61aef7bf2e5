"""The states of one batch on its way through the decoder, shared between candidates.

All candidates share the base model's states up to the layer of their block. After a block of layer q is removed, or put
back, whatever was on its way with an earlier block masked is still right up to layer q: such states are kept, at the
layer boundaries that a memory budget allows, and the next iteration continues from them.
With n blocks left and the last removal at x = p/n of the depth an iteration costs (1 - x^2)/2 of an
exhaustive one. What is computed is exactly what a run from the first layer computes, so per-window
losses are bit-identical to it.
"""

from lib.blocks import UNITS, Block


class Trajectories:
    """One batch: its Stream, and the states kept between iterations.

    losses: function of the states (B, T, H) after the last layer to token losses (B, n).
    """

    def __init__(self, decoder, stream, keeping, store, losses):
        self.decoder, self.stream, self.keeping, self.store, self.losses = decoder, stream, keeping, store, losses
        self.kept = {}  # block, or None for the base model -> {layer: the state entering it}
        self.removed = frozenset()  # on top of which they were computed

    def token_losses(self, candidates, removed):
        """Yield (block, token losses (B, n)) with that block or layer masked on top of `removed`, by depth.

        Only what no kept state covers is computed, and only as deep as a candidate needs it.
        """
        decoder, stream = self.decoder, self.stream
        self._rebase(removed)
        deepest = max((block.layer for block in candidates), default=-1)
        x = stream.h
        for i in range(deepest + 1):
            mid = None  # between the layer's two blocks, where it has such a state
            for block in (Block(unit, i) for unit in UNITS):
                if block not in candidates:
                    continue
                start, h = self._resume(block)
                if h is None:
                    start, kinds = i + 1, decoder.kinds(i, {*removed, block})
                    h = decoder.run(i, kinds, x, stream)
                    if decoder.split[i] and kinds == ("mha",) and not decoder.passes:
                        mid = h
                yield block, self.losses(self._finish(block, start, h, removed))
            if i < deepest:
                x = self._advance(i, x, mid, removed)

    def forget(self):
        """Drop all kept states; return how many there were."""
        held = [state for states in self.kept.values() for state in states.values()]
        self.kept = {}
        for state in held:
            self.store.drop(state)
        return len(held)

    def _rebase(self, removed):
        """Forget what is wrong without `removed`: every state past the lowest layer whose blocks went or came back."""
        changed = self.removed.symmetric_difference(removed)
        self.removed = frozenset(removed)
        lowest = min((block.layer for block in changed), default=self.decoder.n_layers)
        for states in self.kept.values():
            for passed in [i for i in states if i > lowest]:
                self.store.drop(states.pop(passed))

    def _resume(self, block):
        """Return (layer, state entering it) of the deepest kept state with `block` masked, (None, None) without."""
        states = self.kept.get(block)
        if not states:
            return None, None
        return max(states), self.store.get(states[max(states)], self.stream.h)

    def _finish(self, block, start, h, removed):
        """Run layers start.. on h, keeping states where `keeping` says, and return the last."""
        for i in range(start, self.decoder.n_layers):
            if i in self.keeping.boundaries:
                self._keep(block, i, h)
            h = self.decoder.run(i, self.decoder.kinds(i, removed), h, self.stream)
        return h

    def _advance(self, i, x, mid, removed):
        """Return the base model's state entering layer i + 1."""
        if i + 1 in self.kept.get(None, ()):
            return self.store.get(self.kept[None][i + 1], self.stream.h)
        kinds = self.decoder.kinds(i, removed)
        if mid is not None:
            kinds, x = tuple(kind for kind in kinds if kind != "mha"), mid
        h = self.decoder.run(i, kinds, x, self.stream)
        if self.keeping.base:
            self._keep(None, i + 1, h)
        return h

    def _keep(self, block, layer, h):
        states = self.kept.setdefault(block, {})
        if layer not in states and (held := self.store.put(h)) is not None:
            states[layer] = held


class Keeping:
    """Which states to keep. base: the base model's at every boundary; boundaries: layers where candidates' are kept."""

    def __init__(self, blocks, n_layers, state_bytes, budget):
        """blocks: candidates; state_bytes: one state of all windows; budget: bytes for all that is kept."""
        self.bytes, chosen = 0, set()  # what saves the most layers a byte comes first; 0 stands for the base
        while True:
            options = []
            for c in set(range(n_layers)) - chosen:
                cost = state_bytes * (sum(block.layer < c for block in blocks) if c else n_layers)
                if cost and self.bytes + cost <= budget:
                    gain = _recomputed(chosen, n_layers) - _recomputed(chosen | {c}, n_layers)
                    gain = gain * len(blocks) / n_layers if c else n_layers * (n_layers - 1) / 2
                    options.append((gain / cost, c, cost))
            if not options:
                break
            _, c, cost = max(options)
            chosen.add(c)
            self.bytes += cost
        self.base, self.boundaries = 0 in chosen, frozenset(chosen - {0})


def _recomputed(boundaries, n_layers):
    """Layers run again for want of a boundary, summed over removals in every layer and candidates before it."""
    total, last = 0, 0
    for q in range(n_layers):
        last = q if q in boundaries else last
        total += last * (q - last) + (q - last) * (q - last + 1) // 2  # candidates before `last`, and after it
    return total
