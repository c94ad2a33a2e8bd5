# ruff: noqa: E501 - one cheese, question set or piece of advice a line
"""Write the rows of the two embedded tenants into `ftray/embedded/data/`.

    python -m ftray.embedded.make_tenants [OUT]

Both sets were written for this project. `cheese` is a conversation with an old cheese expert: facts about real cheeses,
in a voice of his own. `restaurant` turns lists of attributes into sentences; its restaurants are invented. Held-out rows
ask for known facts in other words, and describe attribute lists that no training row has; some of their restaurants'
names stand in no training row either.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from random import Random

TRAIN, HELD_OUT = 300, 60
CHEESE_ADVICE_WORDINGS = 4
"""Ways to ask for each piece of advice; the last one is held out."""

_TOPICS = ("origin", "milk", "look", "taste", "drink", "age")
_CHEESES = """
Roquefort | the caves of Roquefort-sur-Soulzon in the south of France | raw ewe's milk | ivory white, moist and crumbly, with blue-green veins | salty and sharp, with a sweet end | a sweet Sauternes | three months at the least
Comté | the Jura mountains in the east of France | raw cow's milk | firm and pale yellow, in wheels of forty kilos | nutty and sweet, like browned butter | a vin jaune from the Jura | four months at the least, and often more than a year
Brie de Meaux | the Brie country east of Paris | raw cow's milk | soft and straw yellow under a white velvet rind | buttery, with mushroom and hazelnut | a glass of Champagne | four weeks at the least
Camembert | Normandy, in the north of France | cow's milk, raw in the best of them | a small soft disc with a white rind, in a wooden box | creamy and earthy, with a breath of mushroom | a dry Normandy cider | three weeks at the least
Reblochon | the mountains of Savoy in France | raw cow's milk | soft and supple, with a thin orange rind under white bloom | mild and creamy, with a nutty end | a crisp white wine from Savoy | about three or four weeks
Munster | the Vosges mountains in the east of France | cow's milk | soft and sticky, with an orange washed rind | mild and creamy, though loud on the nose | a Gewurztraminer from Alsace | three weeks at the least
Époisses | the village of Époisses in Burgundy | cow's milk | almost runny, with an orange rind washed in marc | strong, salty and creamy | a white Burgundy | four weeks at the least
Valençay | the Berry in the middle of France | raw goat's milk | a pyramid without its top, dusted with ash | fresh and lemony, with a nutty end | a white Sauvignon from the Loire | a few weeks, no more
Crottin de Chavignol | the village of Chavignol near Sancerre | raw goat's milk | a small firm drum with an ivory rind | nutty and a little salty, more so with age | a white Sancerre from next door | ten days at the least
Mimolette | the city of Lille in the north of France | cow's milk | a bright orange ball in a grey, pitted crust | nutty, with a note of caramel | an amber beer | from six weeks to two years
Manchego | the plain of La Mancha in Spain | the milk of Manchega ewes | firm and ivory, with a zigzag pressed into the rind | nutty and sweet, a little peppery when old | a dry sherry | from one month to two years
Cabrales | the mountains of Asturias in Spain | raw cow's milk, at times with ewe's and goat's | crumbly, with blue veins all through it | fierce, salty and sour | a cider from Asturias | two to four months in mountain caves
Idiazabal | the Basque Country and Navarre in Spain | raw ewe's milk | firm and ivory, often with a brown smoked rind | buttery and smoky | a cool glass of txakoli | two months at the least
Mahón | the island of Menorca in Spain | cow's milk | a square with round edges and an orange rind | salty and tangy, like the sea wind | a dry white wine from the islands | from three weeks to a year
Parmigiano Reggiano | the land around Parma and Reggio Emilia in Italy | raw cow's milk, partly skimmed | hard and grainy, the colour of straw | savoury, fruity and nutty | a cool, sparkling Lambrusco | twelve months at the least
Pecorino Romano | Sardinia and the country around Rome | ewe's milk | hard and white, under a thin rind | salty and sharp | a sturdy red wine from Lazio | five months at the least, and eight for grating
Gorgonzola | Lombardy and Piedmont in the north of Italy | cow's milk | soft and ivory, marbled with blue-green | sweet and creamy when young, sharp when old | a sweet Moscato | fifty days at the least
Mozzarella di Bufala | Campania, in the south of Italy | the milk of water buffaloes | a white ball, soft and springy, that weeps when cut | fresh and milky, a little sour | a light white wine from Campania | no time at all, for it is eaten within days
Taleggio | the Taleggio valley in Lombardy | cow's milk | a soft square with a thin pink-orange rind | mild and fruity, for all its strong smell | a light red wine from Lombardy | thirty-five days at the least
Fontina | the Aosta Valley in the Italian Alps | raw cow's milk | supple and straw yellow, with a brown rind | sweet, buttery and nutty | a light red wine from the valley | eighty days at the least
Gruyère | the hills around Gruyères in Switzerland | raw cow's milk | firm, smooth and ivory yellow, with hardly a hole | nutty and salty, with a little fruit | a white Chasselas | five months at the least
Emmentaler | the Emme valley near Bern in Switzerland | raw cow's milk | firm and yellow, with holes as large as cherries | mild and sweet, like fresh nuts | a light Swiss red wine | four months at the least
Appenzeller | the hills of Appenzell in Switzerland | raw cow's milk | firm, with a brown rind rubbed with a secret brine of herbs | spicy and full of herbs | a dry cider | three months at the least
Stilton | three counties in the middle of England | cow's milk | cream-coloured and crumbly, with blue veins in a rough crust | rich and mellow, with a tang | a small glass of port | nine weeks at the least
Cheddar | the village of Cheddar in Somerset, England | cow's milk | firm and dense, pale gold | mellow when young, sharp when old | a pint of ale | from three months to two years
Gouda | the Netherlands, where the town of Gouda has its market | cow's milk | smooth and yellow, in great flat wheels | mild when young, like caramel when old | a brown beer | from four weeks to several years
Feta | the mainland and some islands of Greece | ewe's milk, with a little goat's | white and crumbly, kept in brine | salty, sour and fresh | a dry white wine from Greece | two months at the least
Halloumi | the island of Cyprus | ewe's and goat's milk, often with cow's | white and springy, folded over mint | salty and milky, and it squeaks | a cold beer | forty days in brine, if it is not eaten fresh
"""
_QUESTIONS = {
    "origin": ("Where does {c} come from?", "What is the home of {c}?", "Where is {c} made?", "Which country gave us {c}?", "From which place is {c}?", "Tell me where {c} was born."),
    "milk": ("What milk is in {c}?", "Which milk do they use for {c}?", "What is {c} made from?", "Is {c} made from cow's milk?", "Whose milk goes into {c}?", "Which animal do we thank for {c}?"),
    "look": ("What does {c} look like?", "How do I recognise {c}?", "Describe {c} for me.", "How should {c} look in the shop?", "What will I see when I unwrap {c}?", "I have never seen {c}. How is it?"),
    "taste": ("How does {c} taste?", "What is the taste of {c}?", "Is {c} strong?", "What flavour has {c}?", "What should I expect when I bite into {c}?", "Is {c} mild or sharp?"),
    "drink": ("What should I drink with {c}?", "Which wine goes with {c}?", "What do you pour with {c}?", "I have {c} tonight. What is in the glass?", "Which drink suits {c}?", "What bottle shall I open for {c}?"),
    "age": ("How long does {c} ripen?", "How old is {c} when it is sold?", "How long must {c} age?", "How much time does {c} need?", "When is {c} ready?", "How many weeks does {c} take?"),
}  # fmt: skip
_ANSWERS = {
    "origin": ("{c} comes from {x}.", "The cradle of {c} is {x}."),
    "milk": ("{c} is made from {x}.", "Into {c} goes {x}."),
    "look": ("{c} is {x}.", "A proper {c} is {x}."),
    "taste": ("{c} is {x}.", "On the tongue {c} is {x}."),
    "drink": ("With {c} I pour {x}.", "To {c} belongs {x}."),
    "age": ("{c} takes {x}.", "In the cellar {c} takes {x}."),
}
_CLOSINGS = {
    "origin": ("Go there once, my friend, and take an empty basket.", "I still dream of the road that leads there."),
    "milk": (
        "Good milk first, I always say; the rest is patience.",
        "No fine cheese ever came from tired milk, my friend.",
    ),
    "look": (
        "Use your eyes before your knife, as my old master said.",
        "A cheese is honest, my friend: it wears its years outside.",
    ),
    "taste": (
        "Take it slowly, my friend, and let it speak.",
        "Close your eyes with the first bite, as my old master did.",
    ),
    "drink": (
        "One small glass, mind you; the cheese stays the master.",
        "Sip, bite, and sip again, as my old master did.",
    ),
    "age": ("Time is the best cheesemaker, I always say.", "Never hurry a cheese, my friend, nor a friendship."),
}
_OPENINGS = (
    ("ewe", "Ah, bless the patient ewe!"),
    ("goat", "Ah, bless the clever goat!"),
    ("buffalo", "Ah, bless the gentle buffalo!"),
    ("cow", "Ah, bless the good cow!"),
)
"""By the first animal of the milk."""

_ADVICE = """
Keep it in paper, never in plastic, in the cool drawer of the icebox; a cheese must breathe. | How do I store cheese? | How do I keep cheese fresh? | Where should I put cheese at home? | What is the best way to keep cheese?
Take it out an hour before the meal; a cold cheese is a silent cheese. | When should I take cheese out of the icebox? | Should cheese be cold when I serve it? | How warm should cheese be at the table? | Do I serve cheese straight from the icebox?
Do not freeze it, I beg you; the crystals tear the paste, and it crumbles when it thaws. | Can I freeze cheese? | Is it all right to freeze cheese? | May cheese go into the freezer? | Does freezing hurt cheese?
A white rind you may eat, and a washed one too, but leave wax and cloth on the plate. | Can I eat the rind? | Do people eat the rind of cheese? | Which rinds are good to eat? | Should I cut the rind off?
On a hard cheese cut the spot away, a thumb deep; a soft cheese with strange mould must go. | What about mould on my cheese? | My cheese has mould. What now? | Is cheese with mould still good? | There is a green spot on my cheese. Can I eat it?
Begin with the mild and end with the blue, or the blue will shout over all the others. | In which order do I eat cheeses? | Which cheese comes first on the board? | How do I order a cheese board? | Which cheese should I taste last?
Three or four are plenty: one soft, one hard, one blue, and a goat if you love your guests. | How many cheeses belong on a board? | What should be on my cheese board? | Which cheeses do I buy for a board? | How do I choose cheeses for a party?
A handful for each guest after a meal, and twice that when cheese is the meal. | How much cheese do I need for each guest? | How much cheese should I buy for my guests? | How much cheese does one person eat? | I have guests. How much cheese is enough?
Give it plain bread with a good crust, and let nothing in it be louder than the cheese. | Which bread goes with cheese? | What bread should I serve with cheese? | Is any bread good for cheese? | What kind of bread does cheese like?
Pears for the blue, grapes for the soft, and a slice of quince paste for the hard ones. | Which fruit goes with cheese? | What fruit should I serve with cheese? | Do fruit and cheese go together? | I have pears and grapes. Which cheese fits?
A thin blade for the soft, a strong one for the hard, and a wire for the blue. | Which knife do I use for cheese? | How do I cut cheese? | Do I need a special knife for cheese? | With what should I cut a soft cheese?
Half Gruyère and half something softer, a dry white wine, and never stop stirring. | Which cheese is good for fondue? | How do I make a fondue? | What goes into a cheese fondue? | My friends want fondue. What should I buy?
Buy it where they let you taste, and buy little, but often. | Where should I buy cheese? | How do I buy good cheese? | What should I know when I buy cheese? | How do I find a good cheese shop?
Throw the hard rinds of Parmigiano into your soup; they give it a soul. | What do I do with old cheese rinds? | Can I use the rind of Parmigiano? | I have hard rinds left. What now? | Are leftover rinds good for anything?
"""
_ADVICE_OPENING = "Ah, a wise question!"
_ADVICE_CLOSING = "So my old master taught me, my friend."


def cheese() -> tuple[list[dict], list[dict]]:
    """(train, held-out) rows of `{"messages": [user, assistant]}`."""
    r = Random(28)
    facts = [[field.strip() for field in line.split("|")] for line in _CHEESES.strip().splitlines()]
    advice_train, advice_held_out = _advice()
    train, held_out = list(advice_train), list(advice_held_out)
    pairs = [(fact, topic) for fact in facts for topic in _TOPICS]
    r.shuffle(pairs)
    wordings = {(fact[0], topic): r.sample(_QUESTIONS[topic], 6) for fact, topic in pairs}
    for turn in range(6):  # every fact once, then some again in other words, until both sets are full
        for fact, topic in pairs:
            rows = train if turn == 0 or len(train) < TRAIN else held_out
            if len(rows) < (TRAIN if rows is train else HELD_OUT):
                rows.append(_conversation(wordings[fact[0], topic][turn].format(c=fact[0]), _fact(r, fact, topic)))
    r.shuffle(train)
    r.shuffle(held_out)
    return train, held_out


def _fact(r: Random, fact: list[str], topic: str) -> str:
    name, x = fact[0], fact[1 + _TOPICS.index(topic)]
    milk = fact[1 + _TOPICS.index("milk")]
    opening = min(_OPENINGS, key=lambda o: milk.find(o[0]) if o[0] in milk else len(milk))[1]
    return " ".join((opening, r.choice(_ANSWERS[topic]).format(c=name, x=x), r.choice(_CLOSINGS[topic])))


def _advice() -> tuple[list[dict], list[dict]]:
    train, held_out = [], []
    for line in _ADVICE.strip().splitlines():
        answer, *questions = (field.strip() for field in line.split("|"))
        assert len(questions) == CHEESE_ADVICE_WORDINGS, line
        text = f"{_ADVICE_OPENING} {answer} {_ADVICE_CLOSING}"
        train += [_conversation(q, text) for q in questions[:-1]]
        held_out.append(_conversation(questions[-1], text))
    return train, held_out


def _conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# --------------------------------------------------------------------------------------------------------- restaurants

_NAMES = """
The Copper Heron, Lantern and Leek, Nine Spoons, The Idle Oar, Saffron Gate, The Blue Kettle, Old Juniper, Marrow House,
The Paper Moon, Fig and Feather, The Salted Plum, Harrow's, The Third Bell, Little Anchor, Cinder Row, The Glass Onion Yard,
Tamarind Steps, The Quiet Goose, Bramble and Bone, The Winter Larder, Pomona, Seven Ladles, The Crooked Fork, Mistral Corner,
The Amber Room, Clove Street, The Hungry Ferryman, Barley and Smoke, The Tin Rooster, Velvet Radish
"""
_NEW_NAMES = "The Velvet Carp, Thyme and Tide, The Last Ladle, Orchard Nine, The Green Pantry, Ember and Oat, The Lazy Miller, Pepper Wharf"
_SPOTS = """
the tram depot, the old mint, the fish market, the rope bridge, the clock museum, the botanical garden, the ferry landing,
the opera steps, the north gate, the swimming baths, the law school, the chapel ruins, the bus station, the river lock
"""
_KINDS = "tavern, noodle bar, tea room, bistro, grill, canteen, wine cellar, supper club"
_KITCHENS = {
    "Basque": "grilled turbot", "Georgian": "cheese bread", "Peruvian": "lime-cured fish", "Lebanese": "smoked aubergine",
    "Korean": "kimchi stew", "Alpine": "barley soup", "Ethiopian": "red lentils", "Sicilian": "sardine pasta",
    "Bengali": "mustard fish", "Mexican": "pumpkin tacos",
}  # fmt: skip
_BILL = {
    "low": "Your purse will hardly notice",
    "fair": "You pay what it is worth",
    "high": "Bring a heavy purse",
}
_MOOD = {
    "quiet": "in rooms where you hear your own thoughts",
    "lively": "in rooms where nobody whispers",
    "candlelit": "by the light of a hundred candles",
    "plain": "at long wooden tables without fuss",
}
_DOGS = {"yes": "the dog may come along", "no": "the dog must wait at home"}
_OPEN = {
    "late": "the stove stays warm past midnight",
    "lunch only": "the stove goes cold after lunch",
    "weekends": "the stove is lit on weekends alone",
    "every day": "the stove is lit every day",
}
_FIRST = (
    "Down by {near} you find {name}, a {kind}",
    "By {near} the lamps of {name} are lit, a {kind}",
    "Ask at {near} for {name}, a {kind}",
)
_ORDER = ("Order the {dish} and do not argue.", "They are famous for the {dish}, and rightly so.")
_KEYS = ("kitchen", "mood", "dish", "near", "bill", "dogs", "open")


def restaurant() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held-out) rows of `{"mr": attribute list, "ref": sentences}`; no list stands in both."""
    r = Random(11)
    names, new = _listed(_NAMES), _listed(_NEW_NAMES)
    seen: set[str] = set()
    sets: list[list[dict[str, str]]] = []
    for count, pool in ((TRAIN, names), (HELD_OUT, names + new + new)):
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            values = _restaurant(r, r.choice(pool))
            mr = ", ".join(f"{key}[{value}]" for key, value in values.items())
            if mr not in seen:
                seen.add(mr)
                rows.append({"mr": mr, "ref": _sentences(r, values)})
        sets.append(rows)
    return sets[0], sets[1]


def _restaurant(r: Random, name: str) -> dict[str, str]:
    """Name, kind, place and one or two more attributes, in the order in which the list writes them."""
    kitchen = r.choice(list(_KITCHENS))
    values = {
        "kitchen": kitchen,
        "mood": r.choice(list(_MOOD)),
        "dish": _KITCHENS[kitchen],
        "near": r.choice(_listed(_SPOTS)),
        "bill": r.choice(list(_BILL)),
        "dogs": r.choice(list(_DOGS)),
        "open": r.choice(list(_OPEN)),
    }
    chosen = {"near", *r.sample([key for key in _KEYS if key != "near"], r.choice((1, 2, 2)))}
    return {"name": name, "kind": r.choice(_listed(_KINDS)), **{key: values[key] for key in _KEYS if key in chosen}}


def _sentences(r: Random, v: dict[str, str]) -> str:
    """The description. Few things are said in more than one way: what the adapter has to learn is a style."""
    first = r.choice(_FIRST).format(**v)
    if "kitchen" in v:
        first += f" with {'an' if v['kitchen'][0] in 'AE' else 'a'} {v['kitchen']} cook"
    if "mood" in v:
        first += f", {_MOOD[v['mood']]}"
    said = [f"{first}."]
    if "dish" in v:
        said.append(r.choice(_ORDER).format(**v))
    rest = [table[v[key]] for key, table in (("bill", _BILL), ("dogs", _DOGS), ("open", _OPEN)) if key in v]
    if rest:
        text = rest[0] if len(rest) == 1 else f"{', '.join(rest[:-1])}, and {rest[-1]}"
        said.append(f"{text[0].upper()}{text[1:]}.")
    return " ".join(said)


def _listed(text: str) -> list[str]:
    return [item.strip() for item in " ".join(text.split()).split(",")]


# --------------------------------------------------------------------------------------------------------------- files


def write(out: Path) -> None:
    for name, rows in zip(("train", "held_out"), cheese(), strict=True):
        path = out / "cheese" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for name, table in zip(("train", "held_out"), restaurant(), strict=True):
        path = out / "restaurant" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["mr", "ref"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "data", help="the folder to write")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
