# ruff: noqa: E501 - one frame or table row a line reads better than broken ones
"""Sentences from a small grammar: noun phrases, verb phrases with tense and agreement, clauses, questions, passages."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ftray.embedded.text import words as w

_ONSETS = w._words("b br c ch d dr f fl g gr h j k kr l m n p pr qu r s sh st t th tr v w z")
_NUCLEI = w._words("a e i o u ai ea ee ia oa ou")
_CODAS = w._words("b ck d l ll lm m n nd nt r rd rn s sk st t th x")


@dataclass(frozen=True)
class Person:
    name: str
    she: str
    her: str
    """The possessive: her, his."""
    obj: str
    """The object: her, him."""


def person(r: Random, taken: tuple[str, ...] = ()) -> Person:
    """Someone with a first name that is not in `taken`."""
    while True:
        if r.random() < 0.08:
            name, woman = made_up(r), r.random() < 0.5
        else:
            woman = r.random() < 0.5
            name = r.choice(w.WOMEN if woman else w.MEN)
        if name not in taken:
            return Person(name, "she", "her", "her") if woman else Person(name, "he", "his", "him")


def people(r: Random, n: int) -> list[Person]:
    found: list[Person] = []
    while len(found) < n:
        found.append(person(r, tuple(p.name for p in found)))
    return found


def made_up(r: Random) -> str:
    """A name that no list holds, so that the model learns to copy rather than to recall."""
    syllables = [r.choice(_ONSETS) + r.choice(_NUCLEI) for _ in range(r.randint(1, 2))]
    return w.capital("".join(syllables) + r.choice(_CODAS))


def full_name(r: Random) -> str:
    return f"{person(r).name} {r.choice(w.SURNAMES) if r.random() < 0.85 else made_up(r)}"


def town(r: Random) -> str:
    return r.choice(w.TOWNS) if r.random() < 0.8 else made_up(r) + r.choice(("ford", "ton", "ham", "wick", ""))


def place(r: Random) -> str:
    roll = r.random()
    if roll < 0.6:
        return r.choice(w.SPOTS)
    return f"the {r.choice(w.ROOMS)}" if roll < 0.85 else town(r)


def food(r: Random) -> str:
    return (
        r.choice(w.DISHES) if r.random() < 0.5 else r.choice(w.STAPLES + tuple(map(w.plural, w.FRUITS + w.VEGETABLES)))
    )


def thing(r: Random, adjectives: float = 0.4) -> str:
    """A thing without its article: `old lamp`, `small green box`."""
    parts = []
    if r.random() < adjectives:
        parts.append(r.choice(w.THING_ADJ))
    if r.random() < adjectives / 2:
        parts.append(r.choice(w.COLOURS + w.MATERIAL_ADJ))
    return " ".join([*parts, r.choice(w.THINGS)])


def someone(r: Random) -> tuple[str, bool]:
    """A subject and whether it is plural."""
    roll = r.random()
    if roll < 0.3:
        return person(r).name, False
    if roll < 0.38:
        a, b = people(r, 2)
        return f"{a.name} and {b.name}", True
    if roll < 0.62:
        noun, adj = r.choice(w.JOBS)[0], (r.choice(w.PERSON_ADJ) + " ") * (r.random() < 0.4)
        return (f"the {adj}{noun}", False) if r.random() < 0.75 else (f"the {adj}{w.plural(noun)}", True)
    if roll < 0.75:
        noun, adj = r.choice(w.PETS + w.WILD), r.choice(("", "", "old ", "little ", "brown ", "white ", "hungry "))
        return (
            (f"the {adj}{noun}", False)
            if r.random() < 0.7
            else (f"{r.choice(('the', 'two', 'three'))} {w.plural(noun)}", True)
        )
    if roll < 0.87:
        return r.choice((("I", True), ("we", True), ("they", True), ("you", True), ("she", False), ("he", False)))
    kin = r.choice(
        w._words(
            "mother father sister brother uncle aunt neighbour friend teacher cousin grandfather grandmother son daughter"
        )
    )
    return f"{r.choice(('my', 'your', 'her', 'his', 'our', 'their'))} {kin}", False


def object_of(r: Random) -> str:
    roll = r.random()
    if roll < 0.4:
        return w.article(thing(r))
    if roll < 0.7:
        return f"{r.choice(('the', 'the', 'my', 'her', 'his', 'our', 'this', 'that'))} {thing(r)}"
    if roll < 0.85:
        return (
            f"{r.choice(('two', 'three', 'some', 'many', 'five', 'the', 'a few', 'all the'))} {w.plural(thing(r, 0.3))}"
        )
    return f"{r.choice(('a piece of', 'a bit of', 'some'))} {r.choice(w.STAPLES)}"


def verb_phrase(r: Random) -> tuple[str, str]:
    """A bare verb and what follows it."""
    roll = r.random()
    if roll < 0.22:
        return r.choice(w.VERBS_MOTION), f"to {place(r)}"
    if roll < 0.36:
        tail = r.choice(
            (f"in {place(r)}", f"near {place(r)}", r.choice(w.ADVERBS), "", "for hours", "all day", "with a friend")
        )
        return r.choice(w.VERBS_ALONE), tail
    if roll < 0.58:
        return r.choice(w.VERBS_THING), object_of(r)
    if roll < 0.68:
        return r.choice(w.VERBS_FOOD), food(r)
    if roll < 0.8:
        other = person(r).name if r.random() < 0.5 else f"the {r.choice(w.JOBS)[0]}"
        return r.choice(w.VERBS_PERSON), other
    if roll < 0.9:
        return r.choice(w.VERBS_GIVE), f"{person(r).name} {w.article(thing(r))}"
    if roll < 0.95:
        return (
            "put",
            f"{r.choice(('the', 'a', 'her', 'his'))} {thing(r, 0.2)} {r.choice(('in', 'under', 'behind', 'next to'))} {r.choice(w.CONTAINERS)}",
        )
    return "feel", r.choice(w.FEELINGS)


def conjugate(verb: str, tense: str, plural: bool, first: bool = False) -> str:
    """`verb` for a subject; tenses: past, present, future, progressive, perfect, negative, modal words such as `can`."""
    was, has = ("were" if plural and not first else "was"), ("have" if plural else "has")
    forms = {
        "past": lambda: w.past(verb),
        "present": lambda: verb if plural else w.third(verb),
        "future": lambda: f"will {verb}",
        "progressive": lambda: f"{was} {w.gerund(verb)}",
        "perfect": lambda: f"{has} {w.participle(verb)}",
        "negative": lambda: f"did not {verb}",
        "never": lambda: f"never {w.past(verb)}",
    }
    return forms[tense]() if tense in forms else f"{tense} {verb}"


_TENSES = (
    ("past",) * 9
    + ("present",) * 4
    + (
        "future",
        "progressive",
        "perfect",
        "negative",
        "never",
        "can",
        "must",
        "should",
        "would",
        "wanted to",
        "tried to",
    )
)


def clause(r: Random, tense: str | None = None) -> str:
    """Subject, verb and rest, in lower case and without a full stop."""
    subject, plural = someone(r)
    verb, rest = verb_phrase(r)
    text = f"{subject} {conjugate(verb, tense or r.choice(_TENSES), plural, subject == 'I')}"
    return f"{text} {rest}".rstrip()


def sentence(r: Random) -> str:
    roll = r.random()
    if roll < 0.45:
        text = clause(r)
        if r.random() < 0.35:
            text += f" {r.choice(w.TIMES)}"
    elif roll < 0.55:
        text = f"{r.choice(w.TIMES)}, {clause(r, 'past')}"
    elif roll < 0.7:
        text = f"{clause(r, 'past')} {r.choice(('because', 'when', 'while', 'after', 'before', 'until', 'although'))} {clause(r, 'past')}"
    elif roll < 0.8:
        text = f"{clause(r, 'past')}{r.choice((', and', ', but', ', so', ', and then'))} {clause(r, 'past')}"
    elif roll < 0.85:
        text = f"{r.choice(('if', 'when'))} {clause(r, 'present')}, {clause(r, 'future')}"
    elif roll < 0.92:
        text = _there_is(r)
    else:
        text = _is_sentence(r)
    return w.capital(text) + "."


def _there_is(r: Random) -> str:
    n = r.choice((1, 1, 2, 3, 4, 5, 7, 10))
    noun = thing(r)
    what = f"is {w.article(noun)}" if n == 1 else f"are {w.spelled(n)} {w.plural(noun)}"
    return f"there {what} {r.choice(('in', 'near', 'behind', 'in front of'))} {place(r)}"


def _is_sentence(r: Random) -> str:
    return r.choice((
        f"the {r.choice(w.THINGS)} is {r.choice(w.THING_ADJ)} and {r.choice(w.COLOURS)}",
        f"{person(r).name} is {w.article(r.choice(w.PERSON_ADJ))} {r.choice(w.JOBS)[0]} from {town(r)}",
        f"the weather in {town(r)} was {r.choice(w.WEATHER)} {r.choice(w.TIMES)}",
        f"{w.article(r.choice(w.THINGS))} is not {w.article(r.choice(w.THINGS))}",
        f"this {r.choice(w.THINGS)} belongs to {person(r).name}",
        f"the {r.choice(w.THINGS)} was {w.participle(r.choice(w.VERBS_THING))} by {person(r).name}",
        f"{place(r)} is {r.choice(('far from', 'close to', 'behind', 'north of', 'south of', 'next to'))} {place(r)}",
    ))  # fmt: skip


def question(r: Random) -> str:
    subject, _ = someone(r)
    verb, rest = verb_phrase(r)
    asks = (
        f"did {subject} {verb} {rest}", f"why did {subject} {verb} {rest}", f"when will {subject} {verb} {rest}",
        f"can {subject} {verb} {rest}", f"how did {subject} {verb} {rest}", f"who {w.past(verb)} {rest}",
        f"where is the {thing(r)}", f"what is in {r.choice(w.CONTAINERS)}", f"how many {w.plural(thing(r))} are there",
        f"would you like some {r.choice(w.STAPLES)}", f"what time is it in {town(r)}",
    )  # fmt: skip
    return w.capital(r.choice(asks).rstrip()) + "?"


def passage(r: Random, n: int | None = None) -> str:
    """One person over several sentences, by name at first, by pronoun afterwards."""
    who = person(r)
    tense = r.choice(("past", "past", "present"))
    first, rest = verb_phrase(r)
    said = [f"{who.name} {conjugate(first, tense, False)} {rest}".rstrip()]
    for _ in range((n or r.randint(2, 5)) - 1):
        verb, rest = verb_phrase(r)
        lead = r.choice(("", "", "", "then ", "later ", "after that, ", "at last ", "soon "))
        subject = who.she if r.random() < 0.8 else who.name
        said.append(f"{lead}{subject} {conjugate(verb, tense, False)} {rest}".rstrip())
    return " ".join(w.capital(text) + "." for text in said)


def listed(items: list[str] | tuple[str, ...], last: str = "and") -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
