"""llama.cpp as a client of exported GGUF files, through the prebuilt wheel `xllamacpp`.

with Server("pruned/model.gguf", n_ctx=2048) as server:
    prefill, decode = server.speed(range(100, 612), n=64)
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import time

LOUD = 4  # verbosity at which llama.cpp prints the size of its caches


class Server:
    """A .gguf file served by llama.cpp while the context lasts.

    n_ctx: positions of the cache. exact: cache in fp32, and attention without the fused kernel, which adds
    up in fp16; else llama.cpp's defaults. Entering raises ValueError where llama.cpp does not load the file.
    """

    def __init__(self, path, n_ctx, exact=False, threads=1):
        self.path, self.n_ctx, self.exact, self.threads = str(path), n_ctx, exact, threads

    def __enter__(self):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = self.path
        params.n_ctx, params.n_parallel, params.n_threads_http = self.n_ctx, 1, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, LOUD
        if self.exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with _stderr() as log:
            try:
                self._server = xllamacpp.Server(params)
            except Exception as error:  # the binding raises plain ones
                lines = [line.split(" E ", 1)[1].strip() for line in log().splitlines() if " E " in line]
                raise ValueError(f"{self.path}: llama.cpp does not load it ({'; '.join(lines[:2]) or error})") from None
            end = time.monotonic() + 2  # a thread of llama.cpp's writes the log, and may be behind
            while "llama_kv_cache: size" not in log() and time.monotonic() < end:
                time.sleep(0.01)
            self.log = log()
        self._complete([0], 1)  # a server that is stopped before its loop has started never ends
        return self

    def __exit__(self, *exception):
        with _stderr() as log:
            del self._server
            end = time.monotonic() + 2
            while "main loop exited" not in log() and time.monotonic() < end:
                time.sleep(0.01)

    def logprobs(self, ids, vocab_size):
        """Return the log-probabilities (vocab_size,) of the token after `ids`, float32, on the CPU.

        What `ids` share with the last call comes from the cache.
        """
        import torch

        reply = self._complete(ids, 1, logprobs=vocab_size)
        tokens = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        result = torch.full((vocab_size,), float("-inf"))
        result[[token["id"] for token in tokens]] = torch.tensor([token["logprob"] for token in tokens])
        return result

    def speed(self, ids, n):
        """Return (prefill, decode) in tokens/s of an uncached prompt and n tokens behind it, by llama.cpp's clock."""
        times = self._complete(list(ids), n, cache_prompt=False)["timings"]
        assert (times["cache_n"], times["prompt_n"], times["predicted_n"]) == (0, len(ids), n), times
        return times["prompt_per_second"], times["predicted_per_second"]

    def tokenize(self, text):
        """Return the ids of a text, with what the vocabulary adds around it."""
        from urllib.request import Request, urlopen

        body = json.dumps({"content": text, "add_special": True}).encode()
        request = Request(f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with _stderr(), urlopen(request, timeout=60) as reply:
            return json.load(reply)["tokens"]

    @property
    def cache_line(self):
        """What llama.cpp says of its KV cache: "size = 180.00 MiB (8192 cells, 30 layers, ...), K (f16): ..."."""
        return re.search(r"llama_kv_cache: (size = .*)", self.log)[1]

    @property
    def cache_mib(self):
        """The size of the KV cache in MiB."""
        return float(re.search(r"size = +([\d.]+) MiB", self.cache_line)[1])

    def _complete(self, ids, n, **options):
        # every token is an "e": half a character would come without its probabilities, which are those before the bias
        always = {"temperature": 0.0, "ignore_eos": True, "logit_bias": [["e", 1000.0]]}
        with _stderr():
            reply = self._server.handle_completions({"prompt": ids, "max_tokens": n, **always, **options})
        reply = json.loads(reply) if isinstance(reply, str) else reply
        if "choices" not in reply:
            raise ValueError(f"{self.path}: llama.cpp answers {reply}")
        return reply


@contextlib.contextmanager
def _stderr():
    """Within this context stderr, of C code too, goes to a file; yields a function that returns its text so far."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            yield lambda: os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
        finally:
            os.dup2(before, 2)
            os.close(before)
