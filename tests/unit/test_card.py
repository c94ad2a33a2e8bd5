"""The model card: the hub reads its front matter, its code runs, and it tells nothing of the machine."""

from __future__ import annotations

import math
import re

import pytest
import yaml

from ftray.config import parse_run
from ftray.train.card import is_hub_name, model_card

RUN = """
name: cheese
model: {path: meta-llama/Llama-3.1-8B}
method: {name: qlora, rank: 8, targets: [q_proj, v_proj]}
data:
  sources:
    - path: s3://user:hunter2hunter2@bucket/private/cheese-*.jsonl
      format: {name: prompt_completion, prompt: "Describe: {mr}\\n`now` | ", completion: "{ref}"}
    - {path: /home/somebody/rows/chat.jsonl, format: messages}
    - {path: tatsu-lab/alpaca, reader: datasets, format: instruction}
  held_out_fraction: 0.05
train: {steps: 200}
logging: {mlflow: "https://user:hunter2hunter2@tracking.example"}
output: /home/somebody/runs/{name}
"""
SUMMARY = {"base_loss": 4.0, "best_loss": 0.9, "final_loss": 1.2, "steps": 200, "artefact_step": 150,
           "artefact_loss": 1.0, "trainable_parameters": 3_407_872}  # fmt: skip
FACTS = {"digest": "ab" * 32,
         "rows": {"train": 1234, "held_out": 65}, "target_tokens": {"train": 56_789, "held_out": 999}}  # fmt: skip


def _card(*overrides: str, summary=SUMMARY, facts=FACTS):
    from huggingface_hub import ModelCard

    text = model_card(parse_run(RUN, "cheese.yaml", overrides), summary, facts)
    return ModelCard(text)


def _code(card, language: str) -> str:
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", card.text, re.S | re.M)
    return block


def test_the_hub_reads_the_front_matter():
    data = _card().data
    assert data.base_model == "meta-llama/Llama-3.1-8B"
    assert data.library_name == "peft"
    assert data.tags == ["ftray", "qlora"]
    assert data.datasets == ["tatsu-lab/alpaca"]


def test_full_tuning_is_a_transformers_model():
    run = parse_run(RUN, "cheese.yaml", ["method={name: full}"])
    assert "library_name: transformers" in model_card(run, SUMMARY, FACTS)
    assert "peft" not in model_card(run, SUMMARY, FACTS)


def test_results_of_base_and_tuned():
    text = _card().text
    assert "| Loss, nats per target token | 4.0000 | 1.0000 | 0.250 |" in text
    assert f"| Perplexity | {math.exp(4):.4g} | 2.718 | 0.0498 |" in text
    assert "as of step 150 of 200" in text
    worse = _card(summary=SUMMARY | {"best_loss": 4.0, "artefact_loss": 4.5}).text
    assert "| 4.0000 | 4.5000 | 1.125 |" in worse, "the artefact's own loss, whatever was the best"


@pytest.mark.parametrize("summary", [{}, {"base_loss": None, "final_loss": float("nan"), "steps": 5}])
def test_without_held_out_rows_there_are_no_results(summary):
    card = _card(summary=summary, facts={})
    assert "## Results" not in card.text
    assert "nan" not in card.text.lower().split("```")[0]
    assert "ab" * 32 not in card.text


def test_data_and_hyperparameters():
    text = _card().text
    assert "| Training | 1,234 | 56,789 |" in text
    assert "`` Describe: {mr}⏎`now` |  ``" in text
    for row in ("| Rank | 8 |", "| Targets | `q_proj, v_proj` |", "| Trained parameters | 3,407,872 |"):
        assert row in text


def test_what_zero_divides_and_where_it_lies():
    assert "ZeRO" not in _card().text
    full = [
        "method={name: full}",
        "strategy={zero: 3, offload_optimizer: nvme, offload_parameters: cpu, nvme_path: /srv/n}",
    ]
    card = _card(*full)
    row = "| Divided by | DeepSpeed ZeRO 3: all states and weights; optimizer on NVMe; weights on the host |"
    assert row in card.text
    assert "/srv" not in card.content
    assert (
        "| Divided by | DeepSpeed ZeRO 1: optimizer states |" in _card("method={name: full}", "strategy={zero: 1}").text
    )


@pytest.mark.parametrize("path", ["/srv/models/tiny-llama", "s3://user:hunter2hunter2@bucket/models/tiny-llama/"])
def test_nothing_of_the_machine_is_told(path):
    card = _card(f"model.path={path}", "data.cache=/srv/cache", "data.chat_template=/srv/template.jinja")
    for secret in ("/srv", "/home", "somebody", "hunter2", "bucket", "tracking.example"):
        assert secret not in card.content
    assert "tiny-llama" in card.text
    assert card.data.base_model is None


def test_the_run_file_in_the_card_loads_and_says_the_same():
    again = parse_run(_code(_card(), "yaml"), "card")
    run = parse_run(RUN, "cheese.yaml")
    assert (again.method, again.train, again.model, again.seed) == (run.method, run.train, run.model, run.seed)
    assert [s.path for s in again.data.sources] == ["cheese-*.jsonl", "chat.jsonl", "tatsu-lab/alpaca"]
    assert [s.format for s in again.data.sources] == [s.format for s in run.data.sources]


def test_front_matter_survives_any_name():
    front = _card("model.path='owner/name-with.dots'", "model.revision='it''s: \"odd\"'").content.split("---")[1]
    assert yaml.safe_load(front)["base_model"] == "owner/name-with.dots"


def test_a_folder_here_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert is_hub_name("models/llama")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("models/llama")
    assert not any(map(is_hub_name, ("./llama", "/models/llama", "llama", "s3://a/b", "a/b/c")))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_loading_code_runs_and_gives_the_adapters_logits(tmp_path, monkeypatch, method):
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, num_key_value_heads=2))
    base.save_pretrained(tmp_path / "tiny-llama")
    from tokenizers import Tokenizer, models

    vocabulary = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path / "tiny-llama")
    tuned = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "artefact")
    overrides = [f"model.path={tmp_path}/tiny-llama", f"method.name={method}", "train.precision=fp32"]
    run = parse_run(RUN, "cheese.yaml", overrides)
    (tmp_path / "artefact" / "README.md").write_text(model_card(run, SUMMARY, FACTS))
    [code] = re.findall(r"^```python\n(.*?)^```$", (tmp_path / "artefact" / "README.md").read_text(), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace('folder = "."', 'folder = "artefact"'), names)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        got, want = names["model"](ids).logits, tuned(ids).logits
        with tuned.disable_adapter():
            bare = tuned(ids).logits
    effect = (want - bare).norm()
    assert (got - want).norm() < (1e-5 if method == "lora" else 0.25) * effect  # NF4 is not exact
    assert names["tokenizer"]("b").input_ids == [1]
