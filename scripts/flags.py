"""The command line that block_search.py and eval.py share: flags, one-line errors, early checks."""

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

DTYPES = ("bf16", "fp16", "fp32", "fp64")
COSTS = ("parameters", "kv", "flops", "latency")


STARTS = {".csv": b"n,i,distance", ".svg": (b"<?xml", b"<svg"), ".png": b"\x89PNG", ".pdf": b"%PDF"}  # of outputs


class Parser(argparse.ArgumentParser):
    """Ends on bad input with exit code 2 and one line, without the usage dump."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but names that no file can have, and homes that are not there, end with one line."""
        from lib.files import expand

        given = super().parse_args(args, namespace)
        for value in vars(given).values():
            for text in value if isinstance(value, list) else [value]:
                try:
                    expand(text if isinstance(text, str) else "")
                except ValueError as error:
                    self.error(error)
        return given

    def error(self, message):
        # an exception's text may have line ends of its own; the promise is one line
        line = f"{self.prog}: error: {' '.join(str(message).split())}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
        sys.exit(2)

    @contextlib.contextmanager
    def user_errors(self):
        """Within this context these are the user's to mend: a ValueError of the library, a file that the system
        refuses, a model that is larger than the GPU."""
        remedy = "free it, or take another --device; block_search.py searches larger models with --offload"
        try:
            with self.full_gpu(remedy, " while the model is loaded"):
                yield
        except (ValueError, OSError) as error:
            self.error(error)

    @contextlib.contextmanager
    def full_gpu(self, remedy, when=""):
        """Within this context a full GPU ends the program with one line, which tells the remedy."""
        try:
            yield
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; it may not be there
                raise
            self.error(f"the GPU's memory is full{when}; {remedy}")


class AllowPickled(argparse.Action):
    """A flag that lets lib.hub read pickled weights, in this process."""

    def __call__(self, parser, namespace, values, option_string=None):
        from lib import hub

        hub.PICKLED = True


def add_model_flags(parser):
    parser.add_argument("--model-path", help="hub id, local folder, or .gguf file (dequantised while loading)")
    add_compute_flags(parser)


def add_compute_flags(parser):
    parser.add_argument("--device", help="cpu, cuda or cuda:N; cuda when there is one, else cpu", default=None)
    parser.add_argument("--compute-dtype", choices=DTYPES, default="bf16", help="dtype of weights and activations")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python that the model brings along")
    parser.add_argument(
        "--allow-pickled",
        action=AllowPickled,
        nargs=0,
        help="read weights that are pickled (.bin) where there are no others",
    )


def add_removal_flags(parser, required=False):
    parser.add_argument("--ppl-search-file", help="order file to replay; not needed for the dense model", default=None)
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--del-block-num", type=count, default=None, help="removals to replay")
    add_ratio_flag(group, fraction, "fewest removals that take this share of the parameters, from 0 to 1")
    group.add_argument("--remove", metavar="BLOCKS", help="these blocks, without an order: mha5,mlp7,layer21-28")


def add_ratio_flag(group, kind, about):
    group.add_argument("--target-ratio", type=kind, default=None, metavar="R", help=about)
    # its name in the replaying scripts until now
    group.add_argument("--del-ratio", dest="target_ratio", type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_text_flags(parser, dataset, batch_size):
    """batch_size None: of a search, settled by `search_batch_size`."""
    parser.add_argument(
        "--cal-dataset",
        default=dataset,
        help="alpaca, wikitext2, ptb, c4, pydoc, a .txt/.jsonl/.json/.csv/.parquet file, owner/name:split:column of "
        "the hub, or several: alpaca*2+c4",
    )
    parser.add_argument("--cal-split", help="split of a named data set, instead of its usual one", default=None)
    parser.add_argument("--text-column", help="column that holds the text, where it is not called text", default=None)
    parser.add_argument("--chat-template", action="store_true", help="write chats as the model's own template does")
    parser.add_argument(
        "--bos",
        choices=("auto", "every-window", "text"),
        default="auto",
        help="BOS in front of every window, or of the whole text as the tokenizer does; auto: what the model needs",
    )
    parser.add_argument("--data-dir", help="folder with local copies: NAME-SPLIT.jsonl or NAME.jsonl ...", default=None)
    parser.add_argument("--ppl-eval-seqlen", type=positive, default=2048, help="window length in tokens")
    note = "" if batch_size else "; 8, but 1 with --search race, which decides after each batch"
    parser.add_argument("--ppl-eval-batch-size", type=positive, default=batch_size, help="windows per forward" + note)
    parser.add_argument("--seed", type=int, default=42, help="seed of the draw of documents")


def add_engine_flags(parser):
    parser.add_argument(
        "--cache-gb", type=size, default=None, help="memory for kept states, GiB; a share of what is free when absent"
    )
    parser.add_argument(
        "--race-confidence",
        type=size,
        default=3.0,  # docs/engines.md: how it was chosen
        help="race: standard errors behind the leader at which a candidate drops out",
    )


def add_audit_flag(parser):
    parser.add_argument(
        "--race-audit", action="store_true", help="race: score everything after all, and say where it chose otherwise"
    )


def add_rule_flags(parser):
    """The flags that say which blocks a search prefers, how much must go, and what becomes of the set in the end."""
    parser.add_argument(
        "--rule",
        choices=("lowest", "per-parameter"),
        default="lowest",
        help="which candidate goes; lowest: the paper's; per-parameter: the least rise of the loss per unit of --cost",
    )
    parser.add_argument(
        "--cost",
        choices=COSTS,
        default="parameters",
        help="what --rule per-parameter divides by and --target-ratio counts; kv: bytes of cache a token",
    )
    parser.add_argument(
        "--kl-top-k",
        type=count,
        default=512,
        help="--metric kl: the dense model's likeliest tokens compared one by one, all others as one; 0: exact",
    )
    parser.add_argument(
        "--cost-file", default=None, help="seconds of one attention and one MLP, from scripts.bench_model --cost-file"
    )
    parser.add_argument(
        "--budget",
        action="append",
        type=budget,
        metavar="COST=SHARE",
        default=[],
        help="a share that must go as well, such as kv=0.25; may be repeated",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        choices=("nothing", "scale"),
        default="nothing",
        help="what a removed block does to the stream, in the search and in what comes out; scale: multiply it by what "
        "the block made it grow, at no cost",
    )
    parser.add_argument(
        "--refine",
        choices=("none", "swaps", "evolve"),
        default="none",
        help="swaps: exchange removed for kept blocks while that helps; evolve: EvoPress's search, from random sets",
    )
    parser.add_argument(
        "--refine-evaluations",
        type=positive,
        default=None,
        metavar="N",
        help="passes of the whole text for --refine, at most; until it ends by itself when absent",
    )


def replayed(args, meta, removed, decoder):
    """Return the Edit of these removals: with the scales that the order was searched with folded into later weights."""
    from lib.edits import Edit
    from lib.orders import passes_in
    from lib.repair.scale import folded

    passes = passes_in(meta, args.ppl_search_file)
    return folded(decoder, removed, passes) if passes and removed else Edit(tuple(removed))


def refuse_scales(args, meta, removed):
    """Raise ValueError where the order was searched with scales, which a script that changes weights would drop."""
    from lib.orders import passes_in

    if removed and passes_in(meta, args.ppl_search_file):
        raise ValueError(
            f"--ppl-search-file {args.ppl_search_file}: was searched with --pass scale, and its blocks were chosen for "
            "these scales; export it with scripts.export, or search again without them"
        )


def budget(text):
    """argparse type: COST=SHARE, as a pair."""
    name, _, value = text.partition("=")
    if name not in COSTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not COST=SHARE with one of {', '.join(COSTS)}, such as kv=0.25")
    return name, share(value)


def read_cost_file(args):
    """Return the seconds of --cost-file, None where no cost needs them; raise ValueError where they do not fit."""
    from lib.costs import read_seconds
    from lib.hub import fingerprint
    from lib.measure import device_name

    wanted = "latency" in (args.cost, *(name for name, _ in args.budget))
    if not wanted and args.cost_file:
        raise ValueError(f"--cost-file {args.cost_file}: read for latency only; add --cost latency, or drop it")
    if wanted and not args.cost_file:
        raise ValueError("latency needs --cost-file: measure it with python -m scripts.bench_model MODEL --cost-file")
    if not wanted:
        return None
    with naming("--cost-file"):
        here = fingerprint(args.model_path), device_name(args.device), args.compute_dtype
        return read_seconds(args.cost_file, *here)


def try_fp32(args):
    """Return the advice for numbers that are not finite, where there is any."""
    return "; try --compute-dtype fp32" if args.compute_dtype in ("bf16", "fp16") else ""


def search_batch_size(args):
    """Return the windows per forward that were asked for, or what suits --search."""
    return args.ppl_eval_batch_size or (1 if args.search == "race" else 8)


def positive(text):
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def count(text):
    """argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def size(text):
    """argparse type: a number from 0 to 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1e9")
    return value


def limit(text):
    """argparse type: "200" -> (None, 200), "hellaswag=2000" -> ("hellaswag", 2000)."""
    name, _, number = text.rpartition("=")
    return name or None, positive(number)


def fraction(text):
    """argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1 (ten percent is 0.1)")
    return value


def share(text):
    """argparse type: a number above 0, to 1."""
    if fraction(text) == 0:
        raise argparse.ArgumentTypeError("0 removes nothing; use a share above 0, to 1")
    return fraction(text)


def check_tasks(args):
    """Raise ValueError where --tasks cannot be run with --task-data or from the hub."""
    from lib import tasks

    tasks.check_tasks(args.tasks, args.task_data, args.num_fewshot)
    try:
        tasks.check_rows(args.tasks, args.task_data)
    except ValueError as error:
        raise ValueError(f"--tasks {error} in --task-data") from error


def read_removals(args):
    """Return (order, meta) of --ppl-search-file; raise ValueError where it does not hold what is asked of it."""
    from lib.orders import read_order

    if getattr(args, "remove", None) is not None:
        if args.ppl_search_file:
            raise ValueError(f"--remove {args.remove}: names the blocks itself; leave out --ppl-search-file")
        return [], {"metric": "list"}
    if not args.ppl_search_file:
        for flag, value in (("--del-block-num", args.del_block_num), ("--target-ratio", args.target_ratio)):
            if value:
                raise ValueError(f"{flag} {value}: which blocks? give the order with --ppl-search-file")
        return [], {}
    order, meta = read_order(args.ppl_search_file)
    if args.del_block_num is None and args.target_ratio is None:
        raise ValueError(
            f"--ppl-search-file {args.ppl_search_file}: how many of its {len(order)} removals? give "
            "--del-block-num or --target-ratio (0 measures the dense model)"
        )
    if (args.del_block_num or 0) > len(order):
        raise ValueError(
            f"--del-block-num {args.del_block_num}: {args.ppl_search_file} holds {len(order)} "
            f"removals; use 0..{len(order)}"
        )
    return order, meta


def check_removals(args, order, meta, bare):
    """Return the removals to replay on the model `bare`, weights not needed; raise ValueError for another model's."""
    from lib.blocks import parse_blocks
    from lib.candidates import enough
    from lib.decoder import block_parameters, find_layers
    from lib.model import check_whole, parameter_count
    from lib.orders import check_order, fewest, first, passes_in

    layers = find_layers(bare)
    if not args.ppl_search_file and getattr(args, "remove", None) is None:
        return []
    with naming(getattr(args, "model_flag", "--model-path")):
        check_whole(bare.config, args.model_path)
    if getattr(args, "remove", None) is not None:
        with naming("--remove"):
            return parse_blocks(args.remove, len(layers))
    check_order(order, len(layers), args.ppl_search_file, meta)
    passes_in(meta, args.ppl_search_file)
    size, number = 2 if meta.get("block_type") == "layer" else 1, args.del_block_num or 0
    if args.target_ratio is not None:
        total = parameter_count(bare)
        number = fewest(order, meta, lambda some: enough(layers, some, args.target_ratio, total, size))
        if number is None:
            share = block_parameters(layers, order) / total
            raise ValueError(
                f"--target-ratio {args.target_ratio}: all {len(order)} removals of {args.ppl_search_file} take "
                f"{share:.4f} of the parameters; use 0..{share:.4f}, or search further"
            )
    if number % size:
        raise ValueError(
            f"--del-block-num {number}: {args.ppl_search_file} removes whole layers, which are two blocks each; use an "
            "even number"
        )
    with naming("--del-block-num"):
        return first(order, meta, number, args.ppl_search_file)


def warn_of_order(args, meta, removed):
    """Warn where the order was searched on a model of another name, or where part of one run of layers is removed."""
    searched = Path(str(meta.get("model", args.model_path))).name
    if searched != Path(args.model_path).name:
        print(f"warning: the order was searched on {searched}", file=sys.stderr)
    window = meta.get("window")
    if isinstance(window, int) and 0 < len(removed) < 2 * window:
        print(
            f"warning: {len(removed)} of {2 * window} blocks of a run of {window} layers that was chosen as a whole; "
            "for less, search with a smaller --del-block-num",
            file=sys.stderr,
        )


def check_folder(folder, flag):
    """Raise ValueError unless files can be written to `folder` once it is made; makes nothing."""
    from lib.files import expand

    path = expand(folder).absolute()
    if too_long := next((part for part in path.parts if len(part.encode()) > 255), None):
        raise ValueError(f"{flag} {too_long[:40]}...: too long, a file's name has 255 bytes at most")
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "not a folder" if not there.is_dir() else "not writable"
        raise ValueError(f"{flag} {folder}: {there} is {what}; give a folder that can be written")


def check_file(path, flag, suffix=".json", kind=None):
    """Raise ValueError unless a file can be written at `path`, empty or None for no file; makes nothing.

    kind: of lib.schema.KINDS, which may replace one of its own only.
    """
    from lib.files import expand, place, read_bytes
    from lib.schema import check_output

    if not path:
        return
    if expand(path).is_dir():
        raise ValueError(f"{flag} {path}: a folder; give a file name, e.g. result{suffix}")
    with naming(flag):
        found = place(path)
        if kind:
            check_output(path, kind)
        elif found.exists() and found.stat().st_size and not read_bytes(found).startswith(STARTS.get(suffix, b"")):
            raise ValueError(f"{path}: holds something else than a {suffix} file of this script; give another name")
    check_folder(found.parent, flag)


@contextlib.contextmanager
def naming(flag):
    """Within this context an error of the library, which names the thing, begins with its flag."""
    try:
        yield
    except ValueError as error:
        how = " with --trust-remote-code" if str(error).endswith("then allow it") else ""
        raise ValueError(f"{flag} {error}{how}") from error


def open_bare(args, held_out=False):
    """Return the model without weights; raise ValueError for what device, text flags and configuration already tell.

    held_out: the text is one to evaluate on, and the model may be one without whole layers.
    """
    from lib.data import check_dataset
    from lib.model import check_device, check_whole, default_device, skeleton

    args.device = args.device or default_device()
    with naming("--device"):
        check_device(args.device)
    with naming_text(args):
        check_dataset(args.cal_dataset, args.cal_split, args.data_dir, held_out=held_out)
    with naming("--model-path"):
        bare = skeleton(args.model_path, args.trust_remote_code)
        if not held_out:
            check_whole(bare.config, args.model_path)
    check_seqlen(bare.config, args.ppl_eval_seqlen)
    return bare


def open_tokenizer(args):
    """Return the tokenizer of --model-path."""
    from lib.model import load_tokenizer

    with naming("--model-path"):
        return load_tokenizer(args.model_path, args.trust_remote_code)


def open_text(args, tokenizer, bare, held_out=False, limit=None):
    """Return the Text of the text flags, its first `limit` windows; no --cal-nsamples takes all documents."""
    from tqdm import tqdm

    from lib.data import read_text
    from lib.families import needs_bos

    bar = tqdm(desc="tokenizing", unit="chars", unit_scale=True, leave=False, delay=5, file=sys.stderr)
    with naming_text(args), bar:
        text = read_text(
            args.cal_dataset,
            tokenizer,
            args.ppl_eval_seqlen,
            documents=args.cal_nsamples,
            split=args.cal_split,
            text_column=args.text_column,
            data_dir=args.data_dir,
            seed=args.seed,
            held_out=held_out,
            chat_template=args.chat_template,
            bos=args.bos,
            needs_bos=needs_bos(bare),
            limit=limit,
            progress=bar.update,
        )
    warn_of_text(args.cal_dataset, text.about)
    return text


def warn_of_text(dataset, about):
    """Warn of records that were left out or mended; about: what a Text says of itself."""
    for key, what in (
        ("records_without_text", "records hold no text and are left out"),
        ("texts_mended", "texts held half a surrogate pair, now U+FFFD"),
    ):
        if about.get(key):
            print(f"warning: {dataset}: {about[key]} {what}", file=sys.stderr)


@contextlib.contextmanager
def naming_text(args):
    """Within this context an error about --cal-dataset, which names the data set, begins with the flag."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{args.cal_dataset}: "):
            raise
        local = "; --data-dir names the folder of local copies" if args.data_dir is None else ""
        raise ValueError(f"--cal-dataset {error}{local}") from error


def open_decoder(args, *windows, offload=False):
    """Return the Decoder of --model-path, which knows all tokens of these windows (N, T)."""
    from lib.decoder import Decoder
    from lib.model import load_model

    with naming("--model-path"):
        model = load_model(args.model_path, args.compute_dtype, args.device, args.trust_remote_code, offload)
    for some in windows:
        check_tokens(some, model)
    return Decoder(model)


def print_opened(args, text, decoder, more="", title="calibration"):
    """Print what is computed with what: model, device, text."""
    from lib.model import dtype_note, parameter_count

    about = text.about
    print(f"model         {args.model_path}: {parameter_count(decoder.model):,} parameters, {decoder.n_layers} layers")
    print(f"compute       {args.device}, {args.compute_dtype}{more}")
    module = type(decoder.model).__module__
    if not module.startswith("transformers."):
        print(f"note          runs code that the model brings along: {module}")
    if note := dtype_note(args.device, args.compute_dtype):
        print(f"note          {note}")
    bos = ", each behind BOS" if about["bos"] == "every-window" else ""
    print(
        f"{title:13s} {about['documents']:,} documents of {about['source']} ({about['split'] or 'whole file'}), "
        f"{about['windows']} windows of {about['seqlen']} = {about['tokens']:,} tokens{bos}",
        flush=True,
    )


def check_seqlen(config, seqlen):
    """Raise ValueError where the model has fewer positions than a window has tokens; one token has no target."""
    from lib.families import positions

    if seqlen < 2:
        raise ValueError(f"--ppl-eval-seqlen {seqlen}: a window needs 2 tokens to have a next one")
    most = positions(config)
    if most and seqlen > most:
        raise ValueError(f"--ppl-eval-seqlen {seqlen}: the model has {most} positions; use 2..{most}")


def check_tokens(windows, model):
    """Raise ValueError where the tokenizer has tokens that the model does not know."""
    most = model.get_input_embeddings().weight.shape[0]
    if windows.max() >= most:
        raise ValueError(
            f"--model-path {model.config.name_or_path}: its tokenizer gives token {windows.max()}, the model knows "
            f"0..{most - 1}; put the model's own tokenizer beside the weights"
        )


def print_aligned(rows):
    """Print rows of strings in columns, the first to the left and the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))


def note(line):
    """Print a note where there is one."""
    if line:
        print(f"note          {line}")


def join_ranks(parser):
    """Meet the other processes where torchrun started this one: the first prints, the others only their errors."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from lib.ranks import join

        rank, _ = join()
        if rank:
            parser.prog = f"{parser.prog}: rank {rank}"
            sys.stdout = open(os.devnull, "w")


class progress:
    """A progress bar over windows with the best unit of the step; a plain writer of lines above it."""

    def __init__(self, total):
        from tqdm import tqdm

        every = 0.1 if sys.stderr.isatty() else 60  # seconds; a log file gets a line a minute
        other = getattr(sys.stdout, "name", None) == os.devnull  # another rank than the first
        self.bar = tqdm(
            disable=other,
            total=total,
            unit="window",
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
            mininterval=every,
        )
        self.scores = {}

    def advance(self, windows, unit=None, score=None):
        if unit is not None:
            self.scores[unit] = score
            best = min(self.scores, key=lambda b: (math.isnan(self.scores[b]), self.scores[b]))
            self.bar.set_postfix_str(f"best {best} {self.scores[best]:.4f}", refresh=False)
        self.bar.update(windows)

    def write(self, line):
        self.scores = {}
        with self.bar.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
