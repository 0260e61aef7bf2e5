"""One budget for blocks, groups of channels and heads: whatever raises the loss least for its size goes next.

A group is scored with its refit: its removal is another matrix of the projection that reads it, with zeros in the
columns of what is gone, so that no shape changes while the search runs.

    found = greedy(plan)    # a lib.allocation.Plan
"""

import contextlib
import heapq
import math
from typing import NamedTuple

import torch

from lib.blocks import KINDS, Block
from lib.edits import holding
from lib.osscar import eliminate
from lib.width import CRITERIA, REFITS, dense_channels, taylor

GROUPS = {"channels": "mlp", "heads": "mha"}  # what a group is called -> the kind of its block


class Found(NamedTuple):
    """widths: {Block: units kept} of the branches still there; removed: all blocks removed, in order; steps: those of a
    search, [{"unit", "loss", "parameters"}]."""

    widths: dict
    removed: tuple = ()
    steps: tuple = ()


@torch.no_grad()
def greedy(plan):
    """Return widths, and with plan.blocks removed blocks, by the loss of the calibration text per parameter removed.

    A unit is the next group of channels of an MLP or head of an attention, in the criterion's order and with its refit,
    or a whole attention or MLP. The one that raises the mean token loss least for its parameters goes, until no unit
    fits into the budget. Scores are kept from step to step: a unit is scored anew when its old score is the best, and
    goes when it still is. That is greedy if scores only rise as more is removed, which is nearly so. The states
    entering all layers are held.
    """
    with contextlib.closing(_Search(plan, Variants(plan))) as search:
        spent, steps, order = 0, [], []
        smallest = min(part.cost * plan.group(block) for block, part in plan.parts.items()) / 2
        queue = [(-math.inf, -1, unit) for unit in search.units()]
        heapq.heapify(queue)
        while queue:
            _, at, unit = heapq.heappop(queue)
            cost = search.cost(unit)
            if cost == 0 or spent + cost > plan.budget + smallest:
                continue  # gone with its block, or more than is left to spend
            if at < len(steps):
                heapq.heappush(queue, ((search.loss(unit) - search.now) / cost, len(steps), unit))
                continue
            search.take(unit)
            spent += cost
            steps.append({"unit": str(unit), "loss": search.now, "parameters": cost})
            if unit.kind in KINDS:
                order.append(unit)
            elif search.cost(unit):
                heapq.heappush(queue, (-math.inf, -1, unit))
            if plan.progress:
                plan.progress(f"{unit}: loss {search.now:.4f}, {100 * spent / plan.budget:.1f} % of the way")
        there = {block: part for block, part in plan.parts.items() if block not in search.removed}
        widths = {block: part.n - search.gone[block] * plan.group(block) for block, part in there.items()}
    return Found(widths, (*plan.removed, *order), tuple(steps))


class Variants:
    """The consumers of all parts with 1, 2, ... groups of units gone, by a criterion and a refit on dense inputs.

    Kept on the CPU in the model's dtype, n / align matrices an MLP; columns of dropped units are zero.
    """

    def __init__(self, plan):
        self.plan, self.made = plan, {}
        criterion, refit = CRITERIA[plan.criterion], REFITS["none" if plan.refit == "bias" else plan.refit]
        gradients = taylor(plan.decoder, plan.parts, plan.windows) if criterion.gradients else {}
        for block, channels in dense_channels(plan.decoder, plan.parts, plan.windows, plan.batch_size, plan.removed):
            channels.gradients = gradients.get(block)
            n, group = channels.n, plan.group(block)
            drops = [group * (k + 1) for k in range(-(-n // group) - 1)]
            if plan.refit == "ls" and plan.criterion == "osscar":
                _, snapshots = eliminate(channels, drops[-1] if drops else 0, every=group)
            else:
                order, snapshots = criterion.order(channels, n), []
                for k in drops:
                    keep = order[k:].sort().values
                    weight, _ = refit.fit(channels, keep)
                    columns = channels.part.columns(keep)
                    snapshots.append(torch.zeros_like(channels.W).index_copy_(1, columns, weight))
            self.made[block] = [s.to(channels.part.consumer.weight.dtype).cpu() for s in snapshots]
            if plan.progress:
                plan.progress(f"groups of {block}")

    def steps(self, block):
        """Return how many groups a part can lose."""
        return len(self.made[block])

    def weight(self, block, gone):
        """Return the consumer (d, N) of a part without its first `gone` groups, one at least."""
        return self.made[block][gone - 1]


class _Search:
    """The model as far as it is pruned: what is gone, its loss `now`, and the states entering every layer.

    A unit is a Block of a kind of KINDS, or of GROUPS for the next group of that block.
    """

    def __init__(self, plan, variants):
        self.plan, self.variants, self.decoder = plan, variants, plan.decoder
        self.gone = dict.fromkeys(plan.parts, 0)
        self.removed = set(plan.removed)
        self.windows = plan.windows if plan.scored is None else plan.scored
        self.batches = self.windows.split(plan.batch_size)
        self.streams = [self.decoder.embed(ids) for ids in self.batches]
        self.states = [[stream.h] + [None] * self.decoder.n_layers for stream in self.streams]
        self.held = contextlib.ExitStack()
        self._refresh(0)

    def close(self):
        self.held.close()

    def units(self):
        """Return all units that can go at first."""
        nouns = {kind: noun for noun, kind in GROUPS.items()}
        units = [Block(nouns[block.kind], block.layer) for block in self.plan.parts]
        if self.plan.blocks:
            units += [Block(kind, i) for kind in KINDS for i in range(self.decoder.n_layers)]
        return [unit for unit in units if self.cost(unit)]

    def cost(self, unit):
        """Return the parameters that leave with a unit now, 0 where there is none."""
        block = Block(GROUPS.get(unit.kind, unit.kind), unit.layer)
        if block in self.removed or block.kind not in self.decoder.kinds(block.layer):
            return 0
        group = self.plan.parts[block].cost * self.plan.group(block) if block in self.plan.parts else 0
        if unit != block:
            return group if self.gone[block] < self.variants.steps(block) else 0
        return self.decoder.block_parameters([block]) - self.gone.get(block, 0) * group

    def loss(self, unit):
        """Return the mean token loss without the unit as well."""
        if unit.kind in KINDS:
            return self._from(unit.layer, self.removed | {unit}, keep=False)
        with self._without_next(unit):
            return self._from(unit.layer, self.removed, keep=False)

    def take(self, unit):
        if unit.kind in KINDS:
            self.removed.add(unit)
        else:
            self.held.enter_context(self._without_next(unit))
            self.gone[Block(GROUPS[unit.kind], unit.layer)] += 1
        self._refresh(unit.layer)

    def _refresh(self, i):
        self.now = self._from(i, self.removed, keep=True)

    def _from(self, start, removed, keep):
        total = 0.0
        for ids, stream, states in zip(self.batches, self.streams, self.states, strict=True):
            h = states[start]
            for i in range(start, self.decoder.n_layers):
                h = self.decoder.run(i, self.decoder.kinds(i, removed), h, stream)
                if keep:
                    states[i + 1] = h
            total += self.decoder.token_losses(h, ids).double().sum().item()
        return total / self.windows[:, 1:].numel()

    def _without_next(self, unit):
        """Within this context the next group of a block is gone."""
        block = Block(GROUPS[unit.kind], unit.layer)
        weight = self.variants.weight(block, self.gone[block] + 1)
        return holding([(self.plan.parts[block].consumer.weight, weight)])
