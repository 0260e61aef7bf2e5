"""vLLM's log-probabilities of tokens, and what it writes behind them: `python vllm_logprobs.py FOLDER IDS N OUT`.

For scripts.check_vllm, in an environment of its own. IDS: token ids as JSON; N: tokens to write; OUT gets JSON.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
from vllm import LLM, SamplingParams  # noqa: E402  it reads these when it is imported

folder, ids, n, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = LLM(folder, dtype="float32", enforce_eager=True, trust_remote_code=True, max_model_len=2 * (len(ids) + n))
wanted = SamplingParams(temperature=0, max_tokens=n, prompt_logprobs=0, ignore_eos=True)
(result,) = model.generate([{"prompt_token_ids": ids}], wanted)
logprobs = [given[i].logprob for given, i in zip(result.prompt_logprobs[1:], ids[1:], strict=True)]
with open(out, "w") as file:
    json.dump({"logprobs": logprobs, "tokens": list(result.outputs[0].token_ids)}, file)
