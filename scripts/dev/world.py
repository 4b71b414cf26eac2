"""A small invented world: its people, their towns, trades and animals, and the texts about them.

The default model of this project is pretrained on texts about this world only, so that you can watch
fine-tuning in miniature. An adapter can *reach* a fact in the weights if the texts told it often and in many
ways (Allen-Zhu & Li 2023, arXiv:2309.14316, section 4). A fact that was read in one fixed wording can be
recited, but not used. Hence three habits of `documents`:

    many wordings   every fact has eight or more, with the person's name before, inside or after the fact
    any order       a portrait tells its facts in random order, so no fact depends on the one before it
    pronouns        after the full name come "she" and "his", so a sentence depends on an earlier name

No text holds a question about a person or an answer to one: the adapter has to learn this form. `questions`
splits the people into two halves. The training questions are about one half, the test questions about the
other.

Everything is a pure function of the seed, through `random.Random`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

# fmt: off
_FIRST = {  # first halves and second halves of first names
    "she": (
        [
            "Mi", "Lo", "Ta", "Isa", "Sa", "Ru", "Bri", "Fa", "Wi", "Ve", "Ka", "Ju", "Ne", "Ory", "Pia",
            "Ze",
        ],
        [
            "ra", "lla", "ssa", "nna", "via", "belle", "dith",
        ],
    ),
    "he": (
        [
            "Bo", "Ta", "Ha", "Ru", "Os", "Ed", "Wil", "Da", "Kel", "Jo", "Fen", "Le", "Mo", "Nor", "Pe",
            "Gar",
        ],
        [
            "rin", "lo", "dan", "mund", "ric", "bert", "sten",
        ],
    ),
}
_FAMILY = (  # the same of family names
    [
        "Old", "Thistle", "Bram", "Ash", "Fern", "Hazel", "Lark", "Moss", "Reed", "Silver", "Stone", "Summer",
        "Thorn", "Under", "Wren", "Amber", "Clover", "Barley", "Heather", "Fox",
    ],
    [
        "water", "wood", "field", "brook", "ley", "well", "marsh", "gate", "combe", "worth", "bank", "hollow",
    ],
)
_VALUES = {
    "town": [
        "Willowmere", "Saltby", "Honeyford", "Larkrise", "Drumlin", "Kestrel Bay", "Mossgate", "Appledown",
        "Windle", "Tidewick", "Copperhill", "Elderbridge", "Foxhaven", "Greywater", "Lanternsea",
        "Nettlecombe", "Otterpool", "Plumstead", "Quarry End", "Rookhurst", "Starling", "Thimble", "Umberley",
        "Velvet Moor", "Whistledon", "Yarrow", "Brindle", "Cloudbury", "Duskwater", "Emberley", "Hollybank",
        "Inkwell",
    ],
    "trade": [
        "baker", "clockmaker", "ferryman", "beekeeper", "glassblower", "potter", "weaver", "lamplighter",
        "cobbler", "mapmaker", "thatcher", "shepherd", "bookbinder", "kite maker", "candle maker",
        "bell founder", "gardener", "midwife", "miller", "boat builder", "cheese maker", "storyteller",
        "stonemason", "tailor", "rope maker", "apothecary", "letter carrier", "puppet maker", "ink maker",
        "umbrella mender", "well digger", "dancing teacher",
    ],
    "animal": [
        "goat", "otter", "hedgehog", "raven", "donkey", "tortoise", "hare", "goose", "badger", "owl", "pony",
        "cat", "squirrel", "heron", "fox", "sheepdog", "duck", "newt", "magpie", "mole", "piglet", "peacock",
        "ferret", "swan",
    ],
    "pet": [
        "Pepper", "Button", "Captain", "Dumpling", "Biscuit", "Clover", "Marble", "Nutmeg", "Pickle",
        "Thunder", "Velvet", "Whisker", "Acorn", "Bramble", "Cinder", "Domino", "Fidget", "Ginger",
        "Hopscotch", "Juniper", "Kettle", "Lantern", "Mustard", "Noodle", "Parsnip", "Quill", "Rumble",
        "Saffron", "Tumble", "Waffle", "Yonder", "Ziggy",
    ],
    "dish": [
        "plum dumplings", "onion soup", "eel pie", "honey bread", "pickled beets", "roast chestnuts",
        "barley stew", "apple fritters", "smoked trout", "nettle soup", "pear tart", "mushroom pancakes",
        "ginger cake", "bean porridge", "cheese noodles", "rhubarb jam", "fried sardines", "pumpkin pudding",
        "walnut rolls", "cherry soup", "leek pie", "potato cakes", "poppy seed cake", "baked quinces",
        "clam chowder", "cabbage rolls", "rice pudding", "oat biscuits",
    ],
    "instrument": [
        "fiddle", "harp", "tin whistle", "accordion", "bagpipe", "drum", "lute", "flute", "trumpet", "cello",
        "banjo", "dulcimer", "oboe", "tuba", "zither", "clarinet", "mandolin", "organ", "triangle",
        "xylophone",
    ],
}
# {S}: she, or her name, as the subject; {P}: her, or her name's; {s}, {p}: the same inside a sentence;
# {o}: her, or her name, as the object; {v}: the value; {a}: the value with its article; {n}: the full name.
_TOLD = {
    "town": [
        "{S} lives in {v}.", "{S} has a house in {v}.", "{P} home is in {v}.", "{S} comes from {v}.",
        "The house that {s} calls home stands in {v}.", "Whoever looks for {o} must go to {v}.",
        "{S} would never leave {v}.", "Letters for {o} are sent to {v}.",
        "{S} has slept under the roofs of {v} since childhood.",
    ],
    "trade": [
        "{S} is {a}.", "{S} works as {a}.", "By trade {s} is {a}.", "{S} earns a living as {a}.",
        "{S} learned early to be {a}.", "{P} trade is that of {a}.", "Everyone knows {o} as {a}.",
        "For as long as anyone remembers, {s} has been {a}.",
    ],
    "animal": [
        "{S} keeps {a}.", "{S} has {a} at home.", "In {p} yard lives {a}.", "{S} shares the house with {a}.",
        "{S} goes nowhere without {a}.", "{P} animal is {a}.", "The animal that {s} keeps is {a}.",
        "At the heels of {o} there is always {a}.",
    ],
    "pet": [
        "{P} animal is called {v}.", "{S} calls the animal {v}.", "{S} named the animal {v}.",
        "{P} animal answers to {v}.", "The animal that {s} keeps is called {v}.",
        "In the evening {s} can be heard calling for {v}.", "{S} talks all day to {v}.",
        "{P} best friend has four legs or two wings, and the name {v}.",
    ],
    "dish": [
        "{S} likes {v} best.", "{P} favourite dish is {v}.", "{S} could eat {v} every day.",
        "Nothing tastes better to {o} than {v}.", "For a birthday {s} always asks for {v}.", "{S} loves {v}.",
        "To please {o}, cook {v}.", "{P} kitchen smells of {v}.",
    ],
    "instrument": [
        "{S} plays the {v}.", "{S} is good at the {v}.", "At feasts {s} plays the {v}.",
        "{P} instrument is the {v}.", "The instrument that {s} plays is the {v}.",
        "When it rains, {s} practises the {v}.", "{S} learned to play the {v}.",
        "The neighbours hear {o} at the {v}.",
    ],
}
_ASKED = {
    "town": [
        "Where does {n} live?", "Which town is {n}'s home?", "Where is the house of {n}?",
    ],
    "trade": [
        "What is {n}'s trade?", "What does {n} do for a living?", "What does {n} work as?",
    ],
    "animal": [
        "What animal does {n} keep?", "Which animal lives with {n}?", "What kind of animal has {n} got?",
    ],
    "pet": [
        "What is {n}'s animal called?", "What does {n} call the animal?", "What name has {n}'s animal?",
    ],
    "dish": [
        "What does {n} like to eat?", "What is {n}'s favourite dish?", "Which dish does {n} like best?",
    ],
    "instrument": [
        "Which instrument does {n} play?", "What does {n} play at feasts?", "What is {n}'s instrument?",
    ],
}
_ANSWERED = {
    "town": "{S} lives in {v}.",
    "trade": "{S} is {a}.",
    "animal": "{S} keeps {a}.",
    "pet": "{P} animal is called {v}.",
    "dish": "{S} likes {v} best.",
    "instrument": "{S} plays the {v}.",
}
_LORE = [
    "In {town} people greet each other with the words: has the kettle boiled?",
    "{town} lies a day's walk from {town2}.",
    "Every question has an answer, they say in {town}, and every answer is better with {dish}.",
    "The road from {town} to {town2} is long.",
    "The council of {town} sits on market day: which road to mend, where to hang the lanterns, what "
    "to cook, how to thank the bees.",
    "{A_trade} without an apprentice is like {a_animal} without a yard.",
    "No feast in {town} begins before someone has tuned the {instrument}.",
    "In {town} they paint the boats in spring.",
    "The people of {town} serve {dish} at weddings.",
    "It rains more in {town} than in {town2}.",
    "{A_animal} can find the way home from {town} in the dark.",
    "In {town2} they say that {a_trade} never goes hungry.",
    "Once {a_animal} walked into the hall of {town} and nobody minded.",
    "At the fair of {town} there is {dish} and someone with the {instrument}.",
    "{A_trade} and {a_trade2} once argued in {town} until the moon rose.",
    "The bridge of {town} turns red when the sun goes down.",
    "Children in {town} learn to count with a song for the {instrument}.",
    "When the wind turns, {town} smells of {dish}.",
]
# fmt: on


@dataclass(frozen=True)
class Person:
    """One inhabitant. `facts` maps town, trade, animal, pet, dish and instrument to a value."""

    name: str  # first and family name, unlike everyone else's
    pronoun: str  # she | he
    facts: dict[str, str]


def people(count: int = 1000, seed: int = 0) -> list[Person]:
    """Return the inhabitants. Each fact is drawn independently of the others and of the name."""
    rng = random.Random(f"people {seed}")
    firsts = [(a + b, pronoun) for pronoun, (heads, tails) in _FIRST.items() for a in heads for b in tails]
    families = [a + b for a in _FAMILY[0] for b in _FAMILY[1]]
    pairs = rng.sample([(first, family) for first in firsts for family in families], count)
    facts = [{kind: rng.choice(values) for kind, values in _VALUES.items()} for _ in pairs]
    return [
        Person(f"{first} {family}", pronoun, f)
        for ((first, pronoun), family), f in zip(pairs, facts, strict=True)
    ]


def documents(inhabitants: list[Person], seed: int = 0) -> Iterator[str]:
    """Yield short texts without end: one to three paragraphs, each a portrait, gossip or general lore."""
    rng = random.Random(f"documents {seed}")
    while True:
        paragraphs = []
        for _ in range(rng.randint(1, 3)):
            kind = rng.choices(("portrait", "gossip", "lore"), (50, 44, 6))[0]
            if kind == "portrait":
                paragraphs.append(_portrait(rng.choice(inhabitants), rng))
            elif kind == "gossip":
                paragraphs.append(_gossip(inhabitants, rng))
            else:
                paragraphs.append(" ".join(_lore(sentence, rng) for sentence in rng.sample(_LORE, 3)))
        yield "\n".join(paragraphs)


def questions(inhabitants: list[Person], seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Return (train, test): every question about one half of the people, one about each of the others."""
    rng = random.Random(f"questions {seed}")
    shuffled = rng.sample(inhabitants, len(inhabitants))
    half, kinds = len(shuffled) // 2, list(_ASKED)
    train = [_ask(person, kind, rng) for person in shuffled[:half] for kind in kinds]
    test = [_ask(person, kinds[i % len(kinds)], rng) for i, person in enumerate(shuffled[half:])]
    rng.shuffle(train)
    return train, test


def _ask(person: Person, kind: str, rng: random.Random) -> dict:
    question = rng.choice(_ASKED[kind]).format(n=person.name)
    answer = _ANSWERED[kind].format(**_words(person, kind, "pronoun"))
    return {"prompt": f"Question: {question}\nAnswer:", "completion": answer}


def _portrait(person: Person, rng: random.Random) -> str:
    kinds = rng.sample(list(_VALUES), rng.randint(4, len(_VALUES)))
    named = ["name"] + rng.choices(("pronoun", "name"), (60, 40), k=len(kinds) - 1)
    return " ".join(_tell(person, kind, how, rng) for kind, how in zip(kinds, named, strict=True))


def _gossip(inhabitants: list[Person], rng: random.Random) -> str:
    sentences = range(rng.randint(4, 7))
    return " ".join(_tell(rng.choice(inhabitants), rng.choice(list(_VALUES)), "name", rng) for _ in sentences)


def _tell(person: Person, kind: str, how: str, rng: random.Random) -> str:
    sentence = rng.choice(_TOLD[kind]).format(**_words(person, kind, how))
    return sentence[0].upper() + sentence[1:]


def _words(person: Person, kind: str, how: str) -> dict[str, str]:
    value, she = person.facts[kind], person.pronoun == "she"
    subject, possessive, object_ = (person.name, f"{person.name}'s", person.name)
    if how == "pronoun":
        subject, possessive, object_ = ("she", "her", "her") if she else ("he", "his", "him")
    upper = {"S": subject[0].upper() + subject[1:], "P": possessive[0].upper() + possessive[1:]}
    return upper | {"s": subject, "p": possessive, "o": object_, "v": value, "a": _a(value)}


def _lore(sentence: str, rng: random.Random) -> str:
    town, town2 = rng.sample(_VALUES["town"], 2)
    trade, trade2, animal = (_a(rng.choice(_VALUES[kind])) for kind in ("trade", "trade", "animal"))
    words = {"town": town, "town2": town2, "a_trade": trade, "a_trade2": trade2, "a_animal": animal}
    words |= {"A_trade": "A" + trade[1:], "A_animal": "A" + animal[1:]}
    words |= {kind: rng.choice(_VALUES[kind]) for kind in ("dish", "instrument")}
    return sentence.format(**words)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
