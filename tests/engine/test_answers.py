"""Many adapters of every method in one batch give what PEFT and `generate` give one at a time on the same base."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from ftray.config import Model
from ftray.engine.engine import Engine, load_base
from ftray.engine.options import EngineOptions
from ftray.engine.request import Chunk, Finished, Request, Sampling
from ftray.model import bottleneck, load
from ftray.model.load import evaluating
from ftray.registry.ref import Ref

EMBEDDED = Model(path="embedded")
PROMPTS = (
    "What is a good cheese for a picnic?",
    "Bless the cheese, my friend.",
    "name[The Eagle], food[French]",
    "A",
    "Once there was a farmer who had a cat, and the cat had a farmer. " * 4,
)
NEW = 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def base(request):
    nf4 = request.param == "nf4"
    return load_base(EMBEDDED, quantized=nf4, dtype=torch.bfloat16 if nf4 else torch.float32)


@pytest.fixture
def new_engine(base, artefacts):
    """Engines over the artefacts, one at a time."""
    made: list[Engine] = []

    def new(**options: Any) -> Engine:
        if made:
            made[-1].close()
        options = {"slots": 16, "context": 256} | options
        made.append(Engine(base, lambda ref: base.read(artefacts[ref.name]), EngineOptions(**options)))
        return made[-1]

    yield new
    made[-1].close()


@pytest.fixture(scope="module")
def oracle(base, artefacts):
    """(adapter, tokens) → what PEFT alone generates, and the logits it chose from; each asked once."""
    models: dict[str | None, Any] = {}
    answers: dict[Any, Any] = {}

    def model_of(name: str | None) -> Any:
        options: dict[str, Any] = {"dtype": base.model.dtype}
        if base.model.dtype == torch.bfloat16:
            head, others = load.misfits(AutoConfig.from_pretrained(base.folder))
            options["quantization_config"] = load._nf4(True, torch.bfloat16, [head, *others])
        model = AutoModelForCausalLM.from_pretrained(base.folder, **options)
        if name is None:
            return model
        if (artefacts[name] / "adapter_config.json").read_text().count("FTRAY_BOTTLENECK"):
            return bottleneck.load(model, artefacts[name])
        model = PeftModel.from_pretrained(model, artefacts[name])
        return model

    def ask(name: str | None, prompt: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
        if name not in models:
            models[name] = model_of(name)
        if (name, prompt) not in answers:
            ids = torch.tensor([prompt])
            # PEFT's IA3 on NF4 makes keys of fp32, which attention refuses beside bf16 queries; autocast casts them
            mended = torch.autocast("cpu", torch.bfloat16, enabled=name == "ia3" and base.model.dtype == torch.bfloat16)
            with mended, evaluating(models[name]):  # NF4 stays as it is on the disk: PEFT's DoRA reads it
                out = models[name].generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            answers[name, prompt] = out.sequences[0, -NEW:].tolist(), torch.cat(out.logits).float()
        return answers[name, prompt]

    return ask


def requests_of(base, names, count: int, tenant: str = "t") -> list[Request]:
    made = []
    for i in range(count):
        name = names[i % len(names)]
        prompt = tuple(base.tokenizer(PROMPTS[i % len(PROMPTS)]).input_ids)
        ref = Ref("t", name, name) if name else None
        made.append(Request(f"{tenant}{i}", prompt, Sampling(NEW, temperature=0, ignore_end=True), ref, tenant))
    return made


def drive(engine: Engine, arriving: dict[int, list[Request]], cancelling: dict[int, str] | None = None):
    """Run until all that arrive (by step) have ended. Returns (tokens by id, last events by id)."""
    tokens: dict[str, list[int]] = {}
    last: dict[str, Finished] = {}
    step = 0
    while engine.in_flight() or step <= max(arriving):
        for request in arriving.get(step, []):
            tokens[request.id] = []
            engine.add(request)
        if cancelling and step in cancelling:
            engine.cancel(cancelling[step])
        engine.wait(0.01)
        for event in engine.step():
            if isinstance(event, Chunk):
                tokens[event.id] += event.tokens
            else:
                assert event.id not in last
                last[event.id] = event
        step += 1
    return tokens, last


def check(request: Request, tokens: list[int], oracle) -> None:
    expected, logits = oracle(request.adapter.name if request.adapter else None, request.prompt)
    for place, (ours, theirs) in enumerate(zip(tokens, expected, strict=False)):
        if ours != theirs:
            # In bf16, with 8 bits, two tokens may as good as tie. Both wrote the same before, and differ from here on.
            row = logits[place]
            assert float(row.max() - row[ours]) <= 2**-5 * float(row.abs().max()), (request.adapter, place)
            return


def test_32_requests_of_16_kinds_at_once(base, artefacts, new_engine, oracle):
    engine = new_engine(slots=32)
    requests = requests_of(base, [None, *artefacts], 32)
    tokens, last = drive(engine, {0: requests})
    for request in requests:
        assert last[request.id].error is None
        assert last[request.id].reason == "length"
        assert len(tokens[request.id]) == NEW
        check(request, tokens[request.id], oracle)
    if base.model.dtype == torch.float32:  # nothing ties there
        for request in requests:
            assert tokens[request.id] == oracle(request.adapter and request.adapter.name, request.prompt)[0]
    different = {tuple(tokens[r.id]) for r in requests if r.prompt == requests[0].prompt}
    assert len(different) > 3, "the adapters do something"


@pytest.mark.parametrize("reuse", [True, False])
def test_joins_leaves_and_pieces_of_prompts(base, artefacts, new_engine, oracle, reuse):
    """Few slots, small steps, arrivals and cancellations spread over the steps: every answer is still its own."""
    engine = new_engine(slots=6, step_tokens=14, prompt_tokens=20, adapters=4, reuse_prefixes=reuse)
    rng = random.Random(7)
    arriving: dict[int, list[Request]] = {}
    requests = [*requests_of(base, [None, *artefacts], 32), *requests_of(base, [None, *artefacts], 16, "u")]
    requests += requests_of(base, ["lora", "dora"], 20, "v")  # some begin alike
    for request in requests:
        arriving.setdefault(rng.randrange(120), []).append(request)
    cancelling = {rng.randrange(150): request.id for request in rng.sample(requests, 8)}
    tokens, last = drive(engine, arriving, cancelling)
    assert last.keys() == tokens.keys() == {r.id for r in requests}
    for request in requests:
        assert last[request.id].reason in ("length", "cancelled")
        check(request, tokens[request.id], oracle)
    [*_, ended] = (request for id in last for request in requests if request.id == id and last[id].reason == "length")
    again = drive(engine, {0: [replace(ended, id="again")]})[1]["again"]
    assert (again.usage.cached_tokens > 0) == reuse, "its slot was given to nobody since"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.adapter_users) == (0, 0, 0)
    assert reuse or not stats.cached_tokens
    assert len(engine._table.free) == 6


def test_a_second_turn_reads_only_what_is_new(base, new_engine):
    engine = new_engine()
    first = requests_of(base, ["lora"], 1)[0]
    tokens, _ = drive(engine, {0: [first]})
    more = Request("more", (*first.prompt, *tokens[first.id], 9, 10), first.sampling, first.adapter, first.tenant)
    _, last = drive(engine, {0: [more]})
    assert last["more"].usage.cached_tokens == len(first.prompt) + NEW - 1  # the last token never went through the base
    again = drive(engine, {0: [more]})[0]
    fresh = new_engine(reuse_prefixes=False)
    assert drive(fresh, {0: [more]})[0] == again


@pytest.mark.parametrize(
    ("tenant", "adapter", "shared"),
    [("t", "lora", True), ("u", "lora", False), ("t", "dora", False), ("t", None, False)],
)
def test_keys_and_values_are_shared_by_one_tenant_and_adapter_alone(base, new_engine, tenant, adapter, shared):
    engine = new_engine()
    first = requests_of(base, ["lora"], 5)[4]
    ref = Ref("t", adapter, adapter) if adapter else None
    second = Request("second", first.prompt, first.sampling, ref, tenant)
    _, last = drive(engine, {0: [first], 3: [second]})
    assert (last["second"].usage.cached_tokens > 0) == shared
