"""Write the text that the embedded base is pretrained on: JSONL rows of `{"text": …}`.

    python -m ftray.embedded.make_text OUT.jsonl --rows 120000 --seed 0

Every word comes from the grammars in `ftray.embedded.text`; nothing is read from elsewhere. Row i depends on the seed
and on i alone. About half of the rows are prose, half are tasks, most of these in the chat template of the embedded
tokenizer (`ftray.embedded.make_tokenizer`), the others as few-shot lists.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from ftray.embedded.text import stories, tasks
from ftray.embedded.text import words as w
from ftray.embedded.text.sentences import listed, made_up, passage, person, question, sentence, thing, town

SYSTEM_SHORT = (
    "Answer in as few words as you can.",
    "Be brief.",
    "Give short answers.",
    "Answer with one word if possible.",
)
SYSTEM_FULL = ("Answer in full sentences.", "You are a helpful assistant.", "You are polite.", "Help the user.")


def chat(r: Random) -> str:
    """One to three turns in the chat template, with or without a system prompt; the last turn's end is the row's."""
    roll, parts = r.random(), []
    short = roll < 0.2 or (roll > 0.4 and r.random() < 0.25)
    if roll < 0.4:
        parts.append(f"<|system|>{r.choice(SYSTEM_SHORT if short else SYSTEM_FULL)}<|end|>")
    for _ in range(r.choice((1, 1, 1, 1, 2, 2, 3))):
        ask, brief, full = draw_task(r)
        parts.append(f"<|user|>{ask}<|end|><|assistant|>{brief if short else full}<|end|>")
    return "".join(parts)


def memory(r: Random) -> str:
    """Two or three turns, of which the last asks for something that the user said in the first."""
    who, home, x = person(r).name, town(r), thing(r, 0.5)
    told, ask, answer = r.choice((
        (f"My name is {who}.", "What is my name?", f"Your name is {who}."),
        (f"I live in {home}.", "Where do I live?", f"You live in {home}."),
        (f"My favourite thing is my {x}.", "What is my favourite thing?", f"Your favourite thing is your {x}."),
        (f"I will call you {who}.", "What is your name?", f"You call me {who}."),
        (f"Remember this word: {x}.", "Which word did I give you?", f"The word is {x}."),
    ))  # fmt: skip
    reply = r.choice(("Thank you for telling me.", "I will remember that.", "Good to know."))
    parts = [f"<|user|>{told}<|end|><|assistant|>{reply}<|end|>"]
    if r.random() < 0.5:
        between, _, full = draw_task(r)
        parts.append(f"<|user|>{between}<|end|><|assistant|>{full}<|end|>")
    return "".join([*parts, f"<|user|>{ask}<|end|><|assistant|>{answer}<|end|>"])


def few_shot(r: Random) -> str:
    """The same kind of task several times, as a plain list: what a pattern in the prompt is."""
    task = _pick(r, tasks.TASKS)
    ask, answer = r.choice((("Q: ", "A: "), ("Question: ", "Answer: "), ("Input: ", "Output: "), ("> ", "")))
    rows = []
    for _ in range(r.randint(2, 5)):
        question_, brief, _ = task(r)
        if len(brief) < 80:
            rows.append(f"{ask}{question_}\n{answer}{brief}")
    return "\n".join(rows) if rows else sentence(r)


def pairs(r: Random) -> str:
    table = r.choice(
        (w.OPPOSITES, w.CAPITALS, w.ANIMALS, w.COLOUR_OF, w.SYNONYMS, w.TASTES, w.MATERIALS, w.ANIMAL_HOMES)
    )
    sign = r.choice((" - ", ": ", " -> ", " = ", " / "))
    return r.choice(("\n", ", ", "; ")).join(sign.join(pair) for pair in r.sample(table, r.randint(3, 7)))


def facts(r: Random) -> str:
    made = [f"{fact}." for fact in r.sample(w.FACTS, 2)]
    kinds = (tasks.capital, tasks.definition, tasks.job, tasks.use, tasks.nature, tasks.continent)
    made += [task(r)[2] for task in r.sample(kinds, 2)]
    r.shuffle(made)
    return " ".join(made[: r.randint(2, 4)])


def word_list(r: Random) -> str:
    pool, name = r.choice(WORD_LISTS)
    items = r.sample(pool, r.randint(4, 8))
    lines = "\n".join(f"- {i}" for i in items)
    forms = (f"{name}: {', '.join(items)}.", f"{name}:\n{lines}", f"{name} are {listed(items)}.")
    return r.choice(forms)


WORD_LISTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (w.FRUITS, "Fruits"),
    (w.VEGETABLES, "Vegetables"),
    (w.PETS + w.WILD, "Animals"),
    (w.THINGS, "Things"),
    (w.COLOURS, "Colours"),
    (tuple(a for a, _ in w.JOBS), "Jobs"),
    (w.SPORTS, "Sports"),
    (w.DISHES, "Dishes"),
    (w.TOWNS, "Towns"),
    (w.COMMON, "Words"),
)


def loose(r: Random) -> str:
    return " ".join(question(r) if r.random() < 0.15 else sentence(r) for _ in range(r.randint(2, 5)))


def common(r: Random) -> str:
    """Frequent English words in loose company, so that the tokenizer and the base have met them all."""
    a, b, c = r.sample(w.COMMON, 3)
    frames = (
        f"The word {a} stands before the word {b}, and {c} comes last.", f"We speak about {a}, {b} and {c}.",
        f"{w.capital(a)}, {b}, {c}: three words.", f"In this text you find the words {a} and {b}, but not {c}.",
    )  # fmt: skip
    return f"{r.choice(frames)} {sentence(r)}"


def repeats(r: Random) -> str:
    """A line of unrelated words, then the same again: nothing but copying predicts the second half."""
    items = _unrelated(r, r.randint(3, 9))
    between, after = r.choice((" ", ", ", "; ", " / ", " - ")), r.choice((" ", "\n", ". ", " | "))
    return after.join([between.join(items)] * r.choice((2, 2, 3, 4)))


def recall(r: Random) -> str:
    """Pairs of unrelated words, then some of them again, in another order."""
    n = r.randint(2, 5)
    items = _unrelated(r, 2 * n)
    sign, end = r.choice((" = ", ": ", " -> ", " is ", "[")), r.choice((", ", "; ", "\n", ". "))
    close = "]" if sign == "[" else ""
    told = [f"{a}{sign}{b}{close}" for a, b in zip(items[:n], items[n:], strict=True)]
    again = [r.choice(told) for _ in range(r.randint(2, 5))]
    return end.join(told + again)


def _unrelated(r: Random, n: int) -> list[str]:
    pools = (w.COMMON, w.COMMON, w.THINGS, w.WOMEN, w.MEN, w.SURNAMES, w.TOWNS)
    return [made_up(r) if r.random() < 0.35 else r.choice(r.choice(pools)) for _ in range(n)]


def copying_chat(r: Random) -> str:
    """One or two turns whose answers stand in their questions."""
    parts = []
    for _ in range(r.choice((1, 1, 2))):
        ask, _, full = _pick(r, COPYING_TASKS)(r)
        parts.append(f"<|user|>{ask}<|end|><|assistant|>{full}<|end|>")
    return "".join(parts)


COPYING_TASKS = (
    (tasks.copy, 4),
    (tasks.describe, 4),
    (tasks.transform, 2),
    (tasks.about_person, 2),
    (tasks.about_thing, 2),
    (tasks.extract, 2),
    (tasks.where_is, 2),
    (tasks.intent, 2),
)


def draw_task(r: Random) -> tasks.Task:
    return _pick(r, tasks.TASKS)(r)


DOCUMENTS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (chat, 44),
    (memory, 2),
    (few_shot, 5),
    (pairs, 1.5),
    (facts, 3),
    (word_list, 1.5),
    (common, 2),
    (loose, 9),
    (passage, 6),
    (stories.story, 11),
    (stories.describe_person, 3.5),
    (stories.describe_place, 3),
    (stories.describe_shop, 2.5),
    (stories.record, 2),
    (stories.letter, 2),
    (stories.diary, 1),
    (stories.notice, 1.5),
    (stories.recipe, 1),
    (stories.weather_report, 0.5),
    (stories.talk, 2),
)
"""Kinds of row and their weights."""
COPYING = (*DOCUMENTS, (repeats, 40), (recall, 25), (copying_chat, 35))
"""The same, and as much again that only copying predicts."""


def _pick(r: Random, table: Sequence[tuple[Callable[[Random], Any], float]]) -> Callable[[Random], Any]:
    return r.choices([f for f, _ in table], [weight for _, weight in table])[0]


def row(seed: int, i: int, *, copying: bool = False) -> str:
    """The text of row `i`."""
    r = Random(f"{seed}:{i}")
    return _pick(r, COPYING if copying else DOCUMENTS)(r)


def write(out: Path, rows: int, seed: int, *, copying: bool = False) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"text": row(seed, i, copying=copying)}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--rows", type=int, default=120_000, help="rows to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other rows (default: %(default)s)")
    parser.add_argument("--copying", action="store_true", help="half of the rows ask for copying from the context")
    arguments = parser.parse_args()
    write(arguments.out, arguments.rows, arguments.seed, copying=arguments.copying)


if __name__ == "__main__":
    main()
