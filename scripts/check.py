"""Hold files of this project against their checksums and what they must contain: orders, results, cells, compare.json.

Prints a line for each; exit 1 where one is damaged. Needs neither torch nor the model.

    python -m scripts.check ppls/*.json results/llama2_7b/compare.json results/llama2_7b/cells/*.json
"""

import sys

from scripts import ending, flags


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="order, result, cell or compare.json")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    from lib.files import to_json

    counts = {"files": len(args.files), "whole": 0, "without_checksum": 0, "damaged": 0}
    for path in args.files:
        try:
            kind, sealed, what = check(path)
        except ValueError as error:
            counts["damaged"] += 1
            print(f"damaged   {' '.join(str(error).split())}")
            continue
        counts["whole" if sealed else "without_checksum"] += 1
        print(f"{'whole' if sealed else 'plausible':9s} {path}: {kind}, {what}")
    print(to_json(counts))
    if counts["damaged"]:
        sys.exit(1)


def check(path):
    """Return (kind, whether a checksum says that it is whole, what it holds) of a file; raise ValueError."""
    from lib.files import read_json
    from lib.orders import read_order
    from lib.schema import kind_of, read

    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    kind = kind_of(raw)
    if kind == "order":
        order, _ = read_order(path)
        return kind, "checksum" in raw.get("meta", {}), f"{len(order)} removals"
    content = read(path)
    what = {"result": "tasks", "cell": "measured", "compare": "rows"}[kind]
    return kind, "checksum" in raw, f"{len(content[what])} {what}"


if __name__ == "__main__":
    ending.run(main)
