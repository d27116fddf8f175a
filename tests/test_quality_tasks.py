"""Quality tasks from their command lines to result.json: items, resuming, bad files, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

import kvquant
from kvquant.cli import conf_dir
from kvquant.config import register_schemas, validate
from kvquant.data.longbench import SUITES, classification, code_similarity, qa_f1, retrieval, rouge_l
from kvquant.data.rows import Row, read_rows
from kvquant.data.ruler import CATEGORIES, FIELDS, category_of, generate, questions_of_rows
from kvquant.errors import ConfigError, DataError
from kvquant.results import load_result
from kvquant.tasks import run_task
from kvquant.tasks.compare_table import Row as TableRow
from kvquant.tasks.compare_table import at_equal_bits
from kvquant.tasks.variants import expand
from small_models import tiny_llama


@pytest.fixture(scope="module")
def calibration_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture
def run(calibration_dir, tmp_path):
    def execute(*overrides: str) -> dict:
        register_schemas()
        always = ["experiment=smoke", "device=cpu", "energy.meter=none", f"calibration.dir={calibration_dir}"]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            # A preset of the test's own takes the place of the small one.
            presets = [o for o in overrides if o.startswith("experiment=")]
            cfg = compose("config", overrides=[*(always[1:] if presets else always), *overrides])
        run_task.execute(cfg, run_dir=tmp_path, console=Console(quiet=True))
        return load_result(tmp_path)

    return execute


ROWS = "task.variants=[{option: [nuq, kivi], bits: [2, 3], outlier_fraction: 0.0, recent_tokens: 32}]"
SMALL = ("task=compare", "task.window=128", "task.passkeys=4", "task.passkey_length=200", "task.baseline=[]")


def test_compare_measures_every_variant_on_the_same_items(run, tmp_path) -> None:
    metrics = run(*SMALL, ROWS)["metrics"]
    table = metrics["variants"]
    assert len(table) == 5 and table["exact"]["kl"]["estimate"] == 0
    two, three = (table[f"nuq{bits} recent_tokens=32"] for bits in (2, 3))
    assert two["kl"]["estimate"] > three["kl"]["estimate"] > 0
    assert two["effective_bits"] < three["effective_bits"]
    # nuq at 2 bits, in every layer: four fp32 numbers a key channel, and two codebooks with their boundaries.
    model = json.loads((Path(kvquant.__file__).parent / "assets" / "tiny" / "config.json").read_text())
    channels, layers = model["num_key_value_heads"] * model["head_dim"], model["num_hidden_layers"]
    constants = layers * 4 * (4 * channels + 2 * (4 + 3))
    assert two["constants_bytes"] == constants and table["exact"]["constants_bytes"] == 0
    per_window = 128 * 2 * channels * layers
    assert two["effective_bits_with_constants"] - two["effective_bits"] == pytest.approx(
        8 * constants / per_window
    )
    assert two["kl"]["low"] <= two["kl"]["estimate"] <= two["kl"]["high"] and two["kl"]["n"] == 4
    assert two["passkey"]["n"] == 4
    items = json.loads((tmp_path / "items.json").read_text())
    assert [sum(w["n_tokens"] for w in row["windows"][0]) for row in items] == [4 * 127] * 5


def test_perplexity_stopped_between_windows_goes_on_and_ends_with_the_same_numbers(
    run, tmp_path, monkeypatch
) -> None:
    from kvquant.tasks import perplexity

    command = ("task=perplexity", "task.window=128")
    real, measured = perplexity.compare_window, []

    def counting(window, *args):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(window.name)
        return real(window, *args)

    monkeypatch.setattr(perplexity, "compare_window", counting)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    assert load_result(tmp_path)["status"] == "interrupted"
    monkeypatch.setattr(perplexity, "compare_window", real)
    resumed = run(*command)
    assert resumed["provenance"]["resumed_items"] == 2
    shutil.rmtree(tmp_path / "items")
    whole = run(*command)
    assert whole["provenance"]["resumed_items"] == 0
    for name in ("perplexity_exact", "perplexity_quantized", "kl_mean", "windows"):
        assert resumed["metrics"][name] == whole["metrics"][name]


def test_a_run_started_again_computes_what_is_missing(run, calibration_dir, monkeypatch) -> None:
    rows = "task.variants=[{option: uniform, bits: [2, 4]}]"
    import kvquant.tasks.compare as compare

    calls = 0
    original = compare.run_cache

    def killed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(compare, "run_cache", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*SMALL, rows, "seed=7", "task.passkeys=0")
    monkeypatch.setattr(compare, "run_cache", original)
    first = run(*SMALL, rows, "seed=7", "task.passkeys=0")["metrics"]
    # Five finished before the kill; of the exact rows, perhaps an earlier test's.
    assert first["items_found"] >= 5 and first["items_found"] + first["items_computed"] == 12
    again = run(*SMALL, rows, "seed=7", "task.passkeys=0")["metrics"]
    assert again["items_computed"] == 0 and again["variants"] == first["variants"]


def test_draws_of_calibration_text_are_averaged_and_their_spread_is_said(run) -> None:
    metrics = run(
        *SMALL, "task.variants=[{option: nuq, bits: 2}]", "task.calibration_seeds=[0,1]", "task.passkeys=0"
    )
    entry = metrics["metrics"]["variants"]["nuq2-1%"]
    assert entry["draws"] == 2 and entry["kl_deviation_over_draws"] > 0
    assert entry["kl"]["estimate"] == pytest.approx(sum(entry["kl_per_draw"]) / 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"option": "nuqq"}], r"task.variants\[0\].option must be one of .*got nuqq"),
        ([{"option": "nuq", "bitz": 2}], r"must name fields of the quant group, got bitz"),
        (
            [{"option": "nuq"}, {"option": "kivi", "recent_tokens": 20}],
            r"task.variants\[1\]: quant.recent_tokens",
        ),
        (["nuq"], "must be a mapping"),
        (
            [{"option": "nuq", "bits": [2, 3], "label": "mine"}],
            "must have a label of its own, got mine a second",
        ),
    ],
)
def test_a_wrong_row_is_one_line(rows: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(rows)


def test_lists_multiply_out_and_repetitions_go() -> None:
    variants = expand([{"option": ["nuq", "uniform"], "bits": [2, 3]}, {"option": "nuq", "bits": 2}])
    assert [v.label for v in variants] == ["nuq2-1%", "nuq3-1%", "uniform2-1%", "uniform3-1%"]
    assert variants[2].spec.option("clip", None) == "none"


def test_the_baseline_is_interpolated_in_its_logarithm() -> None:
    def row(label: str, bits: float, kl: list[float]) -> TableRow:
        windows = [{"kl_sum": x, "held_bytes": bits, "elements": 8} for x in kl]
        return TableRow(label, expand([{"option": "nuq"}])[0].spec, [windows], [[]])

    low, high = row("a", 2, [8, 8]), row("b", 4, [2, 2])
    sums = [low.sums("kl_sum"), high.sums("kl_sum")]
    assert at_equal_bits(row("c", 3, [1, 1]), [low, high], sums).tolist() == pytest.approx([4, 4])
    assert at_equal_bits(row("e", 1, [1, 1]), [low, high], sums).tolist() == [8, 8]
    assert at_equal_bits(row("d", 5, [1, 1]), [low, high], sums) is None


@pytest.mark.parametrize("task", ["perplexity", "compare", "passkey", "ruler", "longbench", "lm_eval"])
def test_exact_reads_are_refused_where_they_would_show_nothing(task: str) -> None:
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        needed = ["task.path=/somewhere"] if task == "longbench" else []
        cfg = compose("config", overrides=[f"task={task}", "cache.prefill_reads=exact", *needed])
    with pytest.raises(ConfigError, match="try cache.prefill_reads=quantized"):
        validate(cfg)


def test_passkey_counts_what_greedy_decoding_would_emit(run, calibration_dir) -> None:
    overrides = ("task=passkey", "task.lengths=[200]", "task.count=4", "quant.bits=4")
    metrics = run(*overrides)["metrics"]
    cell = {c["kind"]: c for c in metrics["cells"]}["passkey"]
    assert cell["exact"]["estimate"] == 1 and cell["quantized"]["n"] == 4
    assert run(*overrides)["metrics"]["items_computed"] == 0


def test_ruler_asks_its_questions_and_scores_them(run, tmp_path) -> None:
    metrics = run("task=ruler", "task.length=400", "task.count=1", "task.categories=[niah_single,vt]")[
        "metrics"
    ]
    assert set(metrics["categories"]) == {"niah_single", "vt"}
    assert all(row["tokens"] <= 370 for row in json.loads((tmp_path / "items.json").read_text()))


WORDS = " ".join("".join(chr(97 + (i // 26**k) % 26) for k in range(5)) for i in range(0, 40000, 37))
TEXT = " ".join(f"The {word} was here and went away again." for word in WORDS.split())


@pytest.mark.parametrize("category", CATEGORIES)
def test_generated_questions_fit_their_length_and_hold_their_answers(category: str) -> None:
    def count(text: str) -> int:
        return len(text) // 4

    questions = generate(category, count, TEXT, 1024, 3, seed=0)
    assert questions == generate(category, count, TEXT, 1024, 3, seed=0)
    assert questions != generate(category, count, TEXT, 1024, 3, seed=1)
    for question in questions:
        assert 0.9 * 1024 <= count(question.prompt) + question.answer_tokens <= 1024
        assert all(output in question.prompt for output in question.outputs)
        assert question.score(f"x {' '.join(question.outputs).upper()}") == 1
        assert question.score(question.outputs[0]) == 1 / len(question.outputs)
    with pytest.raises(DataError, match="task.length must hold"):
        generate(category, count, TEXT, 64, 1, seed=0)


@pytest.mark.parametrize("category", CATEGORIES)
def test_questions_are_as_long_as_asked_for_where_the_text_is_short(category: str) -> None:
    """131,072 tokens out of a text of some 12,000: sentences and words repeat."""
    counts = []

    def count(text: str) -> int:
        counts.append(len(text) // 4)
        return counts[-1]

    (question,) = generate(category, count, TEXT[:50_000], 131_072, 1, seed=0)
    assert 0.98 * 131_072 <= len(question.prompt) // 4 + question.answer_tokens <= 131_072
    assert len(counts) < 25, "each reads the whole prompt"
    if category == "cwe":
        listed = [w for w in question.prompt.split() if w.isalpha()]
        common = {listed.count(w) for w in question.outputs}
        others = max(listed.count(w) for w in set(WORDS.split()) - set(question.outputs))
        assert min(common) > 5 * others


def test_no_question_has_two_needles_of_one_key() -> None:
    few = " ".join(f"The {word} was here and went away again." for word in sorted(set(WORDS.split()))[:110])
    for question in generate("niah_multikey", lambda t: len(t) // 4, few, 1024, 60, seed=3):
        keys = re.findall(r"numbers for (\S+) is:", question.prompt)
        assert len(keys) == 4 == len(set(keys))
        words = [word for key in keys for word in key.split("-")]
        assert len(set(words)) == 8


@pytest.mark.parametrize(
    ("path", "category", "tokens", "score"),
    [
        ("niah_multikey_3/validation.jsonl", "niah_multikey_3", 128, 0.5),
        ("vt/validation.jsonl", "vt", 30, 0.5),
        ("4096/cwe/test.jsonl", "cwe", 120, 0.5),
        ("qa_1/validation.jsonl", "qa_1", 32, 1.0),
        ("ruler-niah_single_2-20.jsonl", "niah_single_2", 128, 0.5),
        ("ours.jsonl", "ours", 128, 0.5),
    ],
)
def test_files_of_ruler_are_scored_as_their_task_is(
    path: str, category: str, tokens: int, score: float
) -> None:
    """Answers of qa are alternatives; all others must be found, each for its share (RULER's string_match_part, _all)."""
    rows = [Row(1, {"input": "Question?", "outputs": ["Ann", "Bob"], "answer_prefix": " Answer:"})]
    assert category_of(Path(path)) == category
    (question,) = questions_of_rows(rows, path)
    assert (question.category, question.prompt) == (category, "Question? Answer:")
    assert question.answer_tokens == tokens and question.score("it is BOB.") == score


def test_word_lists_hold_the_counts_they_ask_for() -> None:
    (question,) = generate("cwe", lambda t: len(t) // 4, TEXT, 1024, 1, seed=0)
    words = [w for w in question.prompt.split() if w.isalpha()]
    common = [words.count(w) for w in question.outputs]
    assert min(common) >= 8
    (question,) = generate("fwe", lambda t: len(t) // 4, TEXT, 1024, 1, seed=0)
    times = [question.prompt.count(w) for w in question.outputs]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3


def test_longbench_metrics_are_the_published_ones() -> None:
    assert qa_f1("The Eiffel tower!", "eiffel tower") == 1
    assert qa_f1("a b c", "c d") == pytest.approx(0.5), "articles go: b c against c d"
    # What LongBench's own metrics.py gives (package rouge 1.0.1, which adds 1e-8 below the line).
    for prediction, answer, expected in (
        ("the cat sat", "the dog sat", 2 / 3),
        (
            "The report says costs rose. Costs rose by a tenth.",
            "Costs rose by a tenth. The board met.",
            12 / 17,
        ),
        ("a b c d. e f", "e f. a c d", 10 / 11),
        ("a a a b", "a b b", 1),
        ("b a", "a b", 1 / 2),
        ("", "a", 0),
    ):
        assert rouge_l(prediction, answer) == pytest.approx(expected), "distinct words, sentence by sentence"
    assert classification("It is a Number.", "Number", ["Number", "Person"]) == 1
    assert classification("Number or Person", "Number", ["Number", "Person"]) == 0.5
    assert retrieval("Paragraph 3 or 4", "Paragraph 3") == 0.5
    assert code_similarity("# comment\nreturn x\n", "return x") == 1
    row = {"answers": ["no", "yes it is"], "all_classes": None}
    assert SUITES["hotpotqa"].score("yes, it is", row) == 1
    assert SUITES["triviaqa"].score("\nyes it is\nno more", row) == 1


def test_longbench_reads_local_files(run, tmp_path) -> None:
    row = {"input": "Who?", "context": "Bob did it. " * 900, "answers": ["Bob"], "all_classes": None}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(row) + "\n")
    metrics = run("task=longbench", f"task.path={tmp_path}", "task.suites=[hotpotqa]", "model.max_length=256")
    assert metrics["metrics"]["categories"]["hotpotqa"]["n"] == 1


def test_longbench_comes_out_of_the_hub_s_cache(run, tmp_path, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    row = {"input": "Who?", "context": "Bob did it.", "answers": ["Bob"], "all_classes": None}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("data/qasper.jsonl", json.dumps(row) + "\n")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "data.zip"))
    overrides = ("task=longbench", "task.path=hub", "model.max_length=512")
    assert run(*overrides, "task.suites=[qasper]")["metrics"]["categories"]["qasper"]["n"] == 1
    with pytest.raises(DataError, match="must hold data/musique.jsonl"):
        run(*overrides, "task.suites=[musique]")

    def absent(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(DataError, match="where there is internet, and set task.path"):
        run(*overrides, "task.suites=[qasper]")


@pytest.mark.parametrize(
    ("name", "task", "overrides"),
    [
        ("ruler-niah_multikey_3-20.jsonl", "ruler", "task.paths=[{}]"),
        ("longbench-multi_news-20.jsonl", "longbench", "task.path={} task.suites=[multi_news]"),
    ],
)
def test_published_files_are_read_as_they_are(run, name: str, task: str, overrides: str) -> None:
    """With the files beside the checkout; skipped elsewhere. Prompts of 4,096 tokens do not fit the shipped model."""
    found = sorted(Path(__file__).resolve().parents[2].glob(f"shared/data/{name}"))
    if not found:
        pytest.skip(f"{name} is not on this machine")
    settings = overrides.format(found[0]).split()
    if task == "ruler":
        with pytest.raises(DataError, match=r"jsonl, row 1: prompt and answer must fit the model's context"):
            run(f"task={task}", "task.count=1", *settings)
    else:
        metrics = run(f"task={task}", "task.count=1", "model.max_length=400", *settings)["metrics"]
        assert metrics["categories"]["multi_news"]["n"] == 1


GOOD = b'{"input": "a", "outputs": ["b"]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold at least 1 row"),
        (GOOD + b'{"input": "a"}\n', "row 2 must have the fields input, outputs; outputs is missing"),
        (GOOD + b'{"input": "\xff", "outputs": []}\n', "row 2 must be UTF-8, byte 11 is not"),
        (GOOD + b"{input}\n", "row 2 must be JSON"),
        (GOOD + b"[1]\n", "row 2 must have the fields"),
        (b"\n" + GOOD + b'{"input": "a", "outputs": "b"}\n', "row 3 must have a list as outputs, got 'b'"),
        (b'{"input": null, "outputs": []}\n', "row 1 must have a text as input, got 'None'"),
    ],
)
def test_a_broken_file_is_one_line_with_file_and_row(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path, FIELDS, where_from="somewhere")
    assert "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_says_where_it_comes_from(tmp_path) -> None:
    with pytest.raises(DataError, match="gone.jsonl is missing; download it: example.org"):
        read_rows(tmp_path / "gone.jsonl", {}, where_from="example.org")


def test_an_answer_that_is_nothing_names_its_row(run, tmp_path) -> None:
    (tmp_path / "niah.jsonl").write_text(json.dumps({"input": "x", "outputs": [""]}) + "\n")
    with pytest.raises(DataError, match=r"niah.jsonl, row 1 must have an answer in outputs"):
        run("task=ruler", f"task.paths=[{tmp_path / 'niah.jsonl'}]")


def test_a_text_shorter_than_a_window_is_refused(run, tmp_path) -> None:
    with pytest.raises(DataError, match=r"must hold a window of 512 tokens, got 300; try task.window=300"):
        run("task=perplexity", "task.max_tokens=300", "task.window=512")
    path = tmp_path / "short.txt"
    path.write_text("A sentence of a short text. " * 200)
    with pytest.raises(
        DataError, match=rf"the held-out part of {path} must hold a window of 256 tokens, got"
    ):
        run("task=perplexity", "data=text_file", f"data.path={path}")


@pytest.mark.parametrize("content", [b"\xff\xfeh\x00i\x00", b"fine\n" * 9 + b"caf\xe9\n"])
def test_a_text_in_another_encoding_is_refused_with_its_line(run, tmp_path, content: bytes) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    line = content.count(b"\n") or 1
    with pytest.raises(DataError, match=rf"must be UTF-8, {path}, line {line} is not .*iconv -t utf-8"):
        run("task=perplexity", "data=text_file", f"data.path={path}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("task=perplexity", "task.window=4096"),
        ("task=compare", "task.window=4096"),
        ("task=compare", "task.passkey_length=4096"),
        ("task=ruler", "task.length=4096"),
        ("task=passkey", "task.lengths=[4096]"),
    ],
)
def test_a_context_longer_than_the_model_s_is_refused(run, overrides: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="context of 2048 tokens, got 4096; lower it, or set rope scaling"):
        run(*overrides)


def test_a_context_beyond_the_model_needs_rope_scaling(run) -> None:
    with pytest.raises(
        Exception, match=r"model.max_length must be at most the model's context of 2048, got 9999"
    ):
        run("task=perplexity", "model.max_length=9999")


def test_a_dev_and_a_test_part_share_no_document(run) -> None:
    parts = [run("task=perplexity", "task.window=256", f"task.part={p}")["metrics"] for p in ("dev", "test")]
    assert parts[0]["perplexity_exact"] != parts[1]["perplexity_exact"]


def test_the_main_table_runs_on_a_local_checkpoint(run, tmp_path) -> None:
    """The preset and a folder: one of another shape, context and dtype than the shipped model, saved by transformers."""

    from kvquant.models import load_tokenizer

    tokenizer, folder = load_tokenizer(), tmp_path / "my-model"
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = run(
        "experiment=[main_table,smoke]",
        "model=local",
        f"model.path={folder}",
        "task.variants=[{option: [nuq, hadamard], bits: [2, 8]}]",
        "task.passkey_length=200",
        "task.passkeys=2",
        "data.heldout_tokens=512",
    )
    metrics = result["metrics"]
    assert metrics["model"]["max_length"] == metrics["window_tokens"] == 256 and metrics["windows"] == 2
    assert result["provenance"]["model_hash"] and result["config"]["model"]["path"] == str(folder)
    for method in ("nuq{}-1%", "hadamard{}"):
        two, eight = (metrics["variants"][method.format(bits)] for bits in (2, 8))
        assert two["kl"]["estimate"] > 10 * eight["kl"]["estimate"] > 0
        assert two["passkey"]["n"] == 2


@pytest.mark.parametrize("backend", ["hqq", "quanto"])
def test_the_outside_baseline_reads_a_text_piece_by_piece(run, backend: str) -> None:
    pytest.importorskip(backend if backend == "hqq" else "optimum.quanto")
    rows = f"task.variants=[{{option: hf_quantized, bits: [2, 4], options: {{backend: {backend}}}, recent_tokens: 64}}]"
    table = run(*SMALL, rows, "task.passkeys=0")["metrics"]["variants"]
    two, four = (table[f"hf_quantized{bits} recent_tokens=64 backend={backend}"] for bits in (2, 4))
    assert two["kl"]["estimate"] > 3 * four["kl"]["estimate"] > 0
    # The last 64 of 128 tokens are exact.
    assert 10 < two["effective_bits"] < four["effective_bits"] < 16


def test_the_outside_baseline_is_refused_where_blocks_are_needed() -> None:
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=["quant=hf_quantized"])
    with pytest.raises(ConfigError, match="try task=perplexity or task=compare"):
        validate(cfg)


LM_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_the_harness_scores_a_local_task_as_a_plain_forward_pass_does(run, tmp_path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    questions = [
        {"question": "import os\nimport", "choices": [" sys", " banana tree, and then"], "answer": 0},
        {"question": "def f(self", "choices": [" zebra", "):\n    return"], "answer": 1},
        {"question": "The pass key is 12345. The pass key is", "choices": [" 12345", " 54321"], "answer": 0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, questions)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local_choice.yaml").write_text(LM_TASK % (tmp_path / "rows.jsonl"))
    overrides = ("task=lm_eval", "task.tasks=[local_choice]", f"task.include_path={folder}", "quant.bits=8")
    entry = run(*overrides)["metrics"]["tasks"]["local_choice"]["acc"]
    assert entry["n"] == 3 and entry["exact"] == entry["quantized"]
    # Two answers to each of three questions, from two caches.
    assert len(list(tmp_path.glob("items/*/*.item.json"))) == 12
    samples = json.loads((tmp_path / "items.json").read_text())["exact"]["local_choice"]

    import torch

    from kvquant.models import load_model, load_tokenizer

    model, tokenizer = load_model(), load_tokenizer()
    for sample, question in zip(sorted(samples, key=lambda s: s["doc_id"]), questions, strict=True):
        for choice, response in zip(question["choices"], sample["filtered_resps"], strict=True):
            context = tokenizer.encode(question["question"])
            whole = tokenizer.encode(question["question"] + choice)
            with torch.inference_mode():
                logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            picked = sum(float(logits[i - 1, whole[i]]) for i in range(len(context), len(whole)))
            assert float(response[0]) == pytest.approx(picked, rel=0.02, abs=0.1)


def test_a_task_that_the_harness_does_not_have_is_named(run) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="got no_such_task; list them"):
        run("task=lm_eval", "task.tasks=[no_such_task]")
