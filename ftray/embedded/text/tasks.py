# ruff: noqa: E501 - one frame or table row a line reads better than broken ones
"""Things to ask: facts, numbers, short stories with a question, copying and transforming, labels and slots.

A task is `(question, short answer, full answer)`. The chat template, a few-shot list or plain prose is put around it by
`ftray.embedded.make_text`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from ftray.embedded.text import words as w
from ftray.embedded.text.sentences import (
    clause,
    food,
    full_name,
    listed,
    made_up,
    passage,
    people,
    person,
    place,
    sentence,
    thing,
    town,
)  # fmt: skip
from ftray.embedded.text.stories import story

Task = tuple[str, str, str]


# ---------------------------------------------------------------------------------------------------------- knowledge


def _from(r: Random, pairs: tuple[tuple[str, str], ...], asks: tuple[str, ...], full: str) -> Task:
    a, b = r.choice(pairs)
    fill = {"a": a, "b": b, "A": w.capital(a), "an": w.article(a), "An": w.capital(w.article(a)), "bs": b}
    return r.choice(asks).format(**fill), b, full.format(**fill)


def capital(r: Random) -> Task:
    asks = (
        "What is the capital of {a}?",
        "Name the capital of {a}.",
        "Which city is the capital of {a}?",
        "Capital of {a}?",
    )
    return _from(r, w.CAPITALS, asks, "The capital of {a} is {b}.")


def country(r: Random) -> Task:
    a, b = r.choice(w.CAPITALS)
    return r.choice((f"Which country has the capital {b}?", f"In which country is {b}?")), a, f"{b} is in {a}."


def continent(r: Random) -> Task:
    name, members = r.choice(list(w.CONTINENT.items()))
    a = r.choice(members)
    return r.choice((f"Where is {a}?", f"On which continent is {a}?")), name, f"{w.capital(a)} is in {name}."


def opposite(r: Random) -> Task:
    pair = r.choice(w.OPPOSITES)
    a, b = pair if r.random() < 0.5 else pair[::-1]
    asks = (f"What is the opposite of {a}?", f"Opposite of {a}?", f'Give the opposite of "{a}".')
    return r.choice(asks), b, f"The opposite of {a} is {b}."


def synonym(r: Random) -> Task:
    return _from(
        r,
        w.SYNONYMS,
        ("What is another word for {a}?", "Which word means the same as {a}?"),
        "Another word for {a} is {b}.",
    )


def definition(r: Random) -> Task:
    a, b = r.choice(w.DEFINITIONS)
    if r.random() < 0.3:
        return f"What do we call {b}?", a, f"We call it {w.article(a)}."
    return (
        r.choice((f"What is {w.article(a)}?", f"Explain the word {a}.", f"What does {a} mean?")),
        b,
        f"{w.capital(w.article(a))} is {b}.",
    )


def job(r: Random) -> Task:
    a, b = r.choice(w.JOBS)
    if r.random() < 0.4:
        return f"Who {b}?", w.article(a), f"{w.capital(w.article(a))} {b}."
    return f"What does {w.article(a)} do?", b, f"{w.capital(w.article(a))} {b}."


def use(r: Random) -> Task:
    a, b = r.choice(w.USES)
    if r.random() < 0.5:
        return f"What do I need to {b}?", w.article(a), f"You need {w.article(a)} to {b}."
    return f"What is {w.article(a)} for?", f"to {b}", f"With {w.article(a)} you can {b}."


def nature(r: Random) -> Task:
    return r.choice((
        lambda: _from(r, w.ANIMALS, ("What sound does {an} make?", "What does {an} do?"), "{An} {b}."),
        lambda: _from(r, w.ANIMAL_HOMES, ("Where does {an} live?", "What is the home of {an}?"), "The home of {an} is the {b}."),
        lambda: _from(r, w.TASTES, ("How does {a} taste?", "What is the taste of {a}?"), "{A} tastes {b}."),
        lambda: _from(r, w.COLOUR_OF, ("What colour is {a}?", "Which colour has {a}?"), "The colour of {a} is {b}."),
        lambda: _from(r, w.MATERIALS, ("What is {an} made of?", "Which material is {an} made of?"), "{An} is often made of {b}."),
    ))()  # fmt: skip


def calendar(r: Random) -> Task:
    names, what = r.choice(((w.DAYS, "day"), (w.MONTHS, "month")))
    i = r.randrange(len(names))
    after = r.random() < 0.6
    j = (i + (1 if after else -1)) % len(names)
    side = "after" if after else "before"
    asks = (f"Which {what} comes {side} {names[i]}?", f"What {what} is {side} {names[i]}?")
    return r.choice(asks), names[j], f"{names[j]} comes {side} {names[i]}."


_KINDS: dict[str, tuple[str, ...]] = {
    "fruit": w.FRUITS, "vegetable": w.VEGETABLES, "animal": w.PETS + w.WILD, "colour": w.COLOURS[:12], "month": w.MONTHS,
    "day": w.DAYS, "job": tuple(a for a, _ in w.JOBS), "sport": w.SPORTS, "tool": tuple(w._words("hammer saw axe shovel rake broom ladder")),
    "drink": w.DRINKS,
}  # fmt: skip


def which_kind(r: Random) -> Task:
    kind, other = r.sample(list(_KINDS), 2)
    x = r.choice(_KINDS[kind])
    roll = r.random()
    if roll < 0.4:
        others = r.sample(_KINDS[other], 2)
        options = [x, *others]
        r.shuffle(options)
        return (
            f"Which of these is {w.article(kind)}: {listed(options, 'or')}?",
            x,
            f"{w.capital(x)} is {w.article(kind)}.",
        )
    if roll < 0.7:
        a = kind if r.random() < 0.5 else other
        yes = a == kind
        return (
            f"Is {x} {w.article(a)}?",
            "yes" if yes else "no",
            f"{'Yes' if yes else 'No'}, {x} is {'' if yes else 'not '}{w.article(a)}.",
        )
    n = r.randint(2, 5)
    some = r.sample(_KINDS[kind], n)
    return (
        f"Name {w.spelled(n)} {w.plural(kind)}.",
        ", ".join(some),
        f"{w.spelled(n).capitalize()} {w.plural(kind)} are {listed(some)}.",
    )


def odd_one(r: Random) -> Task:
    kind, other = r.sample(list(_KINDS), 2)
    x, rest = r.choice(_KINDS[other]), r.sample(_KINDS[kind], 3)
    options = [x, *rest]
    r.shuffle(options)
    return (
        f"Which word does not belong: {', '.join(options)}?",
        x,
        f"{w.capital(x)} does not belong; the others are {w.plural(kind)}.",
    )


# ------------------------------------------------------------------------------------------------------------ numbers


def arithmetic(r: Random) -> Task:
    op = r.choice("++--*")
    a, b = (r.randint(0, 10), r.randint(0, 10)) if op == "*" else (r.randint(0, 50), r.randint(0, 20))
    if op == "-" and b > a:
        a, b = b, a
    n = {"+": a + b, "-": a - b, "*": a * b}[op]
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    if r.random() < 0.3:
        x, y, z = w.spelled(a), w.spelled(b), w.spelled(n)
        return f"What is {x} {word} {y}?", z, f"{w.capital(x)} {word} {y} is {z}."
    asks = (f"What is {a} {op} {b}?", f"{a} {op} {b} =", f"How much is {a} {word} {b}?", f"Calculate {a} {op} {b}.")
    return r.choice(asks), str(n), f"{a} {op} {b} = {n}"


def word_problem(r: Random) -> Task:
    a, b = people(r, 2)
    noun = r.choice(w.THINGS + w.FRUITS)
    n, m = r.randint(2, 20), r.randint(1, 10)
    many, some = f"{n} {w.plural(noun)}", f"{m} {noun if m == 1 else w.plural(noun)}"
    if r.random() < 0.5:
        text, total = f"{a.name} has {many}. {b.name} gives {a.obj} {some}.", n + m
    else:
        m = min(m, n)
        text, total = f"{a.name} has {many}. {w.capital(a.she)} gives {m} of them to {b.name}.", n - m
    ask = r.choice((f"How many {w.plural(noun)} does {a.name} have now?", f"How many does {a.name} have in the end?"))
    sign = f"{n} + {m} = {total}" if total >= n and "gives " + a.obj in text else f"{n} - {m} = {total}"
    return f"{text} {ask}", str(total), f"{sign}, so {a.name} has {total} now."


def compare(r: Random) -> Task:
    if r.random() < 0.5:
        a, b = r.sample(range(100), 2)
        big = r.random() < 0.5
        n = max(a, b) if big else min(a, b)
        word = ("larger", "greater", "bigger") if big else ("smaller", "less")
        return f"Which number is {r.choice(word)}, {a} or {b}?", str(n), f"{n} is {word[0]} than {a + b - n}."
    x, y, z = people(r, 3)
    adj, most = r.choice(
        (
            ("older", "oldest"),
            ("taller", "tallest"),
            ("faster", "fastest"),
            ("stronger", "strongest"),
            ("richer", "richest"),
        )
    )
    facts = [f"{x.name} is {adj} than {y.name}.", f"{y.name} is {adj} than {z.name}."]
    r.shuffle(facts)
    return f"{' '.join(facts)} Who is the {most}?", x.name, f"{x.name} is the {most}."


def numbers(r: Random) -> Task:
    roll = r.random()
    if roll < 0.3:
        start, step = r.randint(0, 30), r.choice((1, 1, 2, 2, 3, 5, 10))
        line = [start + i * step for i in range(r.randint(4, 6))]
        return (
            f"Which number comes next: {', '.join(map(str, line[:-1]))}?",
            str(line[-1]),
            f"The next number is {line[-1]}.",
        )
    items = r.sample(range(100), r.randint(3, 5))
    shown = ", ".join(map(str, items))
    if roll < 0.5:
        out = ", ".join(map(str, sorted(items)))
        return f"Sort these numbers: {shown}.", out, f"Sorted: {out}."
    if roll < 0.7:
        name, n = r.choice((("largest", max(items)), ("smallest", min(items))))
        return f"What is the {name} of {shown}?", str(n), f"The {name} number is {n}."
    if roll < 0.85:
        n = r.randint(0, 199)
        return (f"Write {n} in words.", w.spelled(n), f"{n} is {w.spelled(n)}.") if r.random() < 0.5 else (
            f"Write {w.spelled(n)} in digits.", str(n), f"{w.capital(w.spelled(n))} is {n}.")  # fmt: skip
    a, n = r.randint(1, 20), r.randint(3, 8)
    counted = ", ".join(str(a + i) for i in range(n))
    return f"Count from {a} to {a + n - 1}.", counted, f"{counted}."


# ------------------------------------------------------------------------------------------------- stories and questions


def where_is(r: Random) -> Task:
    """People and things that move; one question about where they are in the end."""
    actors, things = people(r, r.randint(2, 3)), r.sample(w.THINGS, 2)
    spots = r.sample([f"the {room}" for room in w.ROOMS] + list(w.SPOTS), 4)
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    lines: list[str] = []
    for step in range(r.randint(3, 6)):
        who = r.choice(actors).name
        free = [t for t in things if t not in holder]
        mine = [t for t, h in holder.items() if h == who]
        roll = r.random()
        if roll < 0.55 or step == 0 or who not in at:
            at[who] = r.choice([s for s in spots if s != at.get(who)])
            lines.append(
                f"{who} {r.choice(('went to', 'walked to', 'moved to', 'ran to', 'is now in', 'came to'))} {at[who]}."
            )
        elif roll < 0.8 and free:
            holder[free[0]] = who
            lines.append(f"{who} {r.choice(('took', 'picked up', 'found'))} the {free[0]} there.")
        elif mine:
            other = r.choice([p.name for p in actors if p.name != who])
            holder[mine[0]] = other
            lines.append(f"{who} {r.choice(('gave', 'handed', 'passed'))} the {mine[0]} to {other}.")
    text = " ".join(lines)
    if holder and r.random() < 0.4:
        x, who = r.choice(list(holder.items()))
        return f"{text} {r.choice((f'Who has the {x}?', f'Who holds the {x} now?'))}", who, f"{who} has the {x}."
    who = r.choice(list(at))
    if r.random() < 0.25:
        guess = r.choice((at[who], r.choice(spots)))
        yes = guess == at[who]
        return (
            f"{text} Is {who} in {guess}?",
            "yes" if yes else "no",
            f"{'Yes' if yes else 'No'}, {who} is in {at[who]}.",
        )
    return f"{text} {r.choice((f'Where is {who}?', f'Where is {who} now?'))}", at[who], f"{who} is in {at[who]}."


def about_person(r: Random) -> Task:
    p, trade, home = person(r), r.choice(w.JOBS)[0], town(r)
    age, likes, pet = r.randint(18, 90), r.choice(w.HOBBIES), r.choice(w.PETS)
    facts = [
        (f"{p.name} lives in {home}.", f"Where does {p.name} live?", home, f"{p.name} lives in {home}."),
        (f"{w.capital(p.she)} is {age} years old.", f"How old is {p.name}?", str(age), f"{p.name} is {age} years old."),
        (f"{w.capital(p.she)} works as {w.article(trade)}.", f"What is {p.name}'s job?", trade, f"{p.name} is {w.article(trade)}."),
        (f"{w.capital(p.she)} likes {likes}.", f"What does {p.name} like?", likes, f"{p.name} likes {likes}."),
        (f"{w.capital(p.her)} {pet} is called {(pet_name := made_up(r))}.", f"What is the name of {p.name}'s {pet}?", pet_name, f"The {pet} is called {pet_name}."),
    ]  # fmt: skip
    chosen = [facts[0], *r.sample(facts[1:], r.randint(2, 3))]
    _, ask, short, full = r.choice(chosen)
    return f"{' '.join(f[0] for f in chosen)} {ask}", short, full


def about_thing(r: Random) -> Task:
    x, colour, spot, who = r.choice(w.THINGS), r.choice(w.COLOURS), r.choice(w.CONTAINERS), person(r).name
    y, colour2 = r.choice([t for t in w.THINGS if t != x]), r.choice(w.COLOURS)
    text = f"{who} has {w.article(f'{colour} {x}')} and {w.article(f'{colour2} {y}')}. The {x} is in {spot}."
    return r.choice((
        (f"{text} Where is the {x}?", spot, f"The {x} is in {spot}."),
        (f"{text} What colour is the {x}?", colour, f"The {x} is {colour}."),
        (f"{text} What colour is the {y}?", colour2, f"The {y} is {colour2}."),
        (f"{text} Who has the {y}?", who, f"{who} has the {y}."),
    ))  # fmt: skip


# ---------------------------------------------------------------------------------------------- copying and transforming


def _some_words(r: Random, n: int) -> list[str]:
    pool = r.choice((w.THINGS, w.FRUITS + w.VEGETABLES, w.PETS + w.WILD, w.COLOURS, w.WOMEN, w.MEN, w.COMMON, w.TOWNS))
    return r.sample(pool, n)


def copy(r: Random) -> Task:
    text = r.choice((lambda: sentence(r), lambda: " ".join(_some_words(r, r.randint(2, 6))), lambda: full_name(r), lambda: made_up(r),
                     lambda: thing(r, 0.9), lambda: passage(r, 2), lambda: str(r.randint(100, 999999))))()  # fmt: skip
    asks = (
        "Repeat: {t}",
        "Copy this: {t}",
        "Say after me: {t}",
        "Write this down: {t}",
        "Repeat this text exactly. {t}",
        "{t} Please repeat that.",
    )
    return r.choice(asks).format(t=text), text, text


def transform(r: Random) -> Task:
    items = _some_words(r, r.randint(3, 5))
    shown, x = ", ".join(items), items[0]
    i = r.randrange(len(items))
    made = {
        f'Say "{x}" twice.': f"{x} {x}",
        f"Write these in reverse order: {shown}.": ", ".join(reversed(items)),
        f"Sort these words: {shown}.": ", ".join(sorted(items)),
        f"What is the first word in this list: {shown}?": items[0],
        f"What is the last word in this list: {shown}?": items[-1],
        f"What is the {w.ORDINALS[i]} word in this list: {shown}?": items[i],
        f"How many words are in this list: {shown}?": w.spelled(len(items)),
        f"Write in capital letters: {x}": x.upper(),
        f"Spell the word {x}.": "-".join(x),
        f'Join these words with "and": {shown}.': " and ".join(items),
        f"Remove {items[i]} from this list: {shown}.": ", ".join(t for t in items if t != items[i]),
        f"Replace {items[i]} by {(new := made_up(r))}: {shown}.": ", ".join(new if t == items[i] else t for t in items),
        f"Write as a list: {shown}.": "\n".join(f"- {t}" for t in items),
        f"Number these: {shown}.": "\n".join(f"{k}. {t}" for k, t in enumerate(items, 1)),
        f"Write as JSON: {shown}.": json.dumps(items),
        f"What is the first letter of {x}?": x[0],
        f"Is {items[i]} in this list: {shown}?": "yes",
        f"{items[0]} twice, then {items[1]}": f"{items[0]} {items[0]} {items[1]}",
        f"{items[1]} after {items[0]} three times": f"{items[0]} {items[0]} {items[0]} {items[1]}",
    }
    ask, answer = r.choice(list(made.items()))
    return ask, answer, answer


def inflect(r: Random) -> Task:
    noun, verb = r.choice(w.THINGS + w.PETS + w.FRUITS), r.choice(w.VERBS_THING + w.VERBS_MOTION + w.VERBS_FOOD)
    who = person(r).name
    return r.choice((
        (f"What is the plural of {noun}?", w.plural(noun), f"The plural of {noun} is {w.plural(noun)}."),
        (f"What is the past of {verb}?", w.past(verb), f"The past of {verb} is {w.past(verb)}."),
        (f"Put in the past: {who} will {verb}.", f"{who} {w.past(verb)}.", f"{who} {w.past(verb)}."),
        (f"Make it negative: {who} {w.past(verb)}.", f"{who} did not {verb}.", f"{who} did not {verb}."),
        (f"Make it a question: {who} {w.past(verb)}.", f"Did {who} {verb}?", f"Did {who} {verb}?"),
        (f"Put the right article: ___ {noun}", w.article(noun), w.article(noun)),
    ))  # fmt: skip


def write(r: Random) -> Task:
    roll = r.random()
    if roll < 0.3:
        text = story(r)
        return r.choice(("Tell me a story.", "Write a short story.", f"Tell a story about {text.split(' ')[0]}.") if text.split(" ")[0] in w.WOMEN + w.MEN
                        else ("Tell me a story.", "Write a short story.")), text, text  # fmt: skip
    x = r.choice(w.THINGS)
    text = r.choice((
        f"{person(r).name} {w.past(r.choice(w.VERBS_THING))} the {x} {r.choice(w.TIMES)}.",
        f"The {x} in {place(r)} was {r.choice(w.THING_ADJ)} and {r.choice(w.COLOURS)}.",
        f"There was {w.article(x)} under {r.choice(w.CONTAINERS)}.",
        f"{person(r).name} gave {person(r).name} {w.article(x)}.",
    ))  # fmt: skip
    return r.choice((f"Write a sentence with the word {x}.", f"Make a sentence about {w.article(x)}.")), text, text


# --------------------------------------------------------------------------------------------------- labels and slots


_REVIEWS = (
    (
        "positive",
        "I loved this {x}. It is {g}.",
        w._items("wonderful, very useful, beautiful, worth every coin, the best one I have had"),
    ),
    (
        "negative",
        "I do not like this {x}. It is {g}.",
        w._items("too heavy, broken, ugly, a waste of money, the worst I have seen"),
    ),
    ("positive", "The {x} came early and works {g}.", w._items("well, very well, perfectly, as promised")),
    (
        "negative",
        "The {x} came {g} and I want my money back.",
        w._items("late, broken, without a key, in the wrong colour"),
    ),
)


def sentiment(r: Random) -> Task:
    label, frame, fills = r.choice(_REVIEWS)
    text = frame.format(x=thing(r), g=r.choice(fills))
    ask = r.choice(
        ("Is this review positive or negative? {t}", "Positive or negative: {t}", "{t} Was the customer happy?")
    )
    if "happy" in ask:
        yes = label == "positive"
        return (
            ask.format(t=text),
            "yes" if yes else "no",
            f"{'Yes' if yes else 'No'}, the customer was {'' if yes else 'not '}happy.",
        )
    return ask.format(t=text), label, f"The review is {label}."


def _request(r: Random) -> tuple[str, str, dict[str, str]]:
    """A wish in plain words, its label and its slots."""
    who, day, hour, n = person(r).name, r.choice(w.DAYS), str(r.randint(1, 12)), str(r.randint(2, 9))
    x, home, dish = r.choice(w.THINGS), town(r), food(r)
    please = r.choice(("Please ", "Could you ", "I want to ", "Can you ", "I would like to ", ""))
    made: tuple[tuple[str, str, dict[str, str]], ...] = (
        (f"{please}book a table for {n} on {day} at {hour}", "book table", {"people": n, "day": day, "time": hour}),
        (f"{please}send a message to {who}", "send message", {"person": who}),
        (f"{please}call {who} on {day}", "call", {"person": who, "day": day}),
        (f"{please}set an alarm for {hour} on {day}", "set alarm", {"day": day, "time": hour}),
        (f"{r.choice(('what is the weather in', 'will it rain in', 'how warm is it in'))} {home} on {day}", "weather", {"town": home, "day": day}),
        (f"{please}buy {n} {w.plural(x)}", "buy", {"item": x, "number": n}),
        (f"{please}order {dish}", "order food", {"dish": dish}),
        (f"{please}play a song by {who}", "play music", {"person": who}),
        (f"{r.choice(('how do I get to', 'show me the way to', 'which bus goes to'))} {home}", "directions", {"town": home}),
        (f"{please}remind me to {r.choice(w.VERBS_THING)} the {x} on {day}", "reminder", {"item": x, "day": day}),
        (f"{r.choice(('where is my parcel with the', 'when will I get the'))} {x}", "parcel", {"item": x}),
        (f"{please}cancel my trip to {home}", "cancel", {"town": home}),
        (f"{please}turn {r.choice(('on', 'off'))} the {(lamp := r.choice(('lamp', 'radio', 'oven', 'camera', 'phone')))} in the {(room := r.choice(w.ROOMS))}", "switch", {"device": lamp, "room": room}),
    )  # fmt: skip
    text, label, slots = r.choice(made)
    end = "?" if text.startswith(("Could", "Can", "what", "will", "how", "which", "where", "when")) else "."
    return w.capital(text) + end, label, slots


def intent(r: Random) -> Task:
    text, label, slots = _request(r)
    roll = r.random()
    if roll < 0.4:
        return f"What does the user want? {text}", label, f"The user wants: {label}."
    if roll < 0.6:
        key = r.choice(list(slots))
        return f"{text} What is the {key}?", slots[key], f"The {key} is {slots[key]}."
    if roll < 0.8:
        out = json.dumps({"intent": label, **slots})
        return f"Write as JSON: {text}", out, out
    out = "\n".join(f"{k}: {v}" for k, v in {"intent": label, **slots}.items())
    return f"Fill in the form: {text}", out, out


def describe(r: Random) -> Task:
    """Fields in, one sentence out; the sentence is plain, never an advertisement."""
    name, kind, colour, price = made_up(r), r.choice(w.THINGS), r.choice(w.COLOURS), str(r.randint(2, 99))
    stuff, home = r.choice(w.MATERIAL_ADJ), town(r)
    fields = {
        "name": name,
        "type": kind,
        "colour": colour,
        "material": stuff,
        "price": f"{price} coins",
        "made in": home,
    }
    parts = {
        "colour": f"{colour}", "material": f"{stuff}", "price": f"costs {price} coins", "made in": f"was made in {home}",
    }  # fmt: skip
    chosen = r.sample(list(parts), r.randint(1, 4))
    adjs = " ".join(parts[k] for k in ("colour", "material") if k in chosen)
    verbs = [parts[k] for k in ("price", "made in") if k in chosen]
    full = (
        f"The {name} is {w.article(f'{adjs} {kind}'.strip())}" + (f" that {' and '.join(verbs)}" if verbs else "") + "."
    )
    keys = ["name", "type", *chosen]
    shown = r.choice((lambda: "; ".join(f"{k}: {fields[k]}" for k in keys), lambda: "\n".join(f"- {k}: {fields[k]}" for k in keys),
                      lambda: json.dumps({k: fields[k] for k in keys})))()  # fmt: skip
    return f"Describe this in one sentence.\n{shown}", full, full


def extract(r: Random) -> Task:
    name, home, day, what = full_name(r), town(r), r.choice(w.DAYS), r.choice(w.JOBS)[0]
    text = r.choice((
        f"My name is {name} and I come from {home}. I will be there on {day}.",
        f"On {day} {name}, {w.article(what)} from {home}, will speak.",
        f"{name} moved to {home} last {day}.",
    ))  # fmt: skip
    ask, short = r.choice((("name", name), ("town", home), ("day", day)))
    return r.choice((f"{text} Which {ask} is in the text?", f"Find the {ask}: {text}")), short, f"The {ask} is {short}."


def small_talk(r: Random) -> Task:
    who = person(r).name
    made = (
        ("Hello!", "Hello! How can I help you?"), ("Good morning.", "Good morning! What can I do for you?"),
        ("How are you?", "I am fine, thank you."), (f"My name is {who}.", f"Nice to meet you, {who}."),
        (f"I am {who}. Who are you?", f"Hello, {who}. I am an assistant."), ("Thank you very much.", "You are welcome."),
        ("Goodbye!", "Goodbye, and have a good day."), ("Can you help me?", "Yes, of course. What do you need?"),
        (f"Say hello to {who}.", f"Hello, {who}!"), (f"Say goodbye to {who}.", f"Goodbye, {who}!"),
        (f"I am {(f := r.choice(w.FEELINGS))} today.", f"You are {f} today. Do you want to talk about it?"),
        ("What should I eat today?", f"You could eat {food(r)}."), ("Tell me a fact.", f"{r.choice(w.FACTS)}."),
        ("Give me some advice.", f"{r.choice(w.PROVERBS)}."), ("Good night.", "Good night, sleep well."),
        (f"I think that {clause(r, 'past')}.", "That is interesting. Tell me more."),
    )  # fmt: skip
    ask, answer = r.choice(made)
    return ask, answer, answer


def true_or_false(r: Random) -> Task:
    fact = r.choice(w.FACTS)
    if r.random() < 0.5:
        return f"True or false: {fact}.", "true", f"True. {fact}."
    a, b = r.sample(w.ANIMALS, 2)
    text, real = f"{w.capital(w.article(a[0]))} {b[1]}", f"{w.capital(w.article(a[0]))} {a[1]}"
    return (
        f"True or false: {text}.",
        "true" if text == real else "false",
        f"True. {real}." if text == real else f"False. {real}.",
    )


TASKS: tuple[tuple[Callable[[Random], Task], float], ...] = (
    (capital, 2), (country, 1), (continent, 1), (opposite, 1), (synonym, 0.5), (definition, 2), (job, 2), (use, 1.5), (nature, 2),
    (calendar, 1), (which_kind, 2.5), (odd_one, 1), (arithmetic, 3), (word_problem, 2), (compare, 2), (numbers, 2.5), (where_is, 6),
    (about_person, 4), (about_thing, 3), (copy, 6), (transform, 5), (inflect, 2), (write, 3), (sentiment, 2), (intent, 5),
    (describe, 7), (extract, 3), (small_talk, 2), (true_or_false, 1),
)  # fmt: skip
