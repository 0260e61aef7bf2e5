"""Logits of mlx-lm, for scripts/check_decilm.py: runs in an environment of its own, which has mlx-lm and no torch.

MLX-PYTHON scripts/mlx_logits.py FOLDER "[5, 77, 200]" OUT.npy
"""

import json
import sys


def main(folder, ids, out):
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = load(folder, tokenizer_config={"trust_remote_code": True})
    ids, cache = json.loads(ids), make_prompt_cache(model)
    cut = len(ids) // 2
    logits = [model(mx.array([ids[:cut]]), cache=cache)] + [model(mx.array([[i]]), cache=cache) for i in ids[cut:]]
    with open(out, "wb") as file:
        np.save(file, np.concatenate([np.array(part[0].astype(mx.float32)) for part in logits]))
    print(f"{type(model).__module__}, {len(cache)} attentions with a cache")


if __name__ == "__main__":
    main(*sys.argv[1:])
