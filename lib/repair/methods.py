"""Repair what is left of a model when blocks are gone: one table of methods, one way to choose their strength.

A method is fitted on one part of a text and yields an Edit for each strength it can have; the one with the lowest loss
on another part is kept. Nothing here writes files: lib.export.write.export does, in the formats that the table names.

    fitted = repair(decoder, removed, "scale", fit, choose)
    export(path, fitted.edit, folder)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from lib.edits import Edit, replaced
from lib.evaluate import window_losses
from lib.repair.linear import linear
from lib.repair.reconstruct import reconstruct, streamline
from lib.repair.replaceme import replaceme
from lib.repair.scale import scale

EVERY = ("stock", "hf", "decilm", "gguf", "zeroed")  # formats


class Method(NamedTuple):
    """function(decoder, removed, fit, choose, batch_size, progress) yields (strength, Edit); fit, choose: windows.

    source: of the idea. formats: those that can hold the result.
    """

    function: Callable
    about: str
    source: str
    formats: tuple = EVERY


METHODS = {
    "scale": Method(scale, "one factor for each gap, in the weights of the blocks behind it", "arXiv 2507.18212"),
    "reconstruct": Method(reconstruct, "the kept blocks next to gaps, trained", "arXiv 2510.14444"),
    "replaceme": Method(replaceme, "a matrix for each gap, in the output projection before it", "arXiv 2505.02819"),
    "linear": Method(linear, "a matrix on the stream at each gap", "arXiv 2605.15491, 2505.24680", ("hf",)),
    "streamline": Method(streamline, "one trained layer for each run of removed layers", "arXiv 2403.19135"),
}


class Repaired(NamedTuple):
    """edit: the best one. losses: mean token loss on the choosing part, "none" for the unrepaired model."""

    edit: Edit
    losses: dict


def repair(decoder, removed, method, fit, choose, batch_size=8, progress=None, report=None):
    """Return the model without the blocks `removed` as Repaired by `method`, a key of METHODS.

    fit, choose: token windows (N, T), (M, T), none in both. progress(words) while fitting;
    report(strength, loss) for each strength. The model itself is left as it is. Raises ValueError for a family that
    the method does not know, and for losses that are not finite.
    """
    losses, best = {"none": mean_loss(decoder, choose, Edit(tuple(removed)), batch_size)}, None
    if not math.isfinite(losses["none"]):
        raise ValueError(f"the model without these blocks has a loss of {losses['none']}; try fp32, or remove fewer")
    for strength, edit in METHODS[method].function(decoder, removed, fit, choose, batch_size, progress):
        loss = mean_loss(decoder, choose, edit, batch_size)
        losses[" ".join(f"{key} {value}" for key, value in strength.items() if not isinstance(value, (list, dict)))] = (
            loss
        )
        if report:
            report(strength, loss)
        if math.isfinite(loss) and (best is None or loss < best[0]):
            best = loss, strength, edit
    if best is None:
        raise ValueError(f"{method}: no strength of it gives a finite loss; try fp32, or more text")
    _, strength, edit = best
    about = {"method": method, "source": METHODS[method].source, **strength, "losses": losses}
    return Repaired(edit._replace(about={**about, **edit.about}), losses)


def mean_loss(decoder, windows, edit, batch_size=8):
    """Return the mean next-token loss, in nats, of the edited model on windows (N, T)."""
    with replaced(decoder, edit):
        losses = window_losses(decoder, windows, batch_size, edit.removed)
    return losses.sum().item() / (len(windows) * (windows.shape[1] - 1))
