"""Training recovery: the weights an export kept are trained until its logits follow the dense model's again.

The loss is KL(teacher || student) on the logits, which needs text but no labels: any text the dense model reads well
will do. The loop is transformers' Trainer with that one loss: batches, accumulated gradients, mixed precision,
activation checkpointing, checkpoints that resume to the same weights, and `accelerate launch` (DDP, FSDP, DeepSpeed by
accelerate's own configuration) come with it, while accelerate alone would leave resuming and logging to us. Weights are
held in float32 and computed with in bf16 (autocast): the steps of a small learning rate vanish in bf16 weights.

    state = train(student, Teacher(teacher), windows, watched, Recipe(tokens=2_000_000), "work", every=50)
"""

import contextlib
import json
import math
import os
import shutil
import time
from bisect import bisect
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lib.blocks import Block, parse_block
from lib.decoder import find_layers
from lib.families import FAMILIES
from lib.memory import free_bytes
from lib.model import quiet

PARTS = ("full", "lora", "near-gaps", "last-layers")
LAST_LAYERS = 3
LORA = {"r": 8, "lora_alpha": 16}  # Shortened LLaMA's (2402.02834)
SLICE = 256  # rows of logits whose float32 copies are alive at a time


class Recipe(NamedTuple):
    """All that decides the trained weights besides model, teacher and text."""

    steps: int
    batch_size: int = 1  # windows per forward and process
    accumulate: int = 1  # forwards per step
    lr: float = 5e-4
    warmup: float = 0.05  # share of the steps
    temperature: float = 1.0
    top_k: int | None = None
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    train: str = "full"
    seed: int = 42
    bf16: bool = True
    activation_checkpointing: bool = False


class Diverged(ValueError):
    """The loss became nan or infinite; no checkpoint was written after that."""


# ---- the loss ------------------------------------------------------------------------------------------------


class _Divergence(torch.autograd.Function):
    """Sum over rows of KL(teacher || student), its gradient taken in the same pass over slices of the rows."""

    @staticmethod
    def forward(ctx, student, teacher, temperature):
        gradient, total = torch.empty_like(student), student.new_zeros((), dtype=torch.float32)
        for s, t, g in zip(student.split(SLICE), teacher.split(SLICE), gradient.split(SLICE), strict=True):
            log_q = (s.float() / temperature).log_softmax(-1)
            log_p = (t.float() / temperature).log_softmax(-1)
            p = log_p.exp()
            total += p.mul(log_p.sub_(log_q)).sum()
            g.copy_(log_q.exp_().sub_(p).div_(temperature))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def divergence(student, teacher, temperature=1.0):
    """Return the mean over rows of KL(teacher || student), in nats, times temperature^2 (Hinton et al. 1503.02531).

    student, teacher: logits (..., V); only the student's receive a gradient. Float32 copies and softmax of the logits
    never exist as a whole: at a vocabulary of 50,000 they would take gigabytes.
    """
    rows = student.flatten(0, -2)
    return _Divergence.apply(rows, teacher.flatten(0, -2), temperature) * (temperature**2 / len(rows))


def top(teacher, k, temperature=1.0):
    """Return (log-probabilities (..., k), token ids (..., k)) of the k likeliest tokens by logits (..., V)."""
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return log_p.topk(k, -1)


def top_divergence(student, log_p, ids, temperature=1.0):
    """Return `divergence` on k tokens a row, all others taken as one: a lower bound of it, exact for k = V - 1.

    student: logits (..., V); log_p, ids: (..., k), as `top` gives them for the same temperature.
    """
    log_q = (student.float() / temperature).log_softmax(-1).gather(-1, ids)
    kept = (log_p.exp() * (log_p - log_q)).sum(-1)
    p, q = (1 - log.exp().sum(-1) for log in (log_p, log_q))
    rest = p.clamp_min(0) * (p.clamp_min(1e-9).log() - q.clamp_min(1e-9).log())
    return (kept + rest).mean() * temperature**2


class Teacher:
    """The dense model's answer to a batch: its logits, their top k, or the top k read from a cache on disk."""

    def __init__(self, model=None, cache=None):
        self.model, self.cache = model, cache

    def __call__(self, ids, index, recipe):
        """Return (logits or None, (log_p, ids) or None, last hidden states or None) of windows ids (B, T)."""
        if self.cache is not None:
            values, tokens = (part[index.cpu()].to(ids.device) for part in self.cache)
            return None, (values.float(), tokens.long()), None
        with torch.no_grad():
            out = _forward(self.model, ids, recipe.hidden_weight > 0)
        hidden = out.hidden_states[-1] if recipe.hidden_weight else None
        if recipe.top_k:
            return None, top(out.logits, recipe.top_k, recipe.temperature), hidden
        return out.logits, None, hidden


def fill_cache(teacher, windows, recipe, folder, progress=iter):
    """Write the teacher's top k for windows (N, T) below `folder`, once, and return what Teacher takes as its cache.

    16-bit log-probabilities and 32-bit ids: 6 bytes for each of the k tokens of a position, read by memory mapping.
    """
    folder, (N, T) = Path(folder), windows.shape
    folder.mkdir(parents=True, exist_ok=True)
    done, shape = folder / "complete", (N, T, recipe.top_k)
    cache = [
        torch.from_file(str(folder / name), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        for name, dtype in (("log_p", torch.float16), ("ids", torch.int32))
    ]
    if not done.exists():
        device = next(teacher.parameters()).device
        for rows in progress(torch.arange(N).split(recipe.batch_size)):
            with torch.no_grad():
                found = top(_forward(teacher, windows[rows].to(device)).logits, recipe.top_k, recipe.temperature)
            for part, values in zip(cache, found, strict=True):
                part[rows] = values.to("cpu", part.dtype)
        done.touch()
    return cache


def _forward(model, ids, hidden=False):
    return model(input_ids=ids, use_cache=False, output_hidden_states=hidden)


# ---- what is trained -----------------------------------------------------------------------------------------


def set_trainable(model, part, seed=42):
    """Let gradients reach `part` of an export in memory, and nothing else; return the model, wrapped for "lora".

    full: every weight. lora: adapters of rank 8 beside every linear layer but the head (experts kept as one tensor have
    none). near-gaps: the kept blocks next to a removed one, norms included. last-layers: the last three layers, the
    final norm and the head, with tied embeddings the embedding as well (2411.15558). seed: of the adapters' first
    values.
    """
    model.requires_grad_(part == "full")
    if part == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ValueError("LoRA needs the peft package: pip install peft, or train another part") from None
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # adapters begin at random values
            return get_peft_model(model, LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM"))
    if part == "near-gaps":
        for module in _near_gaps(model):
            module.requires_grad_(True)
    if part == "last-layers":
        layers = find_layers(model)
        for module in (*layers[-LAST_LAYERS:], model.get_output_embeddings()):
            module.requires_grad_(True)
        after = [m for m in model.base_model.children() if "norm" in type(m).__name__.lower()]
        for module in after:
            module.requires_grad_(True)
    return model


def blocks_near_gaps(removed, kept):
    """Return the kept Blocks directly before and after a removed one, in the order of the model."""

    def place(block):
        return block.layer, block.kind  # "mha" comes before "mlp"

    kept, near = sorted(kept, key=place), set()
    for block in removed:
        k = bisect([place(b) for b in kept], place(block))
        near |= set(kept[max(k - 1, 0) : k + 1])
    return sorted(near, key=place)


def _near_gaps(model):
    """Yield the modules of the blocks next to a gap, from what the export's configuration says."""
    config, layers = model.config, find_layers(model)
    info, hf = config.pruning_info, hasattr(config, "source_blocks")
    sources = config.source_blocks if hf else info["source_blocks"]
    family = FAMILIES[type(layers[0]).__name__]
    places = {}  # Block of the dense model -> the layer, or step of a layer, that holds it here
    for layer, chain in zip(layers, sources, strict=True):
        names = chain.split(", ")
        steps = layer.steps.values() if hasattr(layer, "steps") else [layer]
        for step, blocks in zip(steps, names, strict=True):
            places |= {parse_block(name): step for name in blocks.removeprefix("+").split()}
    removed = [Block(kind, b.layer) for b in map(parse_block, info["removed"]) for kind in _kinds(b)]
    for block in blocks_near_gaps(removed, places):
        for name in getattr(family, block.kind) + getattr(family, f"{block.kind}_norms"):
            if (module := getattr(places[block], name, None)) is not None:
                yield module


def _kinds(block):
    return ("mha", "mlp") if block.kind == "layer" else (block.kind,)


def needed_bytes(student, teacher, recipe, seqlen):
    """Return the bytes that training takes: weights, gradients and Adam's two states in float32, the teacher, logits.

    student, teacher: models without weights (lib.model.skeleton); teacher None where its logits are cached. Activations
    are left out: it is a lower bound.
    """
    vocabulary = student.get_output_embeddings().weight.shape[0]
    total = sum(p.numel() for p in student.parameters())
    if recipe.train == "lora":  # two thin matrices beside each linear layer
        linear = [m for m in student.modules() if isinstance(m, torch.nn.Linear)]
        trained = sum(LORA["r"] * (m.in_features + m.out_features) for m in linear)
    else:
        trained = sum(p.numel() for p in set_trainable(student, recipe.train).parameters() if p.requires_grad)
    width = 2 if recipe.bf16 else 4
    dense = width * sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    return 4 * total + 12 * trained + dense + 3 * width * recipe.batch_size * seqlen * vocabulary


def check_room(needed, device):
    """Raise ValueError where `needed` bytes are not free on the device; nothing is known of shards on many devices."""
    if any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")):
        return
    free, _ = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"training needs at least {needed / 2**30:.1f} GiB for weights, gradients, optimizer states, the teacher "
            f"and logits, and {free / 2**30:.1f} GiB are free on {device}; train a smaller part (lora, near-gaps, "
            "last-layers), cache the teacher's logits, take smaller batches, or shard over several GPUs"
        )


# ---- the loop ------------------------------------------------------------------------------------------------


def train(
    student, teacher, windows, watched, recipe, work, *, every, save_every=None, report=lambda line: None, use_cpu=False
):
    """Train what `set_trainable` marks in the student; return its state dict, float32, on the CPU, and the history.

    windows: token ids (N, T), N = steps x the windows of a step, in the order they are trained on. watched: {name:
    windows (M, T)} whose loss is taken after every `every` steps. A checkpoint is written below `work` as often, or
    every `save_every` steps; a call with checkpoints there goes on from the last complete one. report: takes a dict a
    step, and one for each look at the watched text; the history is a list of these. Of several processes only the
    first has the state dict.
    Raises Diverged where a loss is no number; the checkpoints that are left are good.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    work = Path(work)

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = distillation_loss(model, teacher, inputs["input_ids"], inputs["index"], recipe)
            if not torch.isfinite(loss):  # the weights of the last step are no good, those before it were
                shutil.rmtree(work / f"checkpoint-{self.state.global_step}", ignore_errors=True)
                raise Diverged(f"the loss is {loss.item()} in step {self.state.global_step + 1}")
            return loss

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.before = next((line["seconds"] for line in reversed(state.log_history) if "seconds" in line), 0.0)
            self.first, self.start = state.global_step, time.perf_counter()

        def seconds(self):
            return self.before + time.perf_counter() - self.start

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" not in logs:
                return
            passed = time.perf_counter() - self.start
            speed = (state.global_step - self.first) * windows.shape[1] * len(windows) / recipe.steps / passed
            left = passed / (state.global_step - self.first) * (recipe.steps - state.global_step)
            state.log_history[-1]["seconds"] = self.seconds()
            if state.is_world_process_zero:
                report({**logs, "step": state.global_step, "tokens_per_second": speed, "left": left})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % every and state.global_step != recipe.steps:
                return
            line = {"step": state.global_step, "watched": watch(model, watched, recipe)}
            state.log_history.append({**line, "seconds": self.seconds()})
            if not all(map(math.isfinite, line["watched"].values())):
                raise Diverged(f"the loss on held-out text is no number after step {state.global_step}")
            if state.is_world_process_zero:
                report(line)

    arguments = TrainingArguments(
        str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * recipe.steps),
        adam_beta2=0.95,  # a few hundred steps: 0.999 would still be looking at the first ones at the end
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=recipe.bf16,
        activation_checkpointing=recipe.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.activation_checkpointing else None,
        use_cpu=use_cpu,
        ddp_find_unused_parameters=False,
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # the windows come in their order
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=save_every or every,
        save_total_limit=2,  # should the last one be cut short
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    rows = [{"input_ids": ids, "index": i} for i, ids in enumerate(windows)]
    trainer = Distiller(student, arguments, train_dataset=rows, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: divided among accumulated forwards
    with quiet():
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    history = [line for line in trainer.state.log_history if "loss" in line or "watched" in line]
    return {name: tensor.detach().cpu() for name, tensor in (state or {}).items()}, history


def distillation_loss(model, teacher, ids, index, recipe):
    """Return the loss of windows ids (B, T): the divergence, and what next tokens and hidden states add to it."""
    logits, best, hidden = teacher(ids, index, recipe)
    out = _forward(model, ids, recipe.hidden_weight > 0)
    if best is not None:
        loss = top_divergence(out.logits, *best, recipe.temperature)
    else:
        loss = divergence(out.logits, logits, recipe.temperature)
    if recipe.ce_weight:
        loss = loss + recipe.ce_weight * next_token_loss(out.logits, ids)
    if recipe.hidden_weight:  # each token relative to its own size: a few are enormous
        wanted, own = hidden.float(), out.hidden_states[-1].float()
        loss = loss + recipe.hidden_weight * ((own - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    return loss


def next_token_loss(logits, ids):
    """Return the mean next-token loss of windows ids (B, T), in nats."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def watch(model, watched, recipe):
    """Return {name: mean next-token loss} of the watched windows, computed as in training."""
    device, training, losses = next(model.parameters()).device, model.training, {}
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
        for name, windows in watched.items():
            total = 0.0
            for ids in windows.to(device).split(recipe.batch_size):
                total += next_token_loss(_forward(model, ids).logits, ids).item() * len(ids)
            losses[name] = total / len(windows)
    model.train(training)
    return losses


def last_checkpoint(work):
    """Return the folder of the last checkpoint that was written to its end, None where there is none."""
    for folder in sorted(Path(work).glob("checkpoint-*"), key=lambda f: int(f.name.split("-")[1]), reverse=True):
        with contextlib.suppress(OSError, ValueError):  # Trainer writes this file last
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
    return None


def merge(student, state, part):
    """Load a state dict that `train` returned into a fresh copy of the export; return it with adapters merged."""
    student = set_trainable(student, part)
    student.load_state_dict(state)
    return student.merge_and_unload() if part == "lora" else student


def draw(history, tokens_per_step, path):
    """Draw the training loss over tokens, and the perplexity of each watched text, to a picture file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [line for line in history if "loss" in line]
    left.plot([s["step"] * tokens_per_step for s in steps], [s["loss"] for s in steps], linewidth=0.8)
    left.set(xlabel="tokens", ylabel="KL to the dense model, nats", title="training loss")
    looks = [line for line in history if "watched" in line]
    for name in looks[0]["watched"] if looks else ():
        values = [math.exp(line["watched"][name]) for line in looks]
        right.plot([line["step"] * tokens_per_step for line in looks], values, marker="o", label=name)
    right.set(xlabel="tokens", ylabel="perplexity", title="held-out text", yscale="log")
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
