"""Zero-shot tasks: the paper's five accuracies and others, measured by lm-evaluation-harness.

The harness's own definitions download their rows from the hub. The YAML files in lm_eval/ ask the
same questions of JSON-lines files in one local folder, so that a machine without network gets the
same numbers. That folder must never hold Python: a package there would shadow the harness.
"""

import contextlib
import copy
import functools
import glob
import hashlib
import logging
import math
import sys
from pathlib import Path

from lib import task_rows
from lib.files import expand, read_bytes
from lib.hub import hub_error

TITLES = {  # the columns of the paper's tables
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
}
TASKS = tuple(TITLES)
LOCAL = (*TASKS, "boolq", "openbookqa", "mmlu", "lambada_openai", "triviaqa")  # have a file in lm_eval/
SCORES = ("acc_norm", "acc", "exact_match")  # fractions; the first that a task reports is its score
TASK_FILES = Path(__file__).resolve().parent.parent / "lm_eval"
FEWSHOT_SEED = 1234  # the harness's default


def zero_shot(model, tokenizer, tasks, *, batch_size=1, num_fewshot=0, limit=None, task_data=None) -> dict[str, dict]:
    """Each task's accuracy, {task: {score, metric, acc, acc_norm, stderr, items}}, as fractions.

    The score is acc_norm where the task has it, else acc (the paper's convention), else exact_match; a task that
    reports a perplexity of its answers has `perplexity` too. `stderr` is the score's (None for a single item).
    `limit` is None (all rows), the number of first rows of every task, or {task: rows}. `task_data` is the folder of
    local_task; without it the rows come from the hub or its cache. Raises ValueError where check_tasks would.

    Log-probabilities are float32 whatever the model's dtype: summed in bf16 they are 0.5 apart near
    100 and candidates tie. The harness holds logits for whole sequences, batch_size x longest
    request x vocabulary, in the model's dtype and once more in float32.
    """
    check_tasks(tasks, task_data, num_fewshot)
    limits = check_limits(tasks, limit)
    check_tokenizer(tokenizer)
    from lm_eval import evaluate

    lm = harness_model(model, tokenizer, batch_size)
    manager = task_manager(hub=task_data is None)
    scores = {}
    for rows in dict.fromkeys(limits.values()):
        names = [name for name in tasks if limits[name] == rows]
        try:
            loaded = manager.load([name if task_data is None else local_task(name, task_data) for name in names])
        except Exception as error:  # of many libraries
            if task_data is None:
                raise
            raise ValueError(f"task data {str(task_data)!r}: {', '.join(names)} cannot be read ({error})") from error
        for task in loaded["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                check_tokenizer(tokenizer, writes=True)
            if task.get_config("num_fewshot") != 0:  # the harness's rule: a task's own 0 stands
                task.set_config("num_fewshot", num_fewshot)
            task.set_fewshot_seed(FEWSHOT_SEED)
        # evaluate, not simple_evaluate: that one returns None on torchrun's other ranks, reseeds
        # the global generators and spends seconds on a report of the machine.
        # bootstrap_iters=2: 0 would drop the closed-form error of a mean too, 1 divides by 0 for a perplexity.
        with contextlib.redirect_stdout(sys.stderr):  # it tells of its bootstrap there
            output = evaluate(lm, loaded, limit=rows, bootstrap_iters=2, log_samples=False)
        scores.update((name, read_score(output["results"][name])) for name in names)
    return {name: scores[name] for name in tasks}


def local_task(name: str, task_data: str | Path) -> dict:
    """The harness's configuration of one of LOCAL, reading <task_data>/<name>.jsonl.

    Raises ValueError for a task without a local variant, a missing folder or file, or a row that is wrong.
    """
    import yaml

    if name not in LOCAL:
        raise ValueError(
            f"task {name!r} has no variant for local task data: use {', '.join(LOCAL)}, "
            "or leave the task data out to run the harness's own task"
        )
    folder = expand(task_data).resolve()
    if not folder.is_dir():
        raise ValueError(
            f"task data {str(task_data)!r} is not a folder: give one that holds "
            + ", ".join(f"{task}.jsonl" for task in LOCAL)
        )
    config = yaml.safe_load((TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    files = config["dataset_kwargs"]["data_files"]  # {split: file}, a single split
    for split, file in files.items():
        if not (folder / file).exists():
            raise ValueError(
                f"task data {str(task_data)!r} holds no {file}: task {name} reads it; add the file or drop the task"
            )
        task_rows.check_rows(name, folder / file)
        files[split] = glob.escape(str(folder / file))  # datasets expands patterns
    return config


def check_tasks(names, task_data=None, num_fewshot=0) -> None:
    """Raise ValueError unless zero_shot can run these tasks: meant for before the weights load.

    With `task_data` the tasks are among LOCAL and their files exist; without it the harness knows
    them (a scan of its task files, about ten seconds) and they report one of SCORES.
    """
    if not names:
        raise ValueError(f"no task given: use some of {', '.join(TASKS)}")
    try:
        # The submodule: without the package, lm_eval/ here would import as a namespace.
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ValueError(f"zero-shot tasks need lm_eval: pip install lm_eval==0.4.13 ({error})") from error
    if task_data is None:
        for name in names:
            check_harness_task(name)
        return
    for name in names:
        local_task(name, task_data)
    if num_fewshot != 0:
        # Examples from the evaluated rows themselves would be another benchmark.
        raise ValueError(
            f"{num_fewshot} few-shot examples with local task data: the folder holds evaluation "
            "rows only, the harness draws examples from the training split; use 0, "
            "or leave the task data out"
        )


def check_rows(names, task_data=None) -> None:
    """Raise ValueError where a task's rows are neither local, nor on a hub in reach, nor cached; it takes seconds."""
    if task_data is not None or not hub_error():
        return
    for name in names:
        try:
            task_manager(hub=True).load([name])
        except ConnectionError:
            raise ValueError(
                f"{name}: its rows are not cached and the hub cannot be reached ({hub_error()}); fetch them where "
                "there is a network, or give a folder with the tasks' .jsonl files"
            ) from None


def check_harness_task(name: str) -> None:
    """Raise ValueError unless the harness has a task or group `name` that reports one of SCORES."""
    entry = task_manager(hub=True).task_index.get(name)
    if entry is None:
        raise ValueError(
            f"task {name!r} is unknown to lm_eval: use some of {', '.join(TASKS)}, or any name of `lm-eval ls tasks`"
        )
    if entry.cfg is None:
        raise ValueError(f"{name!r} is lm_eval's tag for several tasks, name those: " + ", ".join(sorted(entry.tags)))
    metrics = entry.cfg.get("metric_list") or entry.cfg.get("aggregate_metric_list") or []
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    names = {metric["metric"] for metric in metrics}
    if not names & set(SCORES):
        raise ValueError(
            f"task {name!r} reports {', '.join(sorted(names)) or 'no metric of its own'}: "
            f"only tasks with {', '.join(SCORES)} can be averaged"
        )


def check_limits(tasks, limit) -> dict[str, int | None]:
    """{task: number of rows or None} of a `limit` as zero_shot takes it, else ValueError."""
    limits = limit if isinstance(limit, dict) else dict.fromkeys(tasks, limit)
    for name, rows in limits.items():
        if name not in tasks:
            raise ValueError(f"limit for {name!r}: not among the tasks {', '.join(tasks)}")
        # The harness would take a number below 1 as a fraction, and fail on 0 after loading.
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            raise ValueError(f"limit {rows!r} for {name}: use a whole number from 1, or None")
    return {name: limits.get(name) for name in tasks}


def rows_key(task, task_data=None):
    """Return what tells a task's rows from others: a part of its file's SHA-256, or "hub"."""
    if task_data is None:
        return "hub"
    return hashlib.sha256(read_bytes(expand(task_data) / f"{task}.jsonl")).hexdigest()[:12]


def check_tokenizer(tokenizer, writes=False):
    """Raise ValueError for a tokenizer without the special tokens that tasks need, `writes` where they generate."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None and (writes or bos is None):
        what = "EOS token, with which answers end" if writes else "BOS and no EOS token, one of which opens a text"
        raise ValueError(f"the tokenizer has no {what}: zero-shot tasks need it; name one in tokenizer_config.json")


def harness_model(model, tokenizer, batch_size):
    """The harness's wrapper around a loaded model, float32 log-probabilities, generation without a cache."""
    from lm_eval.models.huggingface import HFLM

    known = model.get_input_embeddings().weight.shape[0]

    def check_ids(ids):
        if (most := ids.max().item()) >= known:
            raise ValueError(
                f"the tokenizer gives token {most} for a task, the model knows 0..{known - 1}; put the model's own "
                "tokenizer beside the weights"
            )

    def check_logits(ids, logits):
        if logits.isnan().any():
            raise ValueError("the model's log-probabilities are NaN: no score")
        return logits

    class Checked(HFLM):
        """Gives no answer from NaN, where every choice would be as good, nor for tokens that the model lacks.

        Generates without a cache: it would count positions by the first layer, whose attention may be masked.
        """

        def loglikelihood(self, requests, **kwargs):
            answers = super().loglikelihood(requests, **kwargs)
            if wrong := sum(math.isnan(value) for value, _ in answers):
                raise ValueError(
                    f"the model's log-probabilities are NaN for {wrong} of {len(answers)} requests: no score"
                )
            return answers

        def _model_call(self, inps, *args, **kwargs):
            check_ids(inps)
            return super()._model_call(inps, *args, **kwargs)

        def _model_generate(self, context, **kwargs):
            check_ids(context)
            generate, ours = self.model.generate, {"use_cache": False, "logits_processor": [check_logits]}
            self.model.generate = lambda **given: generate(**{**given, **ours})
            try:
                return super()._model_generate(context, **kwargs)
            finally:
                del self.model.generate  # the class's own again

    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns twice that the model is an object, not a name
    try:
        # A copy of the tokenizer: the harness gives it a pad token.
        return Checked(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
    finally:
        log.setLevel(level)  # truncated requests are warned about under the same name


@functools.cache
def task_manager(hub: bool):
    """The harness's index of tasks: its own, or empty (local tasks are passed as dicts)."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=hub)


def read_score(result: dict) -> dict:
    """zero_shot's entry from the harness's, whose keys are "metric,filter"."""
    values = {key.split(",")[0]: value for key, value in result.items()}
    metric = next(name for name in SCORES if name in values)
    stderr = values.get(f"{metric}_stderr")
    score = {
        "score": values[metric],
        "metric": metric,
        "acc": values.get("acc"),
        "acc_norm": values.get("acc_norm"),
        "stderr": stderr if isinstance(stderr, float) else None,  # "N/A" for a single item
        "items": result["sample_len"],
    }
    return score | ({"perplexity": values["perplexity"]} if "perplexity" in values else {})
