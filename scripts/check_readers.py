"""What another transformers makes of exports: logits of a toy of every family, against those of this one.

Toys of tests/families.py with rotations that no class has by default are exported without one layer ("stock") and
without an MLP ("zeroed"), read here and by the other Python, and compared. bash scripts/check_readers.sh makes that
Python's environment.

    python -m scripts.check_readers --python .venv/transformers4/bin/python
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts import ending, flags

IDS = [7 * i % 90 + 1 for i in range(24)]


def parse_args(argv=None):
    parser = flags.Parser(__doc__.split("\n\n")[0])
    parser.add_argument("--python", required=True, help="python of the environment with the other transformers")
    parser.add_argument("--families", nargs="*", help="names in tests/families.py; all when absent")
    parser.add_argument("--tolerance", type=flags.size, default=1e-4, help="largest difference of a logit")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    from lib.blocks import Block
    from lib.export.write import export
    from lib.files import to_json

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from families import TOYS, toy

    removed = {"stock": [Block("mha", 1), Block("mlp", 1)], "zeroed": [Block("mlp", 1)]}
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for name in args.families or TOYS:
            source = Path(temporary) / name / "source"
            model = toy(name, **other_rotation(toy(name).config))
            model.bfloat16().float().save_pretrained(source)  # values as checkpoints have them
            for format, blocks in removed.items():
                folder = str(source.with_name(format))
                try:
                    export(source, blocks, folder, format)
                except ValueError as error:
                    rows.append((name, format, f"not offered: {error}"))
                    continue
                (Path(folder) / "ids.json").write_text(json.dumps(IDS))
                folders[folder] = name, format
        answers = [read(python, folders, temporary) for python in (sys.executable, args.python)]
        for folder, (name, format) in folders.items():
            here, there = (answer[folder] for answer in answers)
            if isinstance(here, str) or isinstance(there, str):
                rows.append((name, format, f"refused: {here if isinstance(here, str) else there}"))
                continue
            difference = (here - there).abs().max().item()
            worst = max(worst, difference) if difference == difference else float("inf")
            rows.append((name, format, f"ran: {difference:.1e}"))
    for row in sorted(rows):
        print("| {} | {} | {} |".format(*row))
    ran = sum(row[2].startswith("ran") for row in rows)
    print(to_json({"ran": ran, "refused": len(rows) - ran, "largest": worst}))
    if not worst <= args.tolerance:
        parser.exit(1, f"more than {args.tolerance}\n")


def other_rotation(config):
    """Return arguments of a configuration class that turn a toy's rotations faster than any default."""
    rope = json.loads(json.dumps(getattr(config, "rope_parameters", None)))
    if not rope:
        return {}
    for values in [rope] if "rope_theta" in rope else rope.values():
        values["rope_theta"] = 777.0
    return {"rope_parameters": rope}


def read(python, folders, temporary):
    """Return {folder: logits, or why there are none} by scripts/reader_logits.py under another Python."""
    import torch

    out = Path(temporary) / "logits.pt"
    here = Path(__file__).with_name("reader_logits.py")
    quiet = {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, here, out, *folders], check=True, env=os.environ | quiet, stderr=subprocess.DEVNULL)
    return torch.load(out)


if __name__ == "__main__":
    ending.run(main)
