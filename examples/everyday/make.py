"""Everyday questions with sentence-long answers, for a small instruction-tuned model on a CPU.

    question   You stand facing north. You turn left, then turn left. Which way are you facing now?
    answer     After the two turns you are facing south, having started out facing north.

Sixteen kinds of question, each in several wordings. They should be hard to answer at once for a
model of 135M parameters, and easier after a line of thought (which way after one turn? what is the
sum so far?). Most of an answer is filler that any model predicts; the reward should find the one or
two words that need thought. Some answers (household advice, causes) cannot be checked by a rule, as
in the data this method is for.

    python examples/everyday/make.py            writes train.jsonl and test.jsonl beside this file

Deterministic, standard library only. Answers are computed where they can be; the rest is in
facts.txt. Every row has a fact it rests on (the numbers, the word, the line of facts.txt), and no
fact of a test row occurs in train.jsonl, in any wording. All text was written for this repository
(Apache-2.0), and the people are made up.
"""

import itertools
import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEST, TRAIN = 100, 600

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
TIMES = ["never", "once", "twice", "three times", "four times"]
ORDINALS = "first second third fourth fifth".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
COMPASS = "north east south west".split()
TURNS = {"left": -1, "right": 1, "around": 2}  # quarters of a circle, clockwise
WOMEN = "Mia Rosa Nora Lena Ivy Clara Ella Zoe".split()
MEN = "Tom Ben Omar Paul Max Hugo Leo Finn".split()
PEOPLE = dict.fromkeys(WOMEN, "she") | dict.fromkeys(MEN, "he")
NAMES = list(PEOPLE)

GOODS = {  # a thing when it is bought: the same thing afterwards
    "a loaf of bread": "the bread",
    "a carton of milk": "the milk",
    "a bag of apples": "the apples",
    "a jar of honey": "the honey",
    "a box of eggs": "the eggs",
    "a piece of cheese": "the cheese",
    "a newspaper": "the newspaper",
    "a bunch of flowers": "the flowers",
    "a bar of soap": "the soap",
}
EACH = {
    "Pens": "pen",
    "Melons": "melon",
    "Candles": "candle",
    "Tickets": "ticket",
    "Cakes": "cake",
    "Notebooks": "notebook",
}
SCALES = [  # what is compared, more, less, most, least
    (NAMES, "taller", "shorter", "tallest", "shortest"),
    (NAMES, "older", "younger", "oldest", "youngest"),
    (NAMES, "faster", "slower", "fastest", "slowest"),
    (NAMES, "stronger", "weaker", "strongest", "weakest"),
    (
        ["the red box", "the blue box", "the green box", "the white box"],
        "heavier",
        "lighter",
        "heaviest",
        "lightest",
    ),
    (
        ["the grey book", "the brown book", "the black book", "the pink book"],
        "thicker",
        "thinner",
        "thickest",
        "thinnest",
    ),
    (
        ["the blue rope", "the yellow rope", "the white rope", "the green rope"],
        "longer",
        "shorter",
        "longest",
        "shortest",
    ),
]
EVENTS = [
    "the school trip",
    "the dentist appointment",
    "the birthday party",
    "the football match",
    "the piano lesson",
    "the village fair",
]
SHOWS = ["film", "concert", "football match", "cooking lesson", "puppet show", "boat trip"]
PLACES = ["the station", "the dentist", "work", "the theatre", "school", "the airport"]
CHORES = [
    "painting the fence",
    "cleaning the kitchen",
    "mending the bicycle",
    "baking bread",
    "reading a story",
    "weeding the garden",
]
UNITS = [  # larger, smaller, how many of them, in steps of, something so large
    ("hour", "minute", 60, 5, "A train ride takes {}"),
    ("minute", "second", 60, 5, "A song lasts {}"),
    ("day", "hour", 24, 1, "A storm at sea goes on for {}"),
    ("week", "day", 7, 1, "A holiday in the mountains lasts {}"),
    ("year", "month", 12, 1, "A little boy is exactly {} old"),
    ("metre", "centimetre", 100, 10, "A red ribbon is {} long"),
    ("kilometre", "metre", 1000, 100, "The path to the lake is {} long"),
    ("kilogram", "gram", 1000, 100, "A bag of potatoes weighs {}"),
    ("litre", "millilitre", 1000, 100, "A watering can holds {}"),
    ("foot", "inch", 12, 1, "A wooden plank is {} long"),
    ("yard", "foot", 3, 1, "A garden fence is {} long"),
]
PLURALS = {"foot": "feet", "inch": "inches"}
# heading, names of rows, (unit, lowest, highest), (most, least), question for an end, its answers,
# question for a difference, its answers
TABLES = [
    (
        "The market sells fruit at these prices per kilo",
        ["apples", "pears", "plums", "cherries", "grapes", "peaches", "figs"],
        ("pound", 2, 12),
        ("most", "least"),
        "Which fruit costs the {end}?",
        [
            "At {value} per kilo, {a} cost the {end} of the four.",
            "It is {a} that cost the {end}, namely {value} per kilo.",
        ],
        "How much more does a kilo of {a} cost than a kilo of {b}?",
        [
            "A kilo of {a} costs {value} more than a kilo of {b}.",
            "You pay {value} more for a kilo of {a} than for {b}.",
        ],
    ),
    (
        "This is how many goals each child scored",
        NAMES,
        ("goal", 1, 12),
        ("most", "fewest"),
        "Who scored the {end} goals?",
        [
            "The {end} goals were scored by {a}, who got {value}.",
            "It was {a} who scored the {end} goals of the four, with {value}.",
        ],
        "How many more goals did {a} score than {b}?",
        [
            "In this list {a} scored {value} more than {b} did.",
            "There is a difference of {value} between {a} and {b}.",
        ],
    ),
    (
        "These were the temperatures at noon",
        DAYS,
        ("degree", 8, 25),
        ("warmest", "coldest"),
        "Which day was the {end}?",
        [
            "The {end} day in the list was {a}, when there were {value}.",
            "It was on {a} that the weather was {end}, with {value}.",
        ],
        "By how many degrees was {a} warmer than {b}?",
        [
            "At noon it was {value} warmer on {a} than on {b}.",
            "The difference is {value}, since {a} was warmer than {b} by that much.",
        ],
    ),
    (
        "This is how many pages each child read in one evening",
        NAMES,
        ("page", 5, 30),
        ("most", "fewest"),
        "Who read the {end} pages?",
        [
            "The {end} pages were read by {a}, who got through {value}.",
            "Of the four children, {a} read the {end}, namely {value}.",
        ],
        "How many more pages did {a} read than {b}?",
        [
            "In that evening {a} read {value} more than {b} did.",
            "There is a difference of {value} between {a} and {b}.",
        ],
    ),
]


# ---- words
def spell(n: int) -> str:
    """A number below 10000 in words: 2145 is two thousand one hundred and forty-five."""
    if n < 20:
        return SMALL[n]
    if n < 100:
        return TENS[n // 10] + (f"-{SMALL[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{SMALL[n // 100]} hundred" + (f" and {spell(n % 100)}" if n % 100 else "")
    rest = n % 1000
    return f"{SMALL[n // 1000]} thousand" + (
        f"{' and' if rest < 100 else ''} {spell(rest)}" if rest else ""
    )


def plural(n: int, noun: str) -> str:
    return f"{spell(n)} {noun if n == 1 else PLURALS.get(noun, noun + 's')}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(text: str) -> str:
    return capital(text) + "."


def listed(words: list[str], last: str = "and") -> str:
    return ", ".join(words[:-1]) + f" {last} {words[-1]}"


def clock(minute: int) -> str:
    """A time of day, in minutes after twelve, as people say it: 100 is twenty to two."""
    hour, minute = divmod(minute % 720, 60)
    this_hour = SMALL[hour or 12]
    if minute == 0:
        return f"{this_hour} o'clock"
    distance = min(minute, 60 - minute)  # to the nearest full hour
    said = {15: "quarter", 30: "half"}.get(distance) or spell(distance)
    return f"{said} past {this_hour}" if minute <= 30 else f"{said} to {SMALL[hour + 1]}"


def duration(minutes: int) -> str:
    hours, rest = divmod(minutes, 60)
    return " and ".join(plural(n, noun) for n, noun in ((hours, "hour"), (rest, "minute")) if n)


def facts(kind: str) -> list[str]:
    """The lines of facts.txt of this kind."""
    lines = (HERE / "facts.txt").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(f"{kind}: ") for line in lines if line.startswith(f"{kind}: ")]


def read_groups() -> list[tuple[str, str, list[str]]]:
    """(singular, plural, words) of every group."""
    groups = []
    for line in facts("group"):
        names, words = line.split(": ")
        groups.append((*names.split(" / "), words.split(", ")))
    return groups


GROUPS = read_groups()
OPPOSITES = [line.split(" / ") for line in facts("opposite")]
STEPS = [line.split(": ") for line in facts("steps")]  # what is done, its steps
CAUSES = [line.split(" | ") for line in facts("cause")]
ADVICE = [line.split(" | ") for line in facts("advice")]
THINGS = [line.split(" | ") for line in facts("thing")]
SPELLABLE = [word for _, _, words in GROUPS for word in words if word.islower() and len(word) >= 5]


# ---- computed kinds
# A kind is a function of rng alone -> (question, answer, the fact it rests on).
Row = tuple[str, str, object]


def change(rng: random.Random) -> Row:
    """What is left after buying two things, or several of one."""
    name = rng.choice(NAMES)
    coin = rng.choice(["pound", "dollar", "euro"])
    she = PEOPLE[name]
    if rng.random() < 0.6:
        (this, spoken_of), (that, also) = rng.sample(sorted(GOODS.items()), 2)
        costs = [rng.randrange(1, 10), rng.randrange(1, 10)]
        a, b = (plural(n, coin) for n in costs)
        told = [
            f"{name} buys {this} for {a} and {that} for {b}.",
            f"{capital(this)} costs {a} and {that} costs {b}. {name} buys both.",
        ]
        bought = f"{spoken_of} and {also}"
    else:
        many = rng.randrange(2, 6)
        things, thing = rng.choice(sorted(EACH.items()))
        costs = [rng.randrange(2, 7)] * many
        each = plural(costs[0], coin)
        told = [
            f"{things} cost {each} each, and {name} buys {spell(many)} of them.",
            f"{name} wants {plural(many, thing)}. One {thing} costs {each}.",
        ]
        bought = f"the {plural(many, thing)}"
    paid = rng.choice([note for note in (10, 20, 50) if note > sum(costs)])
    left = plural(paid - sum(costs), coin)
    question = rng.choice(told) + rng.choice(
        [
            f" {capital(she)} pays with a {spell(paid)}-{coin} note. "
            f"How much change does {she} get?",
            f" {capital(she)} had {plural(paid, coin)} before. "
            f"How much money does {she} have left afterwards?",
        ]
    )
    answer = rng.choice(
        [
            f"{capital(she)} has {left} left after buying {bought}.",
            f"After paying for {bought}, {name} has {left} left.",
            f"Paying for {bought} leaves {name} with {left}.",
        ]
    )
    return question, answer, (sorted(costs), paid)


def ages(rng: random.Random) -> Row:
    x, y, z = rng.sample(NAMES, 3)
    first = rng.randrange(4, 13)
    gap = rng.randrange(1, 7)
    other = rng.randrange(1, 4)
    second = first + gap
    start = f"{x} is {plural(first, 'year')} old. {y} is {plural(gap, 'year')} older than {x}"
    form = rng.choice(["younger", "older", "twice", "future"])
    if form == "twice":
        question = f"{start}, and {z} is twice as old as {y}. How old is {z}?"
        old = 2 * second
    elif form == "future":
        question = f"{start}. How old will {y} be in {plural(other, 'year')} from now?"
        old = second + other
    else:
        question = f"{start}, and {z} is {plural(other, 'year')} {form} than {y}. How old is {z}?"
        old = second - other if form == "younger" else second + other
    if form == "future":
        answers = [
            f"{y} will be {plural(old, 'year')} old by then, "
            f"because now {PEOPLE[y]} is {spell(second)}.",
            f"{y} will be {plural(old, 'year')} old when that time has passed.",
        ]
    else:
        answers = [
            f"{z} is {plural(old, 'year')} old, going by what we know about {x} and {y}.",
            f"If all of that is right, then {z} must be {plural(old, 'year')} old.",
            f"We can work out from {x} and {y} that {z} is {plural(old, 'year')} old.",
        ]
    return question, rng.choice(answers), (form, first, gap, form != "twice" and other)


def order(rng: random.Random) -> Row:
    """Three people or things, two clues; who is first, last, or between."""
    things, more, less, most, least = rng.choice(SCALES)
    a, b, c = ranked = rng.sample(things, 3)  # a is the most, c the least
    clues = [
        rng.choice([f"{x} is {more} than {y}", f"{y} is {less} than {x}"])
        for x, y in ((a, b), (b, c))
    ]
    rng.shuffle(clues)
    told = rng.choice(
        [f"{capital(clues[0])}. {capital(clues[1])}.", f"{capital(clues[0])}, and {clues[1]}."]
    )
    who = "Who" if things is NAMES else "Which one"
    place = rng.randrange(3)
    if place == 1:
        question = f"{told} {who} is neither the {most} nor the {least} of the three?"
        answers = [
            f"{capital(b)} is neither the {most} nor the {least} of the three.",
            f"{capital(b)} comes in the middle, because {a} is {more} and {c} is {less}.",
        ]
    else:
        best, than, others = (most, more, less) if place == 0 else (least, less, more)
        x = ranked[place]
        rest = [y for y in ranked if y != x]
        question = f"{told} {who} is the {best} of the three?"
        answers = [
            f"{capital(x)} is the {best} of the three, according to the two clues.",
            f"Of the three, {x} is the {best}, {than} than both {listed(rng.sample(rest, 2))}.",
            f"The {best} of them all must be {x}, since the others are both {others}.",
        ]
    return question, rng.choice(answers), (more, ranked, place)


def weekday(rng: random.Random) -> Row:
    start = rng.randrange(7)
    event = rng.choice(EVENTS)
    later = rng.choice(["the day after tomorrow", "tomorrow"])
    day = DAYS[start]
    form = rng.choice(["event", "count", "near"])
    n = rng.randrange(2, 12)
    sign = rng.choice([1, -1])
    if form == "near":  # from one named day to another
        here, there = rng.choice([("yesterday", later), ("the day before yesterday", "tomorrow")])
        distance = {
            "yesterday": 1,
            "the day before yesterday": 2,
            "tomorrow": 1,
            "the day after tomorrow": 2,
        }
        shift = distance[here] + distance[there]
        was, will = ("was", "will it be") if sign == 1 else ("is", "was it")
        if sign == -1:
            here, there = there, here
        question = rng.choice(
            [
                f"If {here} {was} a {day}, what day of the week {will} {there}?",
                f"{capital(here)} {was} {day}. Which day of the week {will} {there}?",
            ]
        )
        target = DAYS[(start + sign * shift) % 7]
        tense = "will be" if sign == 1 else "was"
        answers = [
            f"If {here} {was} a {day}, then {there} {tense} a {target}.",
            f"It {tense} a {target} {there}, because {here} {was} a {day}.",
        ]
        return question, rng.choice(answers), (day, sign * shift)
    target = DAYS[(start + sign * n) % 7]
    if form == "count":
        way, direction = ("after", "forward") if sign == 1 else ("before", "back")
        question = rng.choice(
            [
                f"Which day of the week comes {spell(n)} days {way} {day}?",
                f"Start from {day} and count {spell(n)} days {direction}. Which day do you reach?",
            ]
        )
        answers = [
            f"The day that comes {spell(n)} days {way} {day} is a {target}.",
            f"Counting {spell(n)} days {direction} from {day} brings us to a {target}.",
        ]
    elif sign == 1:
        question = f"Today is {day}. {capital(event)} is in {spell(n)} days. " + rng.choice(
            ["On which day of the week will it be?", "What day will that be?"]
        )
        answers = [
            f"{capital(event)} will be on a {target}, {spell(n)} days after {day}.",
            f"That will be a {target}, because today is {day} and there are {spell(n)} days to go.",
        ]
    else:
        question = f"Today is {day}. {capital(event)} was {spell(n)} days ago. " + rng.choice(
            ["On which day of the week was it?", "What day was that?"]
        )
        answers = [
            f"{capital(event)} was on a {target}, {spell(n)} days before {day}.",
            f"That was a {target}, because today is {day} and {spell(n)} days have passed.",
        ]
    return question, rng.choice(answers), (day, sign * n)


def month(rng: random.Random) -> Row:
    start = rng.randrange(12)
    n = rng.randrange(2, 9)
    sign = rng.choice([1, -1])
    name = rng.choice(NAMES)
    here = MONTHS[start]
    there = MONTHS[(start + sign * n) % 12]
    she = PEOPLE[name]
    many = f"{spell(n)} months"
    if sign == 1:
        question, answers = rng.choice(
            [
                (
                    f"{name} moved house in {here} and got a dog {many} later. "
                    f"In which month did {she} get the dog?",
                    [
                        f"{name} got the dog in {there}, {many} after moving house.",
                        f"The dog came in {there}, because {she} moved in {here}.",
                    ],
                ),
                (
                    f"Which month of the year comes {many} after {here}?",
                    [
                        f"The month that comes {many} after {here} is {there}.",
                        f"Counting {many} forward from {here} brings us to {there}.",
                    ],
                ),
                (
                    f"It is {here} now, and the new bridge opens in {many}. "
                    "Which month will that be?",
                    [
                        f"The new bridge opens in {there}, {many} after {here}.",
                        f"That will be {there}, because now it is {here}.",
                    ],
                ),
            ]
        )
    else:
        question, answers = rng.choice(
            [
                (
                    f"The bakery opened in {here}. The builders had begun {many} earlier. "
                    "In which month did they begin?",
                    [
                        f"The builders began in {there}, {many} before the bakery opened.",
                        f"They began in {there}, as the bakery opened in {here}.",
                    ],
                ),
                (
                    f"Which month of the year comes {many} before {here}?",
                    [
                        f"The month that comes {many} before {here} is {there}.",
                        f"Counting {many} back from {here} brings us to {there}.",
                    ],
                ),
                (
                    f"It is {here} now, and {name} learnt to swim {many} ago. "
                    "Which month was that?",
                    [
                        f"{name} learnt to swim in {there}, {many} before {here}.",
                        f"That was in {there}, because now it is {here}.",
                    ],
                ),
            ]
        )
    return question, rng.choice(answers), (here, sign * n)


def hours(rng: random.Random) -> Row:
    """When it ends, when it has to begin, how long it takes."""
    begin = rng.randrange(0, 720, 5)
    minutes = rng.randrange(20, 121, 5)
    start = clock(begin)
    end = clock(begin + minutes)
    long = duration(minutes)
    name = rng.choice(NAMES)
    she = PEOPLE[name]
    show = rng.choice(SHOWS)
    place = rng.choice(PLACES)
    chore = rng.choice(CHORES)
    question, answers = rng.choice(
        [
            (
                rng.choice(
                    [
                        f"The {show} starts at {start} and takes {long}. When is it over?",
                        f"A {show} of {long} begins at {start}. When does it end?",
                    ]
                ),
                [
                    f"The {show} is over at {end}, {long} after it started.",
                    f"It ends at {end}, because it started at {start}.",
                ],
            ),
            (
                rng.choice(
                    [
                        f"{name} has to be at {place} at {end}. The way there takes {long}. "
                        f"When should {she} leave home at the latest?",
                        f"It takes {name} {long} to get to {place}. "
                        f"When must {she} set off to be there at {end}?",
                    ]
                ),
                [
                    f"{name} should set off by {start} to be there at {end}.",
                    f"The latest time for {name} to leave is {start}, {long} before {end}.",
                ],
            ),
            (
                rng.choice(
                    [
                        f"{name} started {chore} at {start} and finished at {end}. "
                        "How long did it take?",
                        f"From {start} until {end}, {name} was busy {chore}. "
                        "For how long was that?",
                    ]
                ),
                [
                    f"It took {name} {long} to get from the start to the end.",
                    f"{name} spent {long} {chore}, from {start} until {end}.",
                ],
            ),
        ]
    )
    return question, rng.choice(answers), (begin, minutes)


def units(rng: random.Random) -> Row:
    large, small, factor, step, saying = rng.choice(UNITS)
    many = rng.randrange(1, 5)
    more = rng.randrange(step, factor, step)
    total = many * factor + more
    both = f"{plural(many, large)} and {plural(more, small)}"
    all_small = plural(total, small)
    larges = PLURALS.get(large, large + "s")
    smalls = PLURALS.get(small, small + "s")
    if rng.random() < 0.6:
        question = f"{saying.format(both)}. " + rng.choice(
            [f"How many {smalls} is that altogether?", f"What is that in {smalls} alone?"]
        )
        answers = [
            f"{capital(both)} are {all_small} altogether.",
            f"That is {all_small}, because there are {spell(factor)} {smalls} in one {large}.",
            f"Written in {smalls} alone, {both} make {all_small}.",
        ]
    else:
        question = f"{saying.format(all_small)}. " + rng.choice(
            [
                f"How many {larges} and {smalls} is that?",
                f"Can you say this in {larges} and {smalls}?",
            ]
        )
        answers = [
            f"That is the same as {both}, with {spell(factor)} {smalls} in one {large}.",
            f"{capital(all_small)} are the same as {both}.",
        ]
    return question, rng.choice(answers), (large, total)


def table(rng: random.Random) -> Row:
    """A list of four, with numbers in digits."""
    heading, names, (unit, low, high), ends, ask_end, tell_end, ask_more, tell_more = rng.choice(
        TABLES
    )
    rows = dict(zip(rng.sample(names, 4), rng.sample(range(low, high + 1), 4), strict=True))
    shown = [f"{name} {n} {unit}{'' if n == 1 else 's'}" for name, n in rows.items()]
    told = rng.choice([f"{heading}: {', '.join(shown)}. ", "\n".join([f"{heading}:", *shown, ""])])
    ranked = sorted(rows, key=rows.get)
    if rng.random() < 0.5:
        which = rng.randrange(2)
        a = b = ranked[-1 if which == 0 else 0]
        end, n, ask, tell = ends[which], rows[a], ask_end, tell_end
    else:
        b, a = sorted(rng.sample(ranked, 2), key=ranked.index)
        end, n, ask, tell = "", rows[a] - rows[b], ask_more, tell_more
    words = {"a": a, "b": b, "end": end, "value": plural(n, unit)}
    return (
        told + ask.format(**words),
        rng.choice(tell).format(**words),
        (sorted(rows.items()), end, a, b),
    )


def turns(rng: random.Random) -> Row:
    start = rng.randrange(4)
    name = rng.choice(NAMES)
    made = rng.choices(list(TURNS), [3, 3, 1], k=rng.choice([2, 3, 3]))
    here = COMPASS[start]
    there = COMPASS[(start + sum(TURNS[turn] for turn in made)) % 4]
    many = spell(len(made))
    orders = ", then ".join(f"turn {turn}" for turn in made)
    question, who = rng.choice(
        [
            (f"You stand facing {here}. You {orders}. Which way are you facing now?", "you are"),
            (
                f"A robot looks {here} and gets these orders: {orders}. "
                "In which direction does it look at the end?",
                "the robot is",
            ),
            (
                f"{name} is facing {here}. We say to {name}: {orders}. "
                f"Which way is {name} facing after that?",
                f"{name} is",
            ),
        ]
    )
    answers = [
        f"{capital(who)} facing {there} after the {many} turns.",
        f"After the {many} turns {who} facing {there}, having started out facing {here}.",
        f"In the end {who} facing {there}, because every turn counts.",
    ]
    return question, rng.choice(answers), (here, made)


def letters(rng: random.Random) -> Row:
    word = rng.choice(SPELLABLE)
    form = rng.choice(["count", "length", "place"])
    if form == "count":
        letter = rng.choice(sorted(set(word), key=lambda x: (-word.count(x), x))[:2])
        times = TIMES[word.count(letter)]
        question = rng.choice(
            [
                f"How many times does the letter {letter} appear in the word {word}?",
                f"Spell the word {word}. How often do you write the letter {letter}?",
            ]
        )
        answers = [
            f"The letter {letter} appears {times} in the word {word}.",
            f"In the word {word} we find the letter {letter} {times}.",
        ]
    elif form == "length":
        many = spell(len(word))
        question = rng.choice(
            [
                f"Count the letters of the word {word}. How many are there?",
                f"How many letters do you need to write the word {word}?",
            ]
        )
        answers = [
            f"The word {word} has {many} letters, from {word[0]} to {word[-1]}.",
            f"You need {many} letters to write the word {word}.",
        ]
    else:
        at = rng.randrange(1, 5)
        question = rng.choice(
            [
                f"What is the {ORDINALS[at]} letter of {word}, counting from the left?",
                f"Which letter comes at the {ORDINALS[at]} place when you spell {word}?",
            ]
        )
        answers = [
            f"The {ORDINALS[at]} letter of the word {word} is {word[at]}.",
            f"When we spell {word}, the {ORDINALS[at]} letter is {word[at]}.",
        ]
    return question, rng.choice(answers), word


# ---- kinds of facts.txt
def odd(rng: random.Random) -> Row:
    """Three of one group and one of another. The fact is the group of the three."""
    (_, many, words), (one, _, others) = rng.sample(GROUPS, 2)
    stranger = rng.choice(others)
    shown = listed(rng.sample([*rng.sample(words, 3), stranger], 4))
    question = rng.choice(
        [
            f"Which of these four is the odd one out, and why: {shown}?",
            f"Three of these words belong together: {shown}. Which one does not belong?",
            f"Look at these words: {shown}. Which of them does not fit, and what is the reason?",
        ]
    )
    answer = rng.choice(
        [
            f"The odd one out is {stranger}, because the other three are {many}.",
            f"The word that does not belong is {stranger}, which is {one}, "
            f"while the others are {many}.",
            f"The other three are {many}, so the one that does not fit is {stranger}.",
        ]
    )
    return question, answer, many


def opposite(rng: random.Random) -> Row:
    pair, *others = rng.sample(OPPOSITES, 4)
    word, wanted = rng.sample(pair, 2)
    shown = listed(rng.sample([wanted, *(rng.choice(other) for other in others)], 4), "or")
    question = rng.choice(
        [
            f"Which of these words means the opposite of {word}: {shown}?",
            f"I am looking for the opposite of {word}. Is it {shown}?",
        ]
    )
    answer = rng.choice(
        [
            f"The word that means the opposite of {word} is {wanted}.",
            f"The opposite of {word} is {wanted}, and the other three words mean something else.",
            f"Out of these four words, {wanted} is the opposite of {word}.",
        ]
    )
    return question, answer, pair


def steps(rng: random.Random) -> Row:
    doing, in_order = rng.choice(STEPS)
    right = in_order.split(" > ")
    mixed = rng.choice([list(p) for p in itertools.permutations(right) if list(p) != right])
    shown = "; ".join(mixed)
    told = rng.choice(
        [
            f"Here are four steps of {doing}, in mixed order: {shown}.",
            f"These are the steps of {doing}, shuffled: {shown}.",
        ]
    )
    form = rng.choice(["first", "last", "after", "before"])
    at = rng.randrange(3)
    earlier, later = right[at : at + 2]
    if form == "first":
        ask = rng.choice(["Which step comes first?", "What do you have to do first?"])
        answers = [
            f"First you have to {right[0]}, and only then can you {right[1]}.",
            f"The first of the four steps is to {right[0]}.",
        ]
    elif form == "last":
        ask = rng.choice(["Which step comes last?", "What do you do at the very end?"])
        answers = [
            f"The last of the four steps is to {right[3]}.",
            f"At the very end you {right[3]}, once everything else is done.",
        ]
    elif form == "after":
        ask = rng.choice(
            [
                f'What do you do right after the step "{earlier}"?',
                f'Which step follows "{earlier}"?',
            ]
        )
        answers = [
            f"The step that follows is to {later}, right after you {earlier}.",
            f"Once that is done, the next step is to {later}.",
        ]
    else:
        ask = rng.choice(
            [
                f'What do you do just before the step "{later}"?',
                f'Which step comes just before "{later}"?',
            ]
        )
        answers = [
            f"The step just before that one is to {earlier}.",
            f"Just before you {later}, you have to {earlier}.",
        ]
    return f"{told} {ask}", rng.choice(answers), doing


def cause(rng: random.Random) -> Row:
    what, effect = rng.choice(CAUSES)
    question = rng.choice(
        [
            f"{sentence(what)} What will most likely happen?",
            f"Imagine that {what}. What do you expect to happen, and why?",
            f"What happens in the end when {what}?",
        ]
    )
    answers = [sentence(effect), f"Most likely {effect}.", f"I would expect that {effect}."]
    return question, rng.choice(answers), what


def advice(rng: random.Random) -> Row:
    trouble, help_ = rng.choice(ADVICE)
    question = rng.choice(
        [
            f"{sentence(trouble)} What can I do about it?",
            f"Can you help me? {sentence(trouble)} What should I try?",
            f"I need some advice for my home: {trouble}. What would you do?",
        ]
    )
    answers = [
        f"You could {help_}.",
        f"It usually helps to {help_}.",
        f"The simplest thing is to {help_}.",
    ]
    return question, rng.choice(answers), trouble


def thing(rng: random.Random) -> Row:
    name, like = rng.choice(THINGS)
    question = rng.choice(
        [
            f"What am I thinking of? {sentence(like)}",
            f"Here is a riddle: {like}. What is it?",
            f"Guess what this is: {like}. What could it be?",
        ]
    )
    answer = rng.choice(
        [
            f"The answer is {name}, because {like}.",
            f"You must be thinking of {name}, because {like}.",
            f"It can only be {name}, the thing that all the clues point to.",
        ]
    )
    return question, answer, name


KINDS = [
    change,
    ages,
    order,
    weekday,
    month,
    hours,
    units,
    table,
    turns,
    letters,
    odd,
    opposite,
    steps,
    cause,
    advice,
    thing,
]


# ---- files
def make_rows(count: int, seed: int, taken: set[str]) -> tuple[list[dict[str, str]], set[str]]:
    """`count` rows, all kinds in equal parts, shuffled -> (rows, the facts they rest on).

    None rests on a fact in `taken`. Facts repeat only where a kind has no new ones.
    """
    rng = random.Random(seed)
    rows = []
    questions = set()
    used = set()
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        for tries in itertools.count(1):
            question, answer, about = kind(rng)
            fact = f"{kind.__name__} {about}"
            new = fact not in used or tries > 200
            if new and fact not in taken and question not in questions:
                break
        rows.append({"question": question, "answer": answer})
        questions.add(question)
        used.add(fact)
    rng.shuffle(rows)
    return rows, used


def make_files() -> dict[str, str]:
    """The text of each file. Test comes first: train takes the facts that are left."""
    test, used = make_rows(TEST, seed=1, taken=set())
    train, _ = make_rows(TRAIN, seed=2, taken=used)
    return {"train.jsonl": jsonl(train), "test.jsonl": jsonl(test)}


def jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    for name, text in make_files().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
