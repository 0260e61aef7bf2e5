"""Train what an export kept until it follows the dense model again, and write it as the same kind of export.

    python -m scripts.export --model-path M --ppl-search-file ORDER --target-ratio 0.2 --output-dir pruned
    python -m scripts.recover pruned --teacher M --tokens 300k --cal-dataset alpaca+wikitext2 --output-dir recovered

Checkpoints lie in OUTPUT_DIR.training until the end; the same command goes on from the last one after a kill. On
several GPUs: `accelerate launch -m scripts.recover ...` (scripts/recover_multi.sh).
"""

import argparse
import importlib.util
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from scripts import ending, flags

TOP_K = 64  # of a cached teacher, where none is asked for
LOOKS = 6  # at the held-out text, where no --eval-every is given
SECONDS = 10  # between lines of progress


def tokens(text):
    """argparse type: a whole number, k for thousands and M for millions: 2M."""
    factor = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        value = 0.0
    if not (1 <= value < 1e15 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 300k or 2M")
    return int(value)


def rate(text):
    """argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("export", help="folder that scripts.export wrote, format stock or hf")
    parser.add_argument("--teacher", required=True, help="the dense model: hub id, folder or .gguf file")
    parser.add_argument("--output-dir", required=True, help="folder of the recovered export; made when missing")
    parser.add_argument("--tokens", type=tokens, default="1M", help="tokens to train on, such as 300k or 2M")
    parser.add_argument(
        "--train",
        choices=("full", "lora", "near-gaps", "last-layers"),
        default="full",
        help="what is trained: every weight; adapters of rank 8, merged at the end; the blocks next to a removed one; "
        "the last three layers and the head",
    )
    parser.add_argument("--temperature", type=rate, default=1.0, help="of both models' logits in the loss")
    parser.add_argument("--top-k", type=flags.positive, default=None, help="compare so many logits a token, not all")
    parser.add_argument("--ce-weight", type=flags.size, default=0.0, help="weight of the next-token loss beside the KL")
    parser.add_argument(
        "--hidden-weight", type=flags.size, default=0.0, help="weight of the last states' relative error"
    )
    add_text_flags(parser)
    parser.add_argument(
        "--self-text", type=flags.positive, default=None, help="documents the dense model writes itself"
    )
    parser.add_argument(
        "--eval-every", type=flags.positive, default=None, help="steps between looks at the held-out part"
    )
    parser.add_argument(
        "--checkpoint-every", type=flags.positive, default=None, help="steps between checkpoints; as --eval-every"
    )
    parser.add_argument("--batch-size", type=flags.positive, default=1, help="windows per forward and process")
    parser.add_argument("--accumulate", type=flags.positive, default=1, help="forwards per step")
    parser.add_argument("--lr", type=rate, default=2e-4, help="highest learning rate; warmed up, then a cosine to 0")
    parser.add_argument("--warmup", type=flags.fraction, default=0.05, help="share of the steps")
    parser.add_argument("--seed", type=int, default=42, help="seed of the text's order, the model's own text, adapters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="cuda when there is one, else cpu")
    parser.add_argument("--compute-dtype", choices=("bf16", "fp32"), default="bf16", help="weights stay float32")
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory for a third more time")
    parser.add_argument(
        "--cache-teacher", action="store_true", help="write the teacher's top k to disk, then unload it"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python that the models bring along")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --output-dir")
    args = parser.parse_args(argv)
    if args.cal_dataset is None and args.self_text is None:
        parser.error("--cal-dataset is missing: train on which text? give one, or --self-text N")
    if args.cache_teacher and args.hidden_weight:
        parser.error("--hidden-weight: a cached teacher has logits only; drop it or --cache-teacher")
    if args.cache_teacher and args.top_k is None:
        args.top_k = TOP_K
    return parser, args


def add_text_flags(parser):
    """The flags that read_corpora and cut_text read, but for --seed."""
    parser.add_argument(
        "--cal-dataset", default=None, help="text: alpaca, wikitext2, ptb, c4, pydoc or files, several joined by +"
    )
    parser.add_argument("--text-column", help="column that holds the text, where it is not called text", default=None)
    parser.add_argument("--data-dir", help="folder with local copies: NAME-SPLIT.jsonl or NAME.jsonl ...", default=None)
    parser.add_argument(
        "--cal-nsamples",
        type=flags.count,
        default=None,
        help="documents drawn by --seed that the search was calibrated on: not trained on, not watched; as the export "
        "says where absent",
    )
    parser.add_argument("--held-out", type=flags.positive, default=8, help="windows of each text never trained on")
    parser.add_argument("--watch", nargs="*", default=[], help="more texts whose first windows are watched, as pydoc")
    parser.add_argument("--seqlen", type=flags.positive, default=512, help="window length in tokens")


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.user_errors():
        run(parser, args)


def run(parser, args):
    from accelerate import PartialState

    from lib import recover
    from lib.export.folder import check_target
    from lib.export.trained import check_trainable, write_trained
    from lib.files import to_json
    from lib.model import load_model, load_tokenizer, versions

    # everything that can be refused is, before a weight is read
    info = check_trainable(args.export)
    check_target(args.output_dir, args.export, args.overwrite)
    flags.check_folder(args.output_dir, "--output-dir")
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = choose_device(args)
    step_windows = args.batch_size * args.accumulate * processes
    recipe = recover.Recipe(
        steps=max(1, args.tokens // (step_windows * args.seqlen)),
        bf16=args.compute_dtype == "bf16",
        **{name: getattr(args, name) for name in recover.Recipe._fields if hasattr(args, name)},
    )
    tokenizer = load_tokenizer(args.export, args.trust_remote_code)
    check_models(args, recipe, tokenizer, device)
    corpora = read_corpora(args)
    work = Path(f"{Path(args.output_dir).expanduser().absolute()}.training")
    n_windows = recipe.steps * step_windows
    text = None if args.self_text else cut_text(args, info, corpora, tokenizer, n_windows)
    begin(work, settings(args, recipe, processes, text))

    with PartialState(cpu=device == "cpu").main_process_first():  # the others read what it has written
        teacher = load_model(args.teacher, args.compute_dtype, device, args.trust_remote_code)
        if args.self_text:
            corpora["self"] = own_text(args, teacher, tokenizer, work)
            text = cut_text(args, info, corpora, tokenizer, n_windows)
        dense = looked(work / "dense.json", teacher, text.watched, recipe)
        answers = recover.Teacher(teacher)
        if args.cache_teacher:
            answers = recover.Teacher(cache=recover.fill_cache(teacher, text.windows, recipe, work / "teacher"))
            teacher = None
        student = load_model(args.export, "fp32", device, args.trust_remote_code)
        pruned = looked(work / "pruned.json", student, text.watched, recipe)
    student = recover.set_trainable(student, args.train, args.seed)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)

    say = print if rank == 0 else lambda *words, **options: None
    for line in text.lines:
        say(line)
    total = text.windows.numel()
    say(f"training      {args.train}: {trained:,} of {sum(p.numel() for p in student.parameters()):,} parameters")
    say(f"              {recipe.steps} steps of {step_windows * args.seqlen:,} tokens, {total:,} in all", flush=True)
    if checkpoint := recover.last_checkpoint(work):
        say(f"resumed       from {Path(checkpoint).name}")
    every = args.eval_every or max(1, recipe.steps // LOOKS)
    progress = Progress(recipe.steps, total // recipe.steps, say)
    try:
        state, history = recover.train(
            student,
            answers,
            text.windows,
            text.watched,
            recipe,
            work,
            every=every,
            save_every=args.checkpoint_every,
            report=progress,
            use_cpu=device == "cpu",
        )
    except recover.Diverged as error:
        kept = recover.last_checkpoint(work)
        parser.error(
            f"--lr {args.lr}: {error}; take a smaller one; "
            + (f"the last good weights are kept in {kept}" if kept else f"no checkpoint was written yet: delete {work}")
        )
    if rank:
        return
    del student, answers
    teacher = None  # their memory is wanted for the copy that is written
    model = recover.merge(load_model(args.export, "fp32", "cpu", args.trust_remote_code), state, args.train)
    looks = [line for line in history if "watched" in line]
    facts = {
        "tokens": total,
        "seconds": round(looks[-1]["seconds"]),
        **recipe._asdict(),
        "processes": processes,
        "device": device,
        "seqlen": args.seqlen,
        "teacher": Path(args.teacher).name,
        "text": list(text.about),
        "text_about": text.about,
        "runs_shared_with_held_out": text.shared,
        "perplexity": {
            name: {"dense": dense[name], "pruned": pruned[name], "recovered": math.exp(looks[-1]["watched"][name])}
            for name in text.watched
        },
        "versions": versions(),
    }
    write_trained(args.export, model, args.output_dir, facts)
    picture = draw(history, total // recipe.steps, Path(args.output_dir))
    shutil.rmtree(work)
    rows = [("perplexity", "dense", "pruned", "recovered", "x dense")]
    for name, p in facts["perplexity"].items():
        row = [f"{p[key]:.2f}" for key in ("dense", "pruned", "recovered")]
        rows.append((name, *row, f"{p['recovered'] / p['dense']:.2f}"))
    flags.print_aligned(rows)
    say(
        f"export        {args.output_dir}, {facts['seconds']} s of training" + (f"; curve {picture}" if picture else "")
    )
    say(to_json({"export": args.output_dir, **facts}))


class Text(NamedTuple):
    """Training windows (N, T), of which the text has `pool` different ones; watched windows by name; what is said."""

    windows: object
    pool: int
    watched: dict
    about: dict
    shared: int
    lines: list


class Progress:
    """Prints a line for each look at the held-out text, and one now and then between."""

    def __init__(self, steps, step_tokens, say):
        self.steps, self.step_tokens, self.say, self.last = steps, step_tokens, say, 0.0
        self.losses = []

    def __call__(self, line):
        step = line["step"]
        if "watched" in line:
            ppl = "  ".join(f"{name} {math.exp(loss):.2f}" for name, loss in line["watched"].items())
            self.say(f"held out      {step}/{self.steps}  perplexity  {ppl}", flush=True)
            return
        self.losses.append(line["loss"])
        if time.monotonic() - self.last < SECONDS and step < self.steps:
            return
        self.last, losses, self.losses = time.monotonic(), self.losses, []
        self.say(
            f"step          {step}/{self.steps}  {step * self.step_tokens:,} tokens  loss "
            f"{sum(losses) / len(losses):.4f}  {line['tokens_per_second']:.0f} tokens/s  "
            f"{line['left'] / 60:.1f} min left",
            flush=True,
        )


def choose_device(args):
    """Return the device of this process: what --device says, with several processes the GPU of its own."""
    from lib.model import check_device, default_device

    if (args.device or default_device()) == "cpu":
        return "cpu"
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with flags.naming("--device"):
        check_device(device)
    return device


def check_models(args, recipe, tokenizer, device):
    """Raise ValueError for a teacher of another vocabulary, too long windows, or too little memory."""
    from lib import recover
    from lib.model import load_tokenizer, skeleton

    if args.train == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError("--train lora: needs the peft package; pip install peft, or train another part")
    student, teacher = (skeleton(path, args.trust_remote_code) for path in (args.export, args.teacher))
    check_seqlen(student.config, args.seqlen)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--teacher {args.teacher}: its vocabulary has {sizes[1]:,} entries, the export's {sizes[0]:,}; give the "
            "model that the export was made of"
        )
    if load_tokenizer(args.teacher, args.trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"--teacher {args.teacher}: its tokenizer is not the export's; give the model that the export was made of"
        )
    if args.top_k and args.top_k >= sizes[0]:
        raise ValueError(f"--top-k {args.top_k}: the vocabulary has {sizes[0]:,} entries; use less, or leave it out")
    dense = None if args.cache_teacher else teacher
    recover.check_room(recover.needed_bytes(student, dense, recipe, args.seqlen), device)


def check_seqlen(config, seqlen):
    """Raise ValueError where the model has fewer positions than a window has tokens."""
    most = getattr(config, "max_position_embeddings", None) or seqlen
    if not 2 <= seqlen <= most:
        raise ValueError(f"--seqlen {seqlen}: use 2..{most}, the model's positions")


def read_corpora(args):
    """Return {name: Corpus} of --cal-dataset, several joined by +."""
    from lib.data import load_documents
    from lib.records import short_name

    given = args.cal_dataset
    names = [] if given is None else [given] if Path(given).is_file() else given.split("+")
    corpora = {short_name(name): load_documents(name, None, args.text_column, args.data_dir) for name in names}
    if len(corpora) < len(names):
        raise ValueError(f"--cal-dataset {given}: a text occurs twice, or two files have the same name")
    return corpora


def own_text(args, teacher, tokenizer, work):
    """Return the Corpus that the dense model has written."""
    from lib.data import Corpus
    from lib.recover_text import write_own_text

    documents = write_own_text(
        teacher, tokenizer, args.self_text, args.seqlen, seed=args.seed, path=work / "self_text.json"
    )
    return Corpus(documents, None, "written by the teacher")


def cut_text(args, info, corpora, tokenizer, n_windows):
    """Return the Text that is trained on and watched."""
    from lib.data import load_documents, sample_documents
    from lib.records import short_name
    from lib.recover_text import first_windows, pack, shared_runs, split

    search, parts = info.get("search", {}), []
    for name, corpus in corpora.items():
        drawn = args.cal_nsamples
        if drawn is None:
            drawn = search.get("documents") if search.get("dataset") == name else 0
        left_out = []
        if drawn and name != "self" and drawn < len(corpus.documents):
            left_out = sample_documents(corpus.documents, drawn, search.get("seed", args.seed))
        parts.append(split(name, corpus.documents, tokenizer, args.seqlen, args.held_out, left_out))
    watched = {part.name: part.watched for part in parts}
    for name in args.watch:
        other = load_documents(name, None, args.text_column, args.data_dir, held_out=True)
        key = short_name(name)
        if key in watched:
            raise ValueError(f"--watch {name}: a part of it is watched anyway")
        watched[key] = first_windows(other.documents, tokenizer, args.seqlen, args.held_out)
    windows, pool = pack(parts, tokenizer, args.seqlen, args.seed, n_windows)
    shared = {name: shared_runs(windows, some) for name, some in watched.items()}
    lines, about = [], {}
    for part in parts:
        about[part.name] = {
            "source": corpora[part.name].source,
            "documents": len(part.documents),
            "held_out_documents": part.held,
            "held_out_windows": len(part.watched),
        }
        lines.append(
            f"text          {part.name}: {len(part.documents):,} documents to train on, {part.held:,} others held out "
            f"({len(part.watched)} windows)"
        )
    lines.append(
        f"              {len(windows):,} windows of {args.seqlen} from {pool:,}; runs of 64 tokens that are in the "
        f"held-out text too: {', '.join(f'{k} {v}' for k, v in shared.items())}"
    )
    return Text(windows, pool, watched, about, shared, lines)


def settings(args, recipe, processes, text):
    """Return what decides the result, as the training folder keeps it; text is None where it is not written yet."""
    import hashlib

    kept = ("export", "teacher", "cal_dataset", "text_column", "cal_nsamples", "self_text", "held_out", "watch")
    given = {name: getattr(args, name) for name in (*kept, "seqlen", "cache_teacher", "eval_every")}
    digest = hashlib.sha256(text.windows.numpy().tobytes()).hexdigest() if text else None
    return {**given, **recipe._asdict(), "processes": processes, "text_sha256": digest}


def begin(work, given):
    """Make the training folder, or raise ValueError where it holds a training with other settings."""
    import json

    from lib.files import write_json

    path = work / "settings.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if there is None:
        write_json(path, given)
        return
    for name, value in given.items():
        if there.get(name) != value:
            raise ValueError(
                f"--output-dir: {work} holds a training that was begun with {name.replace('_', ' ')} "
                f"{there.get(name)}, not {value}; give the same again to go on, or delete that folder"
            )


def looked(path, model, watched, recipe):
    """Return {name: perplexity} of the watched windows, computed once and kept in `path`."""
    import json

    from lib import recover
    from lib.files import write_json

    if not path.exists():
        losses = recover.watch(model, watched, recipe)
        write_json(path, {name: math.exp(min(loss, 700)) for name, loss in losses.items()})
    return json.loads(path.read_text(encoding="utf-8"))


def draw(history, step_tokens, folder):
    """Return the picture drawn beside `folder`, None where matplotlib is not installed."""
    from lib import recover

    path = folder.expanduser().absolute().with_name(f"{folder.name}.loss.png")
    try:
        recover.draw(history, step_tokens, path)
    except ImportError:
        print("note          no curve: matplotlib is not installed", file=sys.stderr)
        return None
    return path


if __name__ == "__main__":
    ending.run(main)
