"""Measure how far every run of layers moves the state, as PruneMe does: a table of all of them, a file for MergeKit.

The angular distance between the states entering layer i and layer i + n at the last token of each
window, over pi, for all n and i from one forward pass a window: distances.csv (columns n, i, distance)
and its heat map. With --layers-to-skip also slices.yaml, which makes MergeKit leave out the nearest n layers:

    python -m scripts.angular --model-path models/Mistral-7B-Instruct-v0.2 --layers-to-skip 8 --output-dir angular
    mergekit-yaml angular/slices.yaml models/Mistral-7B-short
"""

from pathlib import Path

from scripts import ending, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    flags.add_model_flags(parser)
    parser.add_argument("--output-dir", default="angular", help="folder of the table and the MergeKit file")
    parser.add_argument("--layers-to-skip", type=flags.positive, default=None, help="layers that slices.yaml drops")
    parser.add_argument("--cal-nsamples", type=flags.positive, default=128, help="documents to draw (not windows)")
    flags.add_text_flags(parser, dataset="alpaca", batch_size=8)
    args = parser.parse_args(argv)
    if not args.model_path:
        parser.error("--model-path is missing: give a hub id, a local folder or a .gguf file")
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)
    with parser.user_errors():  # everything that can fail fails before weights are read
        flags.check_folder(args.output_dir, "--output-dir")
        bare = flags.open_bare(args)
        dtype = stored_dtype(args, bare)
        text = flags.open_text(args, flags.open_tokenizer(args), bare)
        decoder = flags.open_decoder(args, text.windows)
    flags.print_opened(args, text, decoder)

    from lib.files import to_json, write_file
    from lib.importance import ranked
    from lib.similarity import similarities

    L = decoder.n_layers
    with parser.full_gpu("take a smaller --ppl-eval-batch-size"):
        found = similarities(decoder, (), text.windows, args.ppl_eval_batch_size).angular
    distances = {n: {i: found[i, i + n].item() for i in range(L - n + 1)} for n in range(1, L + 1)}
    with parser.user_errors():
        if not all(map(ranked, distances.values())):
            raise ValueError(f"--compute-dtype {args.compute_dtype}: states are not finite{flags.try_fp32(args)}")
        write_file(Path(args.output_dir) / "distances.csv", table(distances).encode())
        draw(Path(args.output_dir) / "distances.png", distances)
        result = {"distances": str(Path(args.output_dir) / "distances.csv"), "layers": L, "windows": len(text.windows)}
        for n in sorted({1, 2, 4, 8, 16, args.layers_to_skip or 1} & set(distances)):
            start = ranked(distances[n])[0]
            print(f"nearest       {n:3d} layers: {start}..{start + n - 1}, distance {distances[n][start]:.4f}")
        if n := args.layers_to_skip:
            start, path = ranked(distances[n])[0], Path(args.output_dir) / "slices.yaml"
            write_file(path, slices(args.model_path, L, start, n, dtype).encode())
            result |= {"slices": str(path), "start": start, "layers_to_skip": n, "distance": distances[n][start]}
    print(to_json(result))


def draw(path, distances):
    """Draw the table as a heat map; without matplotlib, say so."""
    from lib.report import pictures as report

    rows = [(n, i, d) for n, row in distances.items() for i, d in row.items()]
    try:
        report.save(report.draw(report.distance_map(rows)), path)
    except ImportError:
        print("note          no picture: pip install matplotlib, then python -m scripts.report on distances.csv")


def table(distances):
    """Return the table {n: {i: distance}} as CSV."""
    rows = [f"{n},{i},{d!r}" for n, row in distances.items() for i, d in row.items()]
    return "\n".join(["n,i,distance", *rows]) + "\n"


def slices(model_path, n_layers, start, n, dtype):
    """Return MergeKit's YAML that leaves layers [start, start + n) out: passthrough, one source a slice.

    dtype: of the result, as torch and the checkpoint's config.json name it.
    """
    import json

    path = Path(model_path).expanduser()
    name = json.dumps(str(path.absolute()) if path.exists() else str(model_path))
    lines = ["slices:"]
    for first, end in ((0, start), (start + n, n_layers)):
        if first < end:
            lines += ["  - sources:", f"      - model: {name}", f"        layer_range: [{first}, {end}]"]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}"]) + "\n"


def stored_dtype(args, bare):
    """Return the checkpoint's dtype; raise ValueError where --layers-to-skip cannot work."""
    from lib.decoder import find_layers

    L = len(find_layers(bare))
    if args.layers_to_skip and args.layers_to_skip >= L:
        raise ValueError(f"--layers-to-skip {args.layers_to_skip}: {args.model_path} has {L} layers; use 1..{L - 1}")
    if args.layers_to_skip and str(args.model_path).endswith(".gguf"):
        raise ValueError("--layers-to-skip: MergeKit reads no .gguf file; give the model's folder or hub id")
    return str(bare.config.dtype or "float32").removeprefix("torch.")


if __name__ == "__main__":
    ending.run(main)
