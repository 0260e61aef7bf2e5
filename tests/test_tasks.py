"""lib/tasks.py and lm_eval/*.yaml against the harness's own tasks and a plain reimplementation."""

import json
import math
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import tasks

pytest.importorskip("lm_eval.tasks")

ROOT = tasks.TASK_FILES.parent
SPLITS = {"arc_easy": "test", "arc_challenge": "test"}  # the others: validation
OWN_FILES = {  # below the harness's tasks folder
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "mmlu": "mmlu/default/mmlu_high_school_us_history.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "triviaqa": "triviaqa/default.yaml",
}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Keep the Arrow copies of the JSON files out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network access: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def read_rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(folder, rows: dict[str, list[dict]]):
    folder.mkdir()
    for name, items in rows.items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def toy_rows(count=12) -> dict[str, list[dict]]:
    """Rows in the real files' form, of words that Jinja, Python and YAML could trip over."""
    rng = random.Random(0)
    words = "the cat's \"hat\" 12 [title] {{x}} naïve 北京 a: b\\n 'why' two  gaps # % don't"
    words = words.split(" ")  # the empty one makes double and trailing spaces

    def text():
        return " ".join(rng.choices(words, k=rng.randint(2, 7)))

    def arc(index):
        labels = rng.choice([list("ABCD"), list("ABC"), list("1234")])
        return {
            "id": str(index),
            "question": text(),
            "choices": {"text": [text() for _ in labels], "label": labels},
            "answerKey": rng.choice(labels),
        }

    def winogrande():
        return {"sentence": f"{text()} _ {text()}.", "option1": text(), "option2": text(), "answer": rng.choice("12")}

    subjects = ["high_school_us_history"]  # one: the harness has a task for each
    return {
        "boolq": [{"passage": text(), "question": text(), "label": rng.randrange(2)} for _ in range(count)],
        "openbookqa": [
            {"question_stem": item["question"], "choices": item["choices"], "answerKey": item["answerKey"]}
            for item in map(arc, range(count))
        ],
        "mmlu": [
            {
                "question": text(),
                "subject": rng.choice(subjects),
                "choices": [text() for _ in range(4)],
                "answer": rng.randrange(4),
            }
            for _ in range(count)
        ],
        "lambada_openai": [{"text": f"{text()} last{i}"} for i in range(count)],
        "triviaqa": [
            {"question": text(), "answer": {"aliases": [text() for _ in range(rng.randint(1, 4))], "value": text()}}
            for _ in range(count)
        ],
        "piqa": [{"goal": text(), "sol1": text(), "sol2": text(), "label": rng.randrange(2)} for _ in range(count)],
        "winogrande": [winogrande() for _ in range(count)],
        "hellaswag": [
            {"query": text(), "choices": [text() for _ in range(4)], "gold": rng.randrange(4)} for _ in range(count)
        ],
        "arc_easy": [arc(index) for index in range(count)],
        "arc_challenge": [arc(index) for index in range(count)],
    }


@pytest.fixture(params=["toy", "real"])
def rows(request) -> dict[str, list[dict]]:
    """{task: rows}: made up, or 50 spread over each real file."""
    if request.param == "toy":
        return toy_rows()
    folder = request.getfixturevalue("data_dir")
    every = {name: read_rows(folder / f"{name}.jsonl") for name in tasks.TASKS}
    return {name: items[:: len(items) // 50][:50] for name, items in every.items()}


def load_local(name, folder):
    return tasks.task_manager(hub=False).load([tasks.local_task(name, folder)])["tasks"][name]


def load_own(name, items):
    """The harness's own task on `items` as the hub would give them."""
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(f"{lm_eval.tasks.__path__[0]}/{OWN_FILES[name]}")
    config.pop("tag", None)
    if name == "hellaswag":  # the rows are preprocessed already; the hub's label is a string
        del config["process_docs"]
        items = [item | {"label": str(item["gold"])} for item in items]

    class Offline(ConfigurableTask):
        def download(self, *args, **kwargs):
            rows = Dataset.from_list(items)
            self.dataset = DatasetDict(train=rows, dev=rows, validation=rows, test=rows)

    return Offline(config=config)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_local_variants_ask_what_the_harness_asks(name, rows, tmp_path):
    local = load_local(name, write_rows(tmp_path / "data", rows))
    own = load_own(name, rows[name])
    for task in (local, own):
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
    for request, own_request in zip(local.instances, own.instances, strict=True):
        assert request.args == own_request.args
        assert (request.doc_id, request.idx) == (own_request.doc_id, own_request.idx)

    rng = random.Random(0)
    for doc, own_doc in zip(local.eval_docs, own.eval_docs, strict=True):
        assert local.doc_to_target(doc) == own.doc_to_target(own_doc)
        if name == "winogrande":  # its gold index
            assert local.doc_to_text(doc) == own.doc_to_text(own_doc) == int(doc["answer"]) - 1
        scores = [(-100 * rng.random(), False) for _ in local.doc_to_choice(doc)]
        assert local.process_results(doc, scores) == own.process_results(own_doc, scores)

    assert local.VERSION == own.VERSION
    same = ("task", "output_type", "metric_list", "target_delimiter", "description", "test_split")
    assert [local.get_config(key) for key in same] == [own.get_config(key) for key in same]


@pytest.mark.parametrize("name", tasks.LOCAL[5:])
def test_further_variants_ask_what_the_harness_asks(name, tmp_path):
    rows = toy_rows(50)
    local, own = load_local(name, write_rows(tmp_path / "data", rows)), load_own(name, rows[name])
    for task in (local, own):
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
    assert len(local.instances) >= 50
    for request, own_request in zip(local.instances, own.instances, strict=True):
        assert request.args == own_request.args
        assert (request.doc_id, request.idx, request.request_type) == (
            own_request.doc_id,
            own_request.idx,
            own_request.request_type,
        )
    rng = random.Random(0)
    for doc, own_doc in zip(local.eval_docs, own.eval_docs, strict=True):
        target = local.doc_to_target(doc)
        assert target == own.doc_to_target(own_doc)
        if name == "triviaqa":
            answers = [rng.choice([target[0].upper(), "wrong"])]
        elif name == "lambada_openai":
            answers = [(-rng.random(), rng.random() < 0.5)]
        else:
            answers = [(-100 * rng.random(), False) for _ in local.doc_to_choice(doc)]
        assert local.process_results(doc, answers) == own.process_results(own_doc, answers)
    assert local.aggregation() == own.aggregation() and local.higher_is_better() == own.higher_is_better()
    assert local.VERSION == own.VERSION
    same = ("task", "output_type", "target_delimiter", "filter_list") if name != "mmlu" else ("output_type",)
    assert [local.get_config(key) for key in same] == [own.get_config(key) for key in same]


def test_every_subject_of_mmlu_has_the_name_that_the_harness_gives_it(tmp_path):
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__path__[0], "mmlu", "default")
    own = {
        c["dataset_name"]: c["description"] for c in map(load_yaml, folder.glob("mmlu_*.yaml")) if "description" in c
    }
    assert len(own) == 57
    row = toy_rows(1)["mmlu"][0]
    rows = [row | {"subject": subject} for subject in own]
    local = load_local("mmlu", write_rows(tmp_path / "data", {"mmlu": rows}))
    bodies = {local.doc_to_text(doc).removeprefix(own[doc["subject"]]) for doc in local.eval_docs}
    assert len(bodies) == 1, "but for the description every subject has the same question"


def test_scores_of_words_and_answers_are_plain_greedy_ones(tmp_path, no_network, monkeypatch):
    """lambada's perplexity and accuracy, triviaqa's answers, without the first layer's attention."""
    from lm_eval.models.huggingface import HFLM

    answers, generate_until = {}, HFLM.generate_until

    def record(self, requests, **kwargs):
        said = generate_until(self, requests, **kwargs)
        answers.update((x.args[0], text) for x, text in zip(requests, said, strict=True))
        return said

    monkeypatch.setattr(HFLM, "generate_until", record)
    rows = toy_rows(6)
    tokenizer = toy_tokenizer(rows)
    model = toy_model(tokenizer)
    model.model.layers[0].self_attn = NoAttention()

    @torch.no_grad()
    def greedy(prompt, count):
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(count):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        return ids[start:]

    folder = write_rows(tmp_path / "data", rows)
    scores = tasks.zero_shot(model, tokenizer, ["lambada_openai", "triviaqa"], batch_size=4, task_data=folder)
    values, right = [], 0
    for row in rows["lambada_openai"]:
        context, word = row["text"].rsplit(" ", 1)
        values.append(log_probability(model, tokenizer, context, f" {word}"))
        said = greedy(context.rstrip(), 12)
        wanted = tokenizer(row["text"])["input_ids"][len(tokenizer(context.rstrip())["input_ids"]) :]
        right += said[: len(wanted)] == wanted
    lambada = scores["lambada_openai"]
    assert lambada["perplexity"] == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-4)
    assert (lambada["metric"], lambada["score"], lambada["acc_norm"]) == ("acc", right / len(values), None)
    assert scores["triviaqa"]["metric"] == "exact_match" and len(answers) == 6
    for prompt, answer in answers.items():
        said = tokenizer.decode(greedy(prompt, 60)).split("</s>")[0].replace("<s>", "")
        said = re.split("[\n.,]", said)[0].rstrip("\ufffd")  # the last character may be cut
        assert said and (answer.startswith(said) or said.strip() == answer.strip())


def test_a_mark_that_windows_puts_in_front_of_a_task_file_is_no_text(tmp_path):
    rows = toy_rows()
    folder = write_rows(tmp_path / "data", rows)
    for name in tasks.LOCAL:
        file = folder / f"{name}.jsonl"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert list(load_local(name, folder).eval_docs) == rows[name]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_harness_reads_every_row_unchanged(name, data_dir):
    assert list(load_local(name, data_dir).eval_docs) == read_rows(data_dir / f"{name}.jsonl")


def questions(name, row) -> tuple[list[tuple[str, str]], list[str], int]:
    """(context, continuation) of every candidate, the texts acc_norm divides by, the gold index."""
    if name == "winogrande":
        before, after = row["sentence"].split("_")
        options = [before + row["option1"], before + row["option2"]]
        pairs = [(option, " " + after.strip()) for option in options]
        return pairs, options, int(row["answer"]) - 1
    if name == "hellaswag":
        context, choices, gold = row["query"], row["choices"], row["gold"]
    elif name == "piqa":
        context, choices, gold = row["goal"], [row["sol1"], row["sol2"]], row["label"]
    else:
        context, choices = row["question"], row["choices"]["text"]
        gold = row["choices"]["label"].index(row["answerKey"])
    if name != "hellaswag":
        context = f"Question: {context}\nAnswer:"
    return [(context, " " + choice) for choice in choices], choices, gold


@torch.no_grad()
def log_probability(model, tokenizer, context, continuation) -> float:
    """log P(continuation | context), one request at a time, in float32.

    Spaces that end a context belong to the continuation, the harness's rule.
    """
    start = len(tokenizer(context.rstrip())["input_ids"])
    ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
    logits = model(ids[None, :-1]).logits[0].float().log_softmax(-1)
    return logits[start - 1 :].gather(1, ids[start:, None]).sum().item()


def toy_tokenizer(rows):
    """Byte-level BPE with a bos token in front, as Llama's, and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(rows, ensure_ascii=False)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def toy_model(tokenizer, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None


@pytest.fixture
def asked(monkeypatch) -> dict:
    """{(context, continuation): log-probability} of what the harness asks of the model."""
    from lm_eval.models.huggingface import HFLM

    seen, loglikelihood = {}, HFLM.loglikelihood

    def record(self, requests, **kwargs):
        answers = loglikelihood(self, requests, **kwargs)
        seen.update((x.args, answer[0]) for x, answer in zip(requests, answers, strict=True))
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    return seen


@pytest.mark.parametrize(("dtype", "batch_size"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 1)])
def test_zero_shot_is_the_plain_accuracy(dtype, batch_size, rows, tmp_path, no_network, asked):
    folder, limit = write_rows(tmp_path / "data", rows), 5
    tokenizer = toy_tokenizer(rows)
    model = toy_model(tokenizer, dtype)
    model.model.layers[0].self_attn = NoAttention()  # a pruned block
    model.model.layers[2].self_attn = NoAttention()
    scores = tasks.zero_shot(model, tokenizer, tasks.TASKS, batch_size=batch_size, limit=limit, task_data=folder)

    expected, requests = {}, {}
    for name in tasks.TASKS:
        right, right_norm = 0, 0
        for row in rows[name][:limit]:
            pairs, choices, gold = questions(name, row)
            values = [log_probability(model, tokenizer, *pair) for pair in pairs]
            norms = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
            right += values.index(max(values)) == gold
            right_norm += norms.index(max(norms)) == gold
            requests.update(zip(pairs, values, strict=True))
        normed = name != "winogrande"
        score = (right_norm if normed else right) / limit
        expected[name] = {
            "score": score,
            "metric": "acc_norm" if normed else "acc",
            "acc": right / limit,
            "acc_norm": right_norm / limit if normed else None,
            "stderr": pytest.approx(math.sqrt(score * (1 - score) / (limit - 1))),
            "items": limit,
        }
    assert asked == pytest.approx(requests, rel=1e-5)  # bf16 sums would be off by 1e-3
    assert scores == expected
    assert list(scores) == list(tasks.TASKS)
    assert tokenizer.pad_token is None  # the caller's tokenizer is left alone


def test_folder_names_are_not_patterns(tmp_path):
    rows = toy_rows()
    write_rows(tmp_path / "data1", rows)
    folder = write_rows(tmp_path / "data[1]*", rows)
    assert list(load_local("piqa", folder).eval_docs) == rows["piqa"]


def test_limit_per_task(tmp_path):
    rows = toy_rows()
    tokenizer = toy_tokenizer(rows)
    scores = tasks.zero_shot(
        toy_model(tokenizer),
        tokenizer,
        ["arc_easy", "piqa", "winogrande"],
        limit={"piqa": 1, "arc_easy": 3},
        task_data=write_rows(tmp_path / "data", rows),
    )
    assert {name: score["items"] for name, score in scores.items()} == {"arc_easy": 3, "piqa": 1, "winogrande": 12}
    assert scores["piqa"]["stderr"] is None
    assert json.loads(json.dumps(scores)) == scores


def test_unknown_answer_is_an_error_not_a_wrong_item(tmp_path):
    rows = toy_rows()
    for row in rows["winogrande"]:
        row["answer"] = ""  # as in the hub's test split
    with pytest.raises(ValueError, match='winogrande.jsonl, line 1: answer holds \'\', not "1" or "2"'):
        load_local("winogrande", write_rows(tmp_path / "data", rows))


WRONG = {  # task: changes of a row, and what is said
    "piqa": (
        (dict(label=5), "label holds 5, not 1 or 0"),
        (dict(label=-1), "label holds -1"),
        (dict(label="0"), "label holds '0'"),
        (dict(label=True), "label holds True"),
        (dict(sol2=None), "sol2 holds None"),
        (dict(sol1="  "), "sol1 holds '  '"),
        (dict(goal=[]), "goal holds []"),
        (dict(goal="\ud800"), "half a surrogate pair"),
        (dict(id=10**30), "too large a number"),
    ),
    "winogrande": (
        (dict(sentence="No blank at all."), "no blank _"),
        (dict(sentence="Nothing behind _ "), "no blank _ with text behind it"),
        (dict(answer="3"), "answer holds '3'"),
        (dict(answer=1), "answer holds 1, not a string"),
    ),
    "hellaswag": (
        (dict(gold=4), "gold holds 4, not 0..3"),
        (dict(gold="x"), "gold holds 'x'"),
        (dict(choices=["one"], gold=0), "choices has 1, not two or more"),
        (dict(choices=["one", None], gold=0), "choices[1] holds None"),
        (dict(choices="ab", gold=0), "choices holds 'ab'"),
    ),
    "arc_easy": (
        (dict(answerKey="E"), "answerKey holds 'E', not one of the labels"),
        (dict(choices={"text": ["a"], "label": ["A"]}, answerKey="A"), "choices has 1 texts"),
        (dict(choices={"text": ["a", "b"], "label": ["A", "A"]}, answerKey="A"), "each with its own label"),
        (dict(choices={"text": ["a", "b"], "label": ["A"]}, answerKey="A"), "each with its own label"),
        (dict(choices=None), "choices holds None"),
    ),
    "openbookqa": ((dict(question_stem=None), "question_stem holds None"),),
    "boolq": ((dict(label=2), "label holds 2"), (dict(passage=3), "passage holds 3")),
    "mmlu": ((dict(choices=["a"] * 3, answer=0), "choices has 3, not 4"), (dict(answer=4), "answer holds 4, not 0..3")),
    "lambada_openai": ((dict(text="word"), "no last word"), (dict(text=None), "text holds None")),
    "triviaqa": ((dict(answer={"aliases": []}), "no aliases"), (dict(answer="x"), "answer holds 'x'")),
}
LINES = {  # instead of a row
    b"{": "not JSON",
    b"[1]": "is no row",
    b"null": "None is no row",
    b"[" * 100_000: "not JSON",
    b"{}": "has no goal, sol1, sol2, label",
}


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_row_is_named_before_anything_is_scored(tmp_path, name):
    for k, (change, says) in enumerate(WRONG[name]):
        rows = toy_rows()
        rows[name][2] |= change
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        with pytest.raises(ValueError) as error:
            tasks.check_tasks([name], folder)
        assert f"{name}.jsonl, line 3: " in str(error.value) and says in str(error.value), error.value
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("line", LINES)
def test_every_line_that_is_no_row_is_named(tmp_path, line):
    good = json.dumps(toy_rows()["piqa"][0]).encode()
    (tmp_path / "piqa.jsonl").write_bytes(good + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError) as error:
        tasks.check_tasks(["piqa"], tmp_path)
    assert "piqa.jsonl, line 3: " in str(error.value) and LINES[line] in str(error.value)


@pytest.mark.parametrize("content, says", ((b"", "no rows"), (b"\n", "no rows"), (b"\xff\xfe", "not UTF-8")))
def test_a_task_file_without_rows_is_refused(tmp_path, content, says):
    (tmp_path / "piqa.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        tasks.check_tasks(["piqa"], tmp_path)


def test_columns_of_two_types_are_refused_where_the_second_is(tmp_path):
    rows = [row | {"id": k if k else "first"} for k, row in enumerate(toy_rows()["piqa"])]
    with pytest.raises(ValueError, match="line 2: id holds a number, in the rows before text"):
        tasks.check_tasks(["piqa"], write_rows(tmp_path / "data", {"piqa": rows}))


def test_a_task_file_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "piqa.jsonl")
    with pytest.raises(ValueError, match="not a regular file"):
        tasks.check_tasks(["piqa"], tmp_path)


@pytest.mark.parametrize("name", tasks.LOCAL)
def test_random_rows_are_named_or_loaded(tmp_path, name):
    """What passes is what the harness can read and score: it loads, and every answer is one of the choices."""
    from test_orders import damage

    rng, refused = random.Random(name), 0
    for k in range(40):
        rows = toy_rows(4)[name]
        rows[rng.randrange(4)] = damage(rows[0], rng)
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            tasks.check_tasks([name], folder)
        except ValueError as error:
            assert f"{name}.jsonl" in str(error) and len(str(error).splitlines()) == 1
            refused += 1
            continue
        task = load_local(name, folder)
        for doc in task.eval_docs:
            target = task.doc_to_target(doc)
            if task.OUTPUT_TYPE == "multiple_choice" and name != "winogrande":
                assert 0 <= int(target) < len(task.doc_to_choice(doc)) > 1
    assert refused > 5


@pytest.mark.parametrize("name", ("piqa", "triviaqa"))
def test_a_model_that_answers_nan_gets_no_score(tmp_path, no_network, name):
    rows = toy_rows()
    tokenizer, folder = toy_tokenizer(rows), write_rows(tmp_path / "data", rows)
    model = toy_model(tokenizer)
    model.lm_head.weight.data[7, 3] = math.nan
    with pytest.raises(ValueError, match="NaN.*no score"):
        tasks.zero_shot(model, tokenizer, [name], limit=2, task_data=folder)


def test_a_tokenizer_without_special_tokens_is_refused_by_name(tmp_path, no_network):
    rows = toy_rows()
    tokenizer, folder = toy_tokenizer(rows), write_rows(tmp_path / "data", rows)
    model = toy_model(tokenizer)
    tokenizer.eos_token = None
    assert tasks.zero_shot(model, tokenizer, ["piqa"], limit=2, task_data=folder)["piqa"]["items"] == 2
    with pytest.raises(ValueError, match="no EOS token, with which answers end"):
        tasks.zero_shot(model, tokenizer, ["triviaqa"], limit=2, task_data=folder)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no BOS and no EOS token"):
        tasks.zero_shot(model, tokenizer, ["piqa"], limit=2, task_data=folder)


def test_tokens_that_the_model_lacks_are_refused(tmp_path, no_network):
    rows = toy_rows()
    tokenizer, folder = toy_tokenizer(rows), write_rows(tmp_path / "data", rows)
    model = toy_model(tokenizer)
    model.resize_token_embeddings(260)
    for name in ("piqa", "triviaqa"):
        with pytest.raises(ValueError, match=r"the tokenizer gives token \d+ for a task, the model knows 0..259"):
            tasks.zero_shot(model, tokenizer, [name], limit=4, task_data=folder)


def run_python(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_folder_of_task_files_does_not_shadow_the_harness():
    code = "import lm_eval, lm_eval.tasks; print(lm_eval.__file__)"
    run = run_python("-c", code)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).parent != tasks.TASK_FILES
    assert {file.suffix for file in tasks.TASK_FILES.iterdir()} == {".yaml"}


def test_missing_harness_is_named():
    # -S: no site-packages, so that lm_eval/ in the checkout is all that `import lm_eval` finds.
    code = "from lib.tasks import check_tasks; check_tasks(['piqa'])"
    run = run_python("-S", "-c", code)
    assert "ValueError: zero-shot tasks need lm_eval: pip install lm_eval==0.4.13" in run.stderr


def test_local_task_errors(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(json.dumps(toy_rows()["piqa"][0]))
    assert tasks.local_task("piqa", tmp_path)["dataset_kwargs"]["data_files"] == {
        "validation": str(tmp_path / "piqa.jsonl")
    }
    with pytest.raises(ValueError, match="'gsm8k' has no variant .* use piqa, .* or leave"):
        tasks.local_task("gsm8k", tmp_path)
    with pytest.raises(ValueError, match="nowhere' is not a folder: give one that holds piqa"):
        tasks.local_task("piqa", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no arc_easy.jsonl: task arc_easy reads it"):
        tasks.local_task("arc_easy", tmp_path)


def test_check_tasks_errors(tmp_path, monkeypatch):
    (tmp_path / "piqa.jsonl").write_text(json.dumps(toy_rows()["piqa"][0]))
    tasks.check_tasks(["piqa"], tmp_path)
    with pytest.raises(ValueError, match="'wikitext' has no variant"):
        tasks.check_tasks(["piqa", "wikitext"], tmp_path)
    with pytest.raises(ValueError, match="holds no winogrande.jsonl"):
        tasks.check_tasks(["piqa", "winogrande"], tmp_path)
    with pytest.raises(ValueError, match="5 few-shot examples with local task data: .* use 0"):
        tasks.check_tasks(["piqa"], tmp_path, num_fewshot=5)
    with pytest.raises(ValueError, match="no task given"):
        tasks.check_tasks([], tmp_path)

    import lm_eval.tasks

    folder = lm_eval.tasks.__path__[0]  # a few of its folders: all take ten seconds
    index = lm_eval.tasks.TaskManager(
        include_defaults=False,
        include_path=[f"{folder}/arc", f"{folder}/gsm8k", f"{folder}/wikitext", f"{folder}/mmlu/default"],
    )
    monkeypatch.setattr(tasks, "task_manager", lambda hub: index)
    tasks.check_tasks(["arc_easy", "mmlu"])
    with pytest.raises(ValueError, match="'picqa' is unknown to lm_eval: use some of piqa, "):
        tasks.check_tasks(["arc_easy", "picqa"])
    with pytest.raises(ValueError, match="'ai2_arc' is lm_eval's tag .*: arc_challenge, arc_easy"):
        tasks.check_tasks(["ai2_arc"])
    with pytest.raises(
        ValueError, match="'wikitext' reports .*byte_perplexity.*: only tasks with acc_norm, acc, exact_match"
    ):
        tasks.check_tasks(["wikitext"])
    tasks.check_tasks(["gsm8k"])


@pytest.mark.parametrize("limit", [0, -1, 0.5, {"piqa": 0}, {"hellaswag": 5}])
def test_limit_errors(limit):
    with pytest.raises(ValueError, match="limit .*(whole number|not among the tasks)"):
        tasks.check_limits(["piqa"], limit)
