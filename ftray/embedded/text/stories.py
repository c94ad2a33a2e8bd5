# ruff: noqa: E501 - one frame or table row a line reads better than broken ones
"""Little stories whose people, things and places stay the same from the first sentence to the last; descriptions of
people, places and shops; letters, notices, recipes, diaries."""

from __future__ import annotations

from random import Random

from ftray.embedded.text import words as w
from ftray.embedded.text.sentences import (
    Person,
    food,
    full_name,
    listed,
    object_of,
    people,
    person,
    place,
    sentence,
    thing,
    town,
)


def _opening(r: Random, who: Person, job: str, home: str) -> str:
    day = f"{r.choice(w.WEATHER)} {r.choice(('morning', 'day', 'evening', 'afternoon', 'night'))}"
    adj = r.choice(w.PERSON_ADJ)
    return r.choice((
        f"Once there was {w.article(adj)} {job} called {who.name} who lived in {home}.",
        f"{who.name} was {w.article(adj)} {job} in {home}.",
        f"On {w.article(day)}, {who.name} the {job} woke up early.",
        f"It was {w.article(day)} in {home}. {who.name}, {w.article(job)}, was at home.",
        f"In {home} lived {w.article(job)} named {who.name}. Everybody said that {who.she} was {adj}.",
        f"Long ago, {w.article(adj)} {job} lived near {home}. {w.capital(who.her)} name was {who.name}.",
    ))  # fmt: skip


def _lost(r: Random, a: Person, b: Person, x: str) -> list[str]:
    here, there, box = place(r), place(r), r.choice(w.CONTAINERS)
    return [
        r.choice((f"One day {a.she} could not find {a.her} {x}.", f"{w.capital(a.her)} {x} was gone.")),
        r.choice(
            (f"{a.name} looked in {here}, but it was not there.", f"First {a.she} searched {here}, but found nothing.")
        ),
        r.choice((f"Then {a.she} asked {a.her} friend {b.name}.", f"{b.name} came by and asked what was wrong.")),
        f'"{r.choice(("I saw it in", "Look in", "Maybe it is in", "Did you look in"))} {there}{r.choice(("", ", near " + box))}," said {b.name}.',
        r.choice(
            (
                f"{a.name} ran to {there} and there was the {x}.",
                f"They went to {there} together, and there lay the {x}.",
            )
        ),
        r.choice(
            (
                f"{w.capital(a.she)} was very {r.choice(('happy', 'glad', 'relieved', 'grateful'))}.",
                f'"Thank you, {b.name}!" said {a.name}.',
            )
        ),
    ]


def _gift(r: Random, a: Person, b: Person, x: str) -> list[str]:
    y, liking = thing(r), r.choice(w.HOBBIES)
    return [
        f"{w.capital(a.her)} friend {b.name} had a birthday {r.choice(('soon', 'that week', 'on ' + r.choice(w.DAYS)))}.",
        f"{b.name} liked {liking}, so {a.name} {r.choice(('looked for', 'wanted to find', 'thought about'))} a good gift.",
        f"At {place(r)} {a.she} saw {w.article(y)}, but it {r.choice(('was too expensive', 'was broken', 'was too big', 'was not for sale'))}.",
        f"So {a.name} {r.choice(('made', 'bought', 'found', 'built'))} {w.article(x)} instead.",
        f"When {b.name} opened the {r.choice(('box', 'parcel', 'bag'))}, {b.she} {r.choice(('smiled', 'laughed', 'was surprised', 'jumped with joy'))}.",
        r.choice((f'"This {x} is just what I wanted," {b.she} said.', f"{b.name} kept the {x} for many years.")),
    ]


def _journey(r: Random, a: Person, b: Person, x: str) -> list[str]:
    goal, on_way = place(r), r.choice(w.SPOTS)
    return [
        f"{a.name} wanted to {r.choice(w.VERBS_MOTION)} to {goal} to {r.choice(('see', 'visit', 'meet'))} {b.name}.",
        f"{w.capital(a.she)} took {w.article(x)} and some {r.choice(w.STAPLES)} and left {r.choice(('at dawn', 'after breakfast', 'at noon', 'in the evening'))}.",
        f"The way was {r.choice(('long', 'hard', 'muddy', 'steep', 'dark', 'pleasant'))} and the weather was {r.choice(w.WEATHER)}.",
        f"Near {on_way} {a.she} met {w.article(r.choice(w.PERSON_ADJ))} {r.choice(w.JOBS)[0]} who {r.choice(('showed the way', 'shared a meal', 'told a story', 'asked for help', 'sang a song'))}.",
        f"{r.choice(('At last', 'After three hours', 'Two days later', 'Before night'))} {a.name} {r.choice(('came to', 'reached', 'arrived at'))} {goal}.",
        f"{b.name} was {r.choice(('waiting at the door', 'very happy to see ' + a.obj, 'asleep in a chair', 'cooking dinner'))}.",
    ]


def _animal(r: Random, a: Person, b: Person, x: str) -> list[str]:
    pet = r.choice(w.PETS + w.WILD)
    name = r.choice(
        w._words("Patch Shadow Biscuit Pepper Coco Ginger Snowy Storm Lucky Button Pip Bramble Misty Rusty Bean")
    )
    return [
        f"One {r.choice(w.WEATHER)} day {a.she} found {w.article(r.choice(('small', 'young', 'wet', 'hungry', 'tired', 'lost')))} {pet} near {place(r)}.",
        f"{a.name} {r.choice(('gave it some', 'fed it', 'brought it'))} {r.choice(('milk', 'bread', 'water', 'seeds', 'fish', 'an apple'))} and called it {name}.",
        f'{b.name} said, "{w.capital(w.article(pet))} {r.choice(("needs a home", "needs a friend", "is a lot of work", "will bring luck"))}."',
        f"So {a.name} made a bed for {name} out of {w.article(r.choice(('box', 'basket', 'blanket', 'bag', 'drawer')))} and {w.article(r.choice(('coat', 'towel', 'pillow', 'scarf')))}.",
        r.choice(
            (
                f"From that day on {name} followed {a.obj} everywhere.",
                f"In the {r.choice(w.SEASONS)} {name} {r.choice(('ran back to the forest', 'learned to open the door', 'was big and strong'))}.",
            )
        ),
    ]


def _trade(r: Random, a: Person, b: Person, x: str) -> list[str]:
    price, y = r.randint(2, 30), thing(r)
    return [
        f"{a.name} wanted to sell {a.her} {x} at the market.",
        f'"How much is it?" asked {b.name}. "{w.capital(w.spelled(price))} coins," said {a.name}.',
        f'"That is too much. I will give you {w.spelled(max(1, price - r.randint(1, price - 1)))}."',
        r.choice((f"{a.name} shook {a.her} head.", f"{a.name} thought about it for a while.", f"{a.name} laughed.")),
        r.choice(
            (
                f"In the end {b.name} paid {w.spelled(price)} coins and took the {x} home.",
                f"In the end they traded the {x} for {w.article(y)}.",
            )
        ),
        r.choice(
            (
                "Both were happy with the deal.",
                f"{a.name} bought some {r.choice(w.STAPLES)} and went home.",
                "It was a good day.",
            )
        ),
    ]


def _cooking(r: Random, a: Person, b: Person, x: str) -> list[str]:
    dish, missing = r.choice(w.DISHES), r.choice(w.STAPLES)
    return [
        f"{a.name} {r.choice(('wanted to cook', 'promised to make', 'was making'))} {dish} for {b.name}.",
        f"But there was no {missing} in the {r.choice(('kitchen', 'pantry', 'house', 'cupboard'))}.",
        f"So {a.she} {r.choice(('went to the shop', 'asked a neighbour', 'used honey instead', 'borrowed some from the ' + r.choice(w.JOBS)[0]))}.",
        f"{w.capital(a.she)} {r.choice(('cut', 'washed', 'peeled'))} {listed([w.plural(v) for v in r.sample(w.VEGETABLES, 2)])} and {r.choice(('put them in a pot', 'fried them in a pan', 'set the table'))}.",
        f"When {b.name} came, the house smelled {r.choice(('wonderful', 'of smoke', 'sweet', 'good'))}.",
        f'"{r.choice(("This is delicious", "This is the best meal of the year", "It needs a little salt", "May I have more"))}," said {b.name}.',
    ]


def _contest(r: Random, a: Person, b: Person, x: str) -> list[str]:
    sport = r.choice(w.SPORTS)
    winner, loser = (a, b) if r.random() < 0.5 else (b, a)
    return [
        f"Every {r.choice(w.SEASONS)} there was a {sport} contest in the village, and the prize was {w.article(x)}.",
        f"{a.name} practised {r.choice(('every day', 'every morning', 'for weeks', 'with a friend'))}. {b.name} {r.choice(('did not practise at all', 'practised at night', 'had won the year before'))}.",
        f"On the day of the contest it was {r.choice(w.WEATHER)}.",
        f"{loser.name} was {r.choice(('ahead', 'faster', 'better'))} at first, but {winner.name} {r.choice(('did not give up', 'stayed calm', 'had a plan', 'tried harder'))}.",
        f"In the end {winner.name} won the {x}.",
        f"{loser.name} {r.choice(('shook ' + winner.her + ' hand', 'was sad but not angry', 'said well done'))}, and they went home together.",
    ]


def _mystery(r: Random, a: Person, b: Person, x: str) -> list[str]:
    culprit = r.choice(w.PETS + w.WILD)
    return [
        f"At night {a.name} heard a {r.choice(('strange', 'loud', 'soft'))} noise in the {r.choice(w.ROOMS)}.",
        f"{w.capital(a.she)} took {w.article(r.choice(('lamp', 'candle', 'lantern', 'torch')))} and went to look. The {x} had fallen down.",
        f'"Who is there?" {a.she} called, but nobody answered.',
        f"In the morning {b.name} saw small footprints {r.choice(('on the floor', 'in the snow', 'in the mud', 'near the window'))}.",
        f"They followed them to {place(r)} and found {w.article(culprit)}.",
        f"{r.choice(('They both laughed', 'It was only hungry', 'The ' + culprit + ' looked at them and ran away', 'So the riddle was solved'))}.",
    ]


_PLOTS = (_lost, _gift, _journey, _animal, _trade, _cooking, _contest, _mystery)


def story(r: Random) -> str:
    a, b = people(r, 2)
    x, job = thing(r, 0.5), r.choice(w.JOBS)[0]
    lines = r.choice(_PLOTS)(r, a, b, x)
    if r.random() < 0.25:
        lines = lines[: r.randint(3, len(lines))]
    parts = [_opening(r, a, job, town(r)), *lines]
    if r.random() < 0.12:
        parts.append(f"{r.choice(w.PROVERBS)}.")
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------------- descriptions


def describe_person(r: Random) -> str:
    p, job = person(r), r.choice(w.JOBS)
    adjs = r.sample(w.PERSON_ADJ, 2)
    lines = [
        r.choice((f"{p.name} is {w.article(job[0])} in {town(r)}.", f"{p.name}, {w.article(job[0])}, lives in {town(r)}.")),
        r.choice((f"{w.capital(p.she)} {job[1]}.", f"Every day {p.she} {job[1]}.", f"At work, {p.she} {job[1]}.")),
        f"{w.capital(p.she)} is {r.randint(18, 90)} years old.",
        f"{w.capital(p.she)} has {r.choice(('short', 'long', 'curly', 'straight'))} {r.choice(('black', 'brown', 'red', 'grey', 'white', 'blond'))} hair and {r.choice(('blue', 'brown', 'green', 'grey'))} eyes.",
        f"People say that {p.she} is {adjs[0]} and {adjs[1]}.",
        f"In {p.her} free time {p.she} likes {r.choice(w.HOBBIES)}{r.choice(('', ' and ' + r.choice(w.HOBBIES)))}.",
        f"{w.capital(p.her)} favourite food is {food(r)}, and {p.her} favourite colour is {r.choice(w.COLOURS)}.",
        f"{w.capital(p.she)} has {w.article(r.choice(w.PETS))} called {r.choice(w._words('Patch Shadow Coco Rex Luna Max Bella Tiger'))}.",
        f"{w.capital(p.she)} was born in {town(r)} in {r.choice(w.MONTHS)}.",
    ]  # fmt: skip
    rest = r.sample(lines[2:], r.randint(2, 5))
    return " ".join([*lines[:2], *rest])


def describe_place(r: Random) -> str:
    name, sights = town(r), r.sample(w.SPOTS, 3)
    lines = [
        f"{name} is a {r.choice(('small', 'quiet', 'busy', 'pretty', 'large', 'old'))} {r.choice(('town', 'village', 'city'))} {r.choice(('by', 'near', 'between', 'behind'))} {r.choice(('the sea', 'the river', 'the hills', 'a lake', 'the forest'))}.",
        f"About {w.spelled(r.randint(2, 99))} thousand people live there.",
        f"Visitors like {sights[0]} and {sights[1]}.",
        f"In {r.choice(w.SEASONS)} it is often {r.choice(w.WEATHER)}.",
        f"On {r.choice(w.DAYS)} there is a market where people sell {listed([w.plural(f) for f in r.sample(w.FRUITS, 2)])}.",
        f"The oldest house is near {sights[2]}; it is {r.randint(90, 900)} years old.",
        f"{w.capital(w.article(r.choice(w.JOBS)[0]))} named {full_name(r)} was born there.",
    ]
    return " ".join([lines[0], *r.sample(lines[1:], r.randint(2, 4))])


def describe_shop(r: Random) -> str:
    kind, goods = r.choice(w.SHOPS)
    owner, opens = person(r), r.randint(6, 10)
    lines = [
        f"{owner.name} has a {kind} in {town(r)}, near {r.choice(w.SPOTS)}.",
        f"It opens at {w.spelled(opens)} and closes at {w.spelled(r.randint(4, 9))}.",
        f"People come for the {goods}, and some for {owner.her} stories.",
        f"The shop is {r.choice(w.THING_ADJ)} and {r.choice(w.THING_ADJ)}, with a {r.choice(w.COLOURS)} door.",
        f"{owner.name} {r.choice(('never raises the prices', 'is always polite', 'knows every customer', 'works alone', 'sleeps above the shop'))}.",
        f"On {r.choice(w.DAYS)} the shop is closed.",
    ]
    return " ".join([lines[0], *r.sample(lines[1:], r.randint(2, 4))])


def record(r: Random) -> str:
    """A list of fields, then the same as sentences."""
    p, job, home = person(r), r.choice(w.JOBS)[0], town(r)
    age, likes = str(r.randint(18, 90)), r.choice(w.HOBBIES)
    fields = {"Name": p.name, "Age": age, "Job": job, "Town": home, "Likes": likes}
    text = f"{p.name} is {age} years old and works as {w.article(job)} in {home}. {w.capital(p.she)} likes {likes}."
    lines = "\n".join(f"{k}: {v}" for k, v in fields.items())
    return f"{lines}\n{text}" if r.random() < 0.7 else f"{text}\n{lines}"


# ------------------------------------------------------------------------------------------------------ kinds of text


def letter(r: Random) -> str:
    a, b = people(r, 2)
    body = r.choice((
        f"thank you for the {thing(r)}. I {r.choice(('love it', 'use it every day', 'showed it to everyone'))}.",
        f"I am now in {town(r)}. The weather is {r.choice(w.WEATHER)} and the food is {r.choice(('good', 'cheap', 'strange', 'too salty'))}.",
        f"please come to my {r.choice(('birthday', 'wedding', 'party', 'concert'))} on {r.choice(w.DAYS)}. Bring {w.article(thing(r))}.",
        f"I am sorry that I {w.past(r.choice(w.VERBS_THING))} your {thing(r)}. I will {r.choice(('buy a new one', 'repair it', 'bring it back'))}.",
    ))  # fmt: skip
    end = r.choice(("Best wishes", "Love", "See you soon", "Your friend", "Kind regards"))
    return f"Dear {a.name}, {body} {sentence(r)} {end}, {b.name}"


def diary(r: Random) -> str:
    return (
        f"{r.choice(w.DAYS)}, {r.choice(w.MONTHS)} {r.randint(1, 28)}. Today I {w.past(r.choice(w.VERBS_MOTION))} to {place(r)} and "
        f"{w.past(r.choice(w.VERBS_THING))} {object_of(r)}. {person(r).name} was {r.choice(w.FEELINGS)}. It was {r.choice(w.WEATHER)}. "
        f"Tomorrow I will {r.choice(w.VERBS_FOOD)} {food(r)}."
    )


def notice(r: Random) -> str:
    x = thing(r, 0.8)
    return r.choice((
        f"For sale: {w.article(x)}, {r.choice(('almost new', 'used once', 'in good condition'))}, {r.randint(2, 200)} coins. Ask {full_name(r)}, {r.choice(w.SPOTS)}, {town(r)}.",
        f"Lost: {w.article(x)}, near {place(r)}, on {r.choice(w.DAYS)}. Please bring it to {full_name(r)}. Reward: {food(r)}.",
        f"Wanted: {w.article(r.choice(w.PERSON_ADJ))} {r.choice(w.JOBS)[0]} for {place(r)} in {town(r)}. Start in {r.choice(w.MONTHS)}.",
        f"Concert on {r.choice(w.DAYS)} at {r.randint(5, 9)} in {r.choice(w.SPOTS)}. {full_name(r)} plays the {r.choice(('piano', 'violin', 'flute', 'guitar', 'drum'))}. Everyone is welcome.",
    ))  # fmt: skip


def recipe(r: Random) -> str:
    dish = r.choice(w.DISHES)
    items = [*r.sample(w.VEGETABLES + w.FRUITS, r.randint(2, 3)), r.choice(w.STAPLES)]
    steps = [
        f"{r.choice(('Wash', 'Peel', 'Cut', 'Chop'))} the {w.plural(items[0])}.",
        f"Add the {w.plural(items[1])} and some {items[-1]}.",
        f"{r.choice(('Cook', 'Bake', 'Boil', 'Fry'))} for {r.choice((10, 15, 20, 30, 45, 60))} minutes.",
        f"Serve {r.choice(('hot', 'cold', 'warm'))} with {r.choice(w.STAPLES)}.",
    ]
    if r.random() < 0.5:
        steps = [f"{i}. {s}" for i, s in enumerate(steps, 1)]
    return f"How to make {dish}: " + " ".join(steps)


def weather_report(r: Random) -> str:
    a, b, c = r.sample(w.WEATHER, 3)
    return (
        f"The weather in {town(r)}: {a} in the morning, {b} in the afternoon, about {r.randint(-9, 35)} degrees. "
        f"{r.choice(w.DAYS)} will be {c}. {r.choice(('Take an umbrella', 'Wear a warm coat', 'Stay at home', 'Enjoy the day', 'Drive carefully'))}."
    )


def talk(r: Random) -> str:
    """Two people speaking, as prose."""
    a, b = people(r, 2)
    x, dish = thing(r), food(r)
    lines = r.choice((
        (f"Where is my {x}?", f"I {r.choice(('put it', 'saw it', 'left it'))} in {r.choice(w.CONTAINERS)}.", "Thank you."),
        ("What shall we eat?", f"How about {dish}?", r.choice(("Good idea.", f"I do not like {dish}.", "I ate that yesterday."))),
        (f"Where are you going, {b.name}?", f"To {place(r)}. Do you want to come?", r.choice(("Yes, please.", "No, I must work.", "Not today."))),
        (f"What do you do, {b.name}?", f"I am {w.article(r.choice(w.JOBS)[0])}. And you?", f"I am {w.article(r.choice(w.JOBS)[0])}."),
        (f"How old is your {r.choice(w.PETS)}?", f"{w.capital(w.spelled(r.randint(1, 19)))} years old.", "That is old!"),
    ))  # fmt: skip
    if r.random() < 0.5:
        return "\n".join(f"{p.name}: {line}" for p, line in zip((a, b, a), lines, strict=False))
    first, second, third = lines
    return f'"{first}" asked {a.name}. "{second}" {r.choice(("said", "answered", "replied"))} {b.name}. "{third}" said {a.name}.'
