"""`ftray evaluate` on real runs: losses are training's, answers are the engine's, what it writes is what it found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftray.cli.main import call
from ftray.config import Decoding, Evaluation, Model, QLoRA, load_run
from ftray.data.encode import Vocabulary
from ftray.data.tokenizer import load_tokenizer
from ftray.engine.engine import load_base
from ftray.errors import ArtefactError, ConfigError
from ftray.evaluate.evaluation import evaluate, task_of
from ftray.evaluate.losses import LossRow, row_losses
from ftray.evaluate.questions import Asked, Examples, Prompter, questions_of, read_rows, split_rows
from ftray.evaluate.systems import BaseKey, resolved
from ftray.registry.publish import publish
from tests.evaluate.runs import HELD_OUT, cheese_run
from tests.toys import cheese_rows

METHODS = {
    "lora": "{name: lora, rank: 4}",
    "prefix": "{name: prefix, tokens: 6}",
    "prompt": "{name: prompt, tokens: 6}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for name, method in METHODS.items():
        cheese_run(root / name, method, steps=12 if name == "lora" else 3)
    cheese_run(root / "full", "{name: full}", "train.learning_rate=1e-3", steps=3)
    return {name: root / name for name in [*METHODS, "full"]}


def held_out_losses(folder: Path) -> tuple[float, float]:
    """(the base's, the tuned one's) as training took them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    return losses[0], min(losses[1:])


@pytest.fixture(scope="module")
def result(runs):
    with resolved([str(folder) for folder in runs.values()]) as systems:
        task = task_of(systems, settings=Evaluation(metrics=["chrf", "words"], decoding=Decoding(max_tokens=24)))
        yield evaluate(systems, task, lambda event: None)


def test_losses_are_those_of_training(result, runs):
    """Of the base, of adapters with and without virtual tokens, and of a whole model."""
    found = {outcome.system.name: outcome.loss for outcome in result.outcomes}
    assert list(found) == ["base", *runs]
    for name, folder in runs.items():
        base, tuned = held_out_losses(folder)
        assert found["base"] == pytest.approx(base, rel=1e-4)
        assert found[name] == pytest.approx(tuned, rel=1e-4), name
        assert tuned != base
    assert found["lora"] < 0.8 * found["base"]


QUANTIZED = {
    "qlora": "{name: qlora, rank: 4}",
    "single": "{name: qlora, rank: 4, double_quantization: false}",
    "adalora": "{name: adalora, rank: 6, target_rank: 4, quantization: nf4}",
    "vera": "{name: vera, quantization: nf4}",
    "ia3": "{name: ia3, quantization: nf4}",
    "prefix": "{name: prefix, tokens: 4, quantization: nf4}",
    "prompt": "{name: prompt, tokens: 4, quantization: nf4}",
    "p_tuning": "{name: p_tuning, tokens: 4, quantization: nf4}",
    "bottleneck": "{name: bottleneck, quantization: nf4}",
}


def test_losses_over_a_base_in_nf4_are_those_of_training(tmp_path):
    """Of every method that takes one, whatever its name, within what NF4's products in evaluation differ by (4e-4; the
    base in fp32 is 7e-3 away)."""
    for name, method in QUANTIZED.items():
        cheese_run(tmp_path / name, method, steps=3)
    with resolved([str(tmp_path / name) for name in QUANTIZED]) as systems:
        keys = {system.name: system.base for system in systems}
        assert all(key.quantized for key in keys.values())
        assert [name for name, key in keys.items() if not key.double_quantization] == ["single"]
        result = evaluate(systems, task_of(systems, settings=Evaluation()), lambda event: None)
    found = {outcome.system.name: outcome.loss for outcome in result.outcomes}
    assert list(found)[:2] == ["base nf4", "base nf4, scales whole"]
    for name in QUANTIZED:
        base, tuned = held_out_losses(tmp_path / name)
        assert found["base nf4, scales whole" if name == "single" else "base nf4"] == pytest.approx(base, rel=1e-3)
        assert found[name] == pytest.approx(tuned, rel=1e-3), name


@pytest.mark.parametrize("double", [True, False])
def test_scales_are_quantized_or_whole_as_in_training(double):
    method = QLoRA(name="qlora", double_quantization=double)
    base = BaseKey.under(method, Model(path="embedded"), "fp32").loaded("cpu")
    assert base.model.config.quantization_config.bnb_4bit_use_double_quant is double


def test_an_artefact_that_tells_no_run_says_itself_how_its_base_was_held(tmp_path):
    cheese_run(tmp_path / "run", QUANTIZED["prompt"], steps=1)
    facts = json.loads((tmp_path / "run/artefact/ftray.json").read_text())
    (tmp_path / "run/artefact/ftray.json").write_text(json.dumps(facts | {"run": None}))
    with resolved([str(tmp_path / "run/artefact")]) as [system]:
        assert (system.base.quantized, system.run) == (True, None)


def test_answers_are_scored_and_compared(result):
    base, lora = result.outcomes[0], result.outcomes[1]
    assert len(base.answers) == len(result.task.questions) == HELD_OUT
    assert lora.measured["chrf"].score > base.measured["chrf"].score
    difference = result.differences["lora", "base"]["loss"]
    assert difference is not None
    assert difference.high < 0
    assert difference.p < 0.01
    assert ("full", "lora") in result.differences


def test_an_answer_is_that_of_peft(result, runs):
    """The engine's greedy answer to a question is what PEFT and transformers say."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(Model(path="embedded"))
    system = next(outcome for outcome in result.outcomes if outcome.system.name == "lora")
    base = AutoModelForCausalLM.from_pretrained(load_base_folder(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, runs["lora"] / "artefact").eval()
    asked = result.task.questions[0].asked
    ids = Prompter(Vocabulary.of(tokenizer)).tokens(asked)
    with torch.inference_mode():
        said = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
    assert system.answers[0].text == tokenizer.decode(said, skip_special_tokens=True)
    assert system.answers[0].prompt_tokens == len(ids)


def load_base_folder() -> str:
    from ftray.embedded import base_path

    return str(base_path())


def test_beams_are_transformers(runs):
    """A search over padded prompts of a base and an adapter finds what one over each prompt alone finds."""
    from transformers import AutoModelForCausalLM

    settings = Evaluation(metrics=["words"], limit=3, decoding=Decoding(max_tokens=12, beams=4, no_repeat_ngram=3))
    with resolved([str(runs["lora"])]) as systems:
        found = evaluate(systems, task_of(systems, settings=settings), lambda event: None)
    base, tuned = ([answer.text for answer in outcome.answers] for outcome in found.outcomes)
    assert base != tuned
    tokenizer = load_tokenizer(Model(path="embedded"))
    model = AutoModelForCausalLM.from_pretrained(load_base_folder(), dtype=torch.float32).eval()
    for question, said in zip(found.task.questions, base, strict=True):
        ids = Prompter(Vocabulary.of(tokenizer)).tokens(question.asked)
        alone = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=12, num_beams=4, do_sample=False, no_repeat_ngram_size=3
        )
        assert said == tokenizer.decode(alone[0, len(ids) :], skip_special_tokens=True)


def test_the_command_writes_all_it_found_and_the_table(runs, capsys):
    assert call(["evaluate", str(runs["lora"]), "--examples", "0,2", "limit=5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [system["name"] for system in told["systems"]]
    assert names == ["base", "base, 2-shot", "lora"]
    plain, shown, tuned = told["systems"]
    assert shown["examples_shown"] == 2
    assert shown["prompt_tokens"] > 3 * plain["prompt_tokens"] == 3 * tuned["prompt_tokens"]
    rows = [json.loads(line) for line in (runs["lora"] / "evaluation/answers.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(set(row["answers"]) == set(names) for row in rows)
    mean = np.mean([row["answers"]["lora"]["scores"]["words"] for row in rows])
    assert tuned["scores"]["words"]["score"] == pytest.approx(mean, abs=1e-5)
    assert tuned["scores"]["words"]["low"] <= mean <= tuned["scores"]["words"]["high"]
    assert Path(told["report"]).exists()
    assert call(["evaluate", str(runs["lora"]), "metrics=[]", "examples=[0]"]) == 0
    text = capsys.readouterr().out
    assert "losses of 12 rows" in text
    assert f"{held_out_losses(runs['lora'])[1]:.4f}" in text


def test_an_adapter_by_its_folder_and_by_its_name(runs, tmp_path, capsys):
    registry = tmp_path / "registry"
    publish(str(runs["lora"] / "artefact"), str(registry), "default", "cheese")
    names = [str(runs["lora"] / "artefact"), "cheese"]
    assert call(["evaluate", *names, "--registry", str(registry), "metrics=[]", "--to", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    losses = [system["loss"] for system in told["systems"]]
    assert [system["name"] for system in told["systems"]] == ["base", "lora", "default/cheese"]
    assert losses[1] == losses[2] < losses[0]
    assert (tmp_path / "evaluation/result.json").exists()


def test_the_matrix_of_systems_and_tasks(runs, result, tmp_path, capsys):
    """Own losses are training's, scores those of an evaluation, and what was forgotten is the difference to the base
    on text that no run has seen."""
    general = tmp_path / "general.txt"
    general.write_text("The fox sat by the river.\nA girl had a red ball, and she gave it to her friend.\n")
    names = [str(runs["lora"]), str(runs["prefix"])]
    assert call(["evaluate", *names, "--matrix", "--general", str(general), "--to", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [system["name"] for system in told["systems"]] == ["base", "lora", "prefix"]
    assert [task["name"] for task in told["tasks"]] == ["lora", "general.txt"]  # both runs hold out the same rows
    losses, forgetting, scores = (np.array(told[key], float) for key in ("losses", "forgetting", "scores"))
    assert losses[:, 0] == pytest.approx([*held_out_losses(runs["lora"]), held_out_losses(runs["prefix"])[1]], rel=1e-4)
    assert forgetting[1] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert forgetting[1, 0] < 0
    assert np.isfinite(losses[:, 1]).all()
    assert losses[1, 1] != losses[0, 1]
    found = {outcome.system.name: outcome.measured["chrf"].score for outcome in result.outcomes}
    assert scores[:, 0] == pytest.approx([found["base"], found["lora"], found["prefix"]], abs=1e-5)
    assert np.isnan(scores[:, 1]).all()
    assert json.loads((tmp_path / "evaluation/matrix.json").read_text())["losses"] == told["losses"]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-thing"], "which registry?"),
        (["no/such/thing at all"], "no such folder, run file, recipe, adapter or endpoint"),
        (["https://example.org/v1"], "says what to ask"),
        (["RUN", "metrics=[blue]"], "did you mean 'bleu'?"),
        (["RUN", "decoding.beams=4", "decoding.temperature=1"], "beams search for the most probable"),
        (["limit=3"], "which system?"),
        (["EMPTY"], "neither a run, nor an adapter, nor a model"),
    ],
)
def test_what_is_wrong_is_said(arguments, words, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FTRAY_REGISTRY", raising=False)
    places = {"RUN": str(runs["lora"]), "EMPTY": str(tmp_path)}
    assert call(["evaluate", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_a_changed_artefact_is_refused(runs, tmp_path):
    import shutil

    shutil.copytree(runs["lora"], tmp_path / "run")
    (tmp_path / "run/artefact/README.md").write_text("changed")
    with pytest.raises(ArtefactError, match="changed since"), resolved([str(tmp_path / "run")]):
        pass


def test_an_adapter_of_another_base_is_refused(runs, tmp_path):
    """Its ftray.json names a digest that is not the base's."""
    import shutil

    shutil.copytree(runs["lora"] / "artefact", tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter/ftray.json").read_text())
    facts["base"]["sha256"] = "0" * 64
    (tmp_path / "adapter/ftray.json").write_text(json.dumps(facts))
    with resolved([str(tmp_path / "adapter")]) as systems:
        task = task_of(systems, settings=Evaluation(examples=[]))
        with pytest.raises(ArtefactError, match="not the base that it was trained on"):
            evaluate(systems, task, lambda event: None)


# ------------------------------------------------------------------------------------------------- questions, examples


def test_rows_that_ask_the_same_are_one_question(ftray_data):
    path = ftray_data / "data/e2e/testset_w_refs.csv"
    source = {"path": str(path), "format": {"name": "prompt_completion", "prompt": "{mr}", "completion": "{ref}"}}
    found = questions_of(read_rows(Evaluation.model_validate({"rows": [source]}).rows))
    assert len(found) == 630
    assert sum(len(question.references) for question in found) == 4693
    with path.open(encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert (found[0].asked.prompt, found[0].references[0]) == (first["mr"], first["ref"])


def test_similar_examples_share_words_and_never_ask_the_same():
    rows = [
        Asked(text, "a", None) for text in ("red wine of France", "blue cheese of France", "a cold day", "blue cheese")
    ]
    chosen = Examples(rows, 0, similar=True).of(Asked("blue cheese", "", None), 2)
    assert [row.prompt for row in chosen] == ["red wine of France", "blue cheese of France"]
    drawn = Examples(rows, 0, similar=False)
    assert drawn.of(rows[0], 2) == drawn.of(rows[0], 2)
    assert all(row.prompt != "blue cheese" for row in drawn.of(Asked("blue cheese", "", None), 9))


def test_held_out_rows_of_a_fraction_are_those_of_training(tmp_path):
    """As many, and the same, as preparing the data holds out (whose hash is of the same tokens)."""
    overrides = ["data.held_out=[]", "data.held_out_fraction=0.2", "train.evaluate_every=null"]
    run = load_run("quickstart-cheese", overrides)
    vocabulary = Vocabulary.of(load_tokenizer(run.model))
    train, held_out = split_rows(run, vocabulary)
    assert len(train) + len(held_out) == 300
    assert 35 <= len(held_out) <= 85
    from ftray.data.sources import files_of, fragments_of
    from ftray.data.work import Job, _Work

    job = Job(str(tmp_path), vocabulary, {"train": [run.data.sources[0].format]}, 256, "refuse", "off", run.seed,
              round(0.2 * 2**64))  # fmt: skip
    [fragment] = fragments_of(run.data.sources[0], files_of(run.data.sources[0]), 0, "train")
    work = _Work(0, fragment, job)
    assert work.run()["shards"]["held_out"]["rows"] == len(held_out)


def test_a_row_longer_than_the_positions_is_counted(runs):
    with resolved([str(runs["lora"])]) as systems:
        task = task_of(systems, settings=Evaluation(metrics=[]))
        long = Asked("x", "very long " * 1000, ({"role": "user", "content": "x"},))
        found = evaluate(systems, SimpleNamespace(**vars(task) | {"rows": [*task.rows, long]}), lambda e: None)
    assert [outcome.skipped_rows for outcome in found.outcomes] == [1, 1]
    assert found.outcomes[1].loss == pytest.approx(held_out_losses(runs["lora"])[1], rel=1e-4)


def test_many_passes_give_what_one_does(monkeypatch):
    base = load_base(Model(path="embedded"), quantized=False, dtype=torch.float32)
    rows = [LossRow(None, row.tokens, row.targets) for row in cheese_rows(9)]
    whole = row_losses(base, {}, rows)
    monkeypatch.setitem(__import__("ftray.evaluate.losses", fromlist=["PASS_TOKENS"]).PASS_TOKENS, "cpu", 40)
    assert row_losses(base, {}, rows) == pytest.approx(whole, rel=1e-5)


def test_rows_of_text_ask_nothing(tmp_path, runs):
    (tmp_path / "a.jsonl").write_text('{"text": "Cheese is milk\'s leap toward immortality."}\n')
    source = {"path": str(tmp_path / "a.jsonl"), "format": {"name": "text"}}
    with resolved([str(runs["lora"])]) as systems:
        settings = Evaluation.model_validate({"rows": [source]})
        found = evaluate(systems, task_of(systems, settings=settings), lambda event: None)
        assert found.outcomes[0].loss is not None
        asking = settings.model_copy(update={"metrics": ["words"]})
        with pytest.raises(ConfigError, match="ask nothing"):
            evaluate(systems, task_of(systems, settings=asking), lambda event: None)
