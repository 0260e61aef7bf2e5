"""The rows of the table that compares methods: each a change of lib.job.Settings, and what it is.

    settings = settings_for("sleb", Settings("models/Llama-2-7b-hf"), ratio=0.2)

A metric that judges once removes whole layers under its own name, as published, and blocks as NAME-block.
"""

from typing import NamedTuple

from lib.importance import METRICS

EVALUATIONS = 50  # of the whole text by evopress: what swaps take on SmolLM2-135M
LACO_WINDOWS = 4  # its authors compare on a few sentences; bisecting its threshold on all windows takes hours


class Method(NamedTuple):
    """about: what it is, in a few words; changes: of Settings; variant: of LaCo, which merges layers instead."""

    about: str
    changes: dict
    variant: str | None = None


def _searched(about, metric, block_type):
    return Method(about, {"metric": metric, "block_type": block_type})


def _chosen(about, **changes):
    return Method(about, {"metric": "ppl", "block_type": "mix", "rule": "per-parameter"} | changes)


def _once(metric, first=0, last=0, about=None):
    """Return the rows of a metric that judges once: {suffix of the name: Method}."""
    ends, about = {"protect_first": first, "protect_last": last}, about or METRICS[metric].about
    kinds = {"": ("layer", "layers"), "-block": ("mix", "blocks")}
    return {
        suffix: Method(f"{what}: {about}", {"metric": metric, "block_type": kind, **ends})
        for suffix, (kind, what) in kinds.items()
    }


_JUDGED = {
    "ppl-oneshot": _once("ppl-oneshot"),
    "ppl-plus": _once("ppl-oneshot", 4, 2, "ppl-oneshot, layers 0-3 and the last two kept (Shortened LLaMA, PPL+)"),
    "bi": _once("bi"),
    "rm": _once("rm"),
    "taylor": _once("taylor"),
    "taylor-plus": _once("taylor", 4, 2, "taylor, layers 0-3 and the last two kept (Shortened LLaMA, Taylor+)"),
    "magnitude": _once("magnitude"),
    "kl-oneshot": _once("kl-oneshot"),
    "last": _once("last"),
    "random": _once("random", about="a draw, a baseline; mean over several seeds"),
}
METHODS = {
    "blockpruner": _searched("the paper: greedy perplexity, all blocks", "ppl", "mix"),
    "mha": _searched("greedy perplexity, attention blocks only", "ppl", "mha"),
    "mlp": _searched("greedy perplexity, MLP blocks only", "ppl", "mlp"),
    "sleb": _searched("greedy perplexity, layers (SLEB)", "ppl", "layer"),
    "kl": _searched("greedy divergence from the dense model, all blocks (EvoPress's fitness)", "kl", "mix"),
    "cost-greedy": _chosen("greedy rise of the loss per parameter, all blocks"),
    "refined": _chosen("cost-greedy, then exchanges of removed and kept blocks while they help", refine="swaps"),
    "evopress": _chosen(
        f"EvoPress: evolution from random sets, divergence from the dense model, {EVALUATIONS} evaluations",
        rule="lowest",
        metric="kl",
        refine="evolve",
        evaluations=EVALUATIONS,
    ),
    "compensated": _chosen(
        "refined, a removed block multiplies the stream by what it made it grow", refine="swaps", passes="scale"
    ),
    **{name + suffix: method for name, rows in _JUDGED.items() for suffix, method in rows.items()},
    **{
        name: _searched(f"consecutive layers, {METRICS[name].about}", name, "layer")
        for name, metric in METRICS.items()
        if metric.kind == "run"
    },
    "laco": Method(f"layers merged by differences, judged on {LACO_WINDOWS} windows (LaCo)", {}, "paper"),
    "laco-last": Method(f"layers merged, topmost stays, {LACO_WINDOWS} windows (LaCo's notebook)", {}, "last"),
}
SEEDED = ("random", "random-block")


def settings_for(name, base, ratio, seed=None):
    """Return the Settings of a method at a ratio of the parameters; base: those that all rows share."""
    changes = METHODS[name].changes
    searched = METRICS[changes.get("metric", base.metric)].kind == "searched"
    search = base.search if searched else "cached"
    return base._replace(number=0, ratio=ratio, seed=base.seed if seed is None else seed, search=search, **changes)
