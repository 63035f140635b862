"""Grade-school word problems from a seeded generator, in GSM8K's row format: data without a download."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantkd.errors import DataError

_NAMES = (
    "Ada", "Ben", "Carla", "Dan", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tara", "Uma", "Victor", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
_THINGS = (
    "apples", "pencils", "marbles", "stickers", "cookies", "buttons", "seashells", "postcards", "beads", "balloons",
    "oranges", "cards", "stamps", "ribbons", "coins", "muffins",
)  # fmt: skip
_CONTAINERS = ("boxes", "bags", "packs", "baskets", "jars")


# What a variable is drawn from, or a function of the variables before it that gives the pool, or the value itself.
Pool = Sequence[Any] | Callable[[dict[str, Any]], Any]

# Each row: the variables, in the order in which they are drawn (several names at once are different people); the
# question; the lines of its solution. `[total = count * each]` is computed from left to right and written as
# `3 * 4 = 12`, with a `$` before the result where one stands before the variable. The last result is the answer.
_TEMPLATES: tuple[tuple[dict[str, Pool], str, tuple[str, ...]], ...] = (
    ({"name": _NAMES, "thing": _THINGS, "container": _CONTAINERS, "count": range(3, 13), "each": range(4, 16)},
     "{name} buys {count} {container} of {thing}. Each holds {each} {thing}. How many {thing} are there?",
     ("There are [total = count * each] {thing}.",)),
    ({"giver taker": _NAMES, "thing": _THINGS, "start": range(20, 96), "given": lambda v: range(5, v["start"] - 4)},
     "{giver} has {start} {thing} and gives {given} of them to {taker}. How many {thing} does {giver} keep?",
     ("{giver} keeps [rest = start - given] {thing}.",)),
    ({"name": _NAMES, "thing": _THINGS, "friends": range(3, 10), "part": range(3, 15),
      "total": lambda v: v["friends"] * v["part"]},
     "{name} shares {total} {thing} equally among {friends} friends. How many {thing} does each friend get?",
     ("Each friend gets [each = total / friends] {thing}.",)),
    ({"name": _NAMES, "thing": _THINGS, "container": _CONTAINERS, "count": range(3, 11), "each": range(5, 13),
      "lost": lambda v: range(2, v["count"] * v["each"] - 1)},
     "{name} fills {count} {container} with {each} {thing} each. Later {name} gives away {lost} {thing}. "
     "How many {thing} are left?",
     ("{name} starts with [total = count * each] {thing}.",
      "After giving some away, [rest = total - lost] {thing} are left.")),
    ({"name": _NAMES, "thing": _THINGS, "count": range(2, 10), "price": range(2, 10),
      "paid": lambda v: [bill for bill in (20, 50, 100) if bill > v["count"] * v["price"]]},
     "{name} buys {count} {thing} at ${price} each and pays with a ${paid} bill. "
     "How many dollars of change does {name} get?",
     ("The {thing} cost [$cost = count * price].", "The change is [$change = paid - cost].")),
    ({"first second": _NAMES, "thing": _THINGS, "few": range(4, 26), "factor": range(2, 6)},
     "{first} has {few} {thing}. {second} has {factor} times as many. How many {thing} do they have together?",
     ("{second} has [many = few * factor] {thing}.", "Together they have [both = few + many] {thing}.")),
    ({"name": _NAMES, "wage": range(8, 21), "hours": range(2, 9), "days": range(2, 7),
      "spent": lambda v: range(10, v["wage"] * v["hours"] * v["days"] - 4)},
     "{name} earns ${wage} an hour and works {hours} hours a day for {days} days. Then {name} spends ${spent}. "
     "How many dollars are left?",
     ("In one day {name} earns [$daily = wage * hours].", "In {days} days that is [$total = daily * days].",
      "After spending, [$rest = total - spent] are left.")),
    ({"start": range(12, 51), "off": lambda v: range(3, v["start"] - 2), "on": range(2, 26),
      "place": ("the station", "the market", "the school", "the library", "the harbor", "the museum")},
     "A bus carries {start} people. At {place} {off} people get off and {on} get on. "
     "How many people are on the bus now?",
     ("After people get off, [rest = start - off] remain.",
      "After others get on, there are [now = rest + on] people.")),
    ({"name": _NAMES, "daily": range(8, 36), "days": range(3, 10), "more": range(10, 151),
      "pages": lambda v: v["daily"] * v["days"] + v["more"]},
     "{name} reads {daily} pages a day of a book that has {pages} pages. "
     "How many pages are left to read after {days} days?",
     ("In {days} days {name} reads [read = daily * days] pages.", "That leaves [rest = pages - read] pages.")),
    ({"hens": (6, 12, 18, 24, 30, 36), "each": (2, 4, 6), "price": range(2, 8)},
     "A farm has {hens} hens, and each lays {each} eggs a week. A dozen eggs sells for ${price}. "
     "How many dollars does the farm make in a week?",
     ("The hens lay [eggs = hens * each] eggs.", "That is [dozens = eggs / 12] dozen.",
      "The farm makes [$total = dozens * price].")),
    ({"first second third": _NAMES, "age": range(3, 13), "factor": range(2, 5), "more": range(2, 16)},
     "{third} is {age} years old. {second} is {factor} times as old as {third}, and {first} is {more} years "
     "older than {second}. How old is {first}?",
     ("{second} is [middle = age * factor] years old.", "{first} is [oldest = middle + more] years old.")),
    ({"name": _NAMES, "percent": (10, 20, 25, 50),
      "item": ("jacket", "lamp", "bicycle", "backpack", "watch", "chair", "radio", "tent"),
      "units": range(2, 25), "price": lambda v: v["units"] * (100 // v["percent"])},
     "A {item} costs ${price}. {name} has a coupon for {percent}% off. "
     "How many dollars does {name} pay for the {item}?",
     ("The coupon saves [$off = price * percent / 100].", "{name} pays [$rest = price - off].")),
    ({"name": _NAMES, "moves": ("drives", "cycles", "travels", "rides"), "fast": range(30, 71),
      "slow": range(10, 30), "hours": range(2, 7), "more": range(2, 7)},
     "{name} {moves} at {fast} miles an hour for {hours} hours, then at {slow} miles an hour for {more} hours. "
     "How many miles does {name} go in all?",
     ("The first part is [first = fast * hours] miles.", "The second part is [second = slow * more] miles.",
      "In all that is [all = first + second] miles.")),
    ({"name": _NAMES, "width": range(3, 16), "length": range(16, 31), "price": range(2, 10)},
     "{name} puts a fence around a garden that is {length} feet long and {width} feet wide. "
     "The fence costs ${price} a foot. How many dollars does it cost?",
     ("One long and one short side make [half = length + width] feet.",
      "The whole fence is [around = 2 * half] feet.", "It costs [$cost = around * price].")),
    ({"name": _NAMES, "weekly": range(4, 21), "time": range(3, 13), "have": range(5, 61),
      "cost": lambda v: v["have"] + v["weekly"] * v["time"]},
     "{name} wants a game that costs ${cost} and already has ${have}. {name} saves ${weekly} a week. "
     "How many weeks does it take to have enough?",
     ("{name} still needs [$missing = cost - have].", "That takes [weeks = missing / weekly] weeks.")),
    ({"event": ("concert", "circus", "museum", "zoo", "play", "fair"), "adults": range(2, 10),
      "children": range(2, 13), "price": range(9, 21), "cheap": range(3, 9)},
     "A ticket for the {event} costs ${price} for an adult and ${cheap} for a child. "
     "How many dollars do {adults} adults and {children} children pay together?",
     ("The adults pay [$full = adults * price].", "The children pay [$reduced = children * cheap].",
      "Together they pay [$total = full + reduced].")),
)  # fmt: skip

_MAX_FRUITLESS_DRAWS = 2_000  # in a row, after which the supply of new problems counts as used up
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_RESULT = re.compile(r"\[(\$?)(\w+) = ([^\]]*)\]")


def generate_problems(
    n: int, seed: int, *, exclude: Iterable[Mapping[str, str]] = (), max_steps: int = 3
) -> list[dict[str, str]]:
    """Word problems with whole answers, their solutions written out as GSM8K's are.

    Args:
        n: how many.
        seed: the same seed gives the same problems.
        exclude: problems of which none is made again.
        max_steps: of a solution, 1 to 3.

    Returns:
        A `question` and an `answer` each; the answer ends in `#### ` and the number.

    Raises:
        DataError: arguments outside their range, or more problems than there are.
    """
    if n < 1:
        raise DataError(f"{n} problems were asked for; expected at least 1.")
    if max_steps not in (1, 2, 3):
        raise DataError(f"max_steps is {max_steps}; expected 1, 2 or 3.")
    rng = random.Random(seed)
    seen = {row["question"] for row in exclude}
    rows: list[dict[str, str]] = []
    fruitless = 0
    while len(rows) < n:
        question, steps, answer = _make_problem(rng)
        if len(steps) > max_steps:
            continue
        if question in seen:
            fruitless += 1
            if fruitless == _MAX_FRUITLESS_DRAWS:
                raise DataError(f"Only {len(rows)} new problems were found of {n} that were asked for. Ask for fewer.")
            continue
        fruitless = 0
        seen.add(question)
        rows.append({"question": question, "answer": "\n".join([*steps, f"#### {answer}"])})
    return rows


def _make_problem(rng: random.Random) -> tuple[str, list[str], int]:
    """A question, the lines of its solution, and the answer."""
    variables, question, steps = rng.choice(_TEMPLATES)
    values: dict[str, Any] = {}
    for names, pool in variables.items():
        drawn = pool(values) if callable(pool) else pool
        people = names.split()
        if len(people) > 1:
            values |= zip(people, rng.sample(drawn, len(people)), strict=True)
        else:
            values[names] = drawn if isinstance(drawn, int) else rng.choice(drawn)

    def compute(match: re.Match[str]) -> str:
        dollar, name, expression = match.groups()
        words = [str(values.get(word, word)) for word in expression.split()]
        result = int(words[0])
        for sign, number in zip(words[1::2], map(int, words[2::2]), strict=True):
            result = _OPERATIONS[sign](result, number)
        values[name] = result
        return f"{' '.join(words)} = {dollar}{result}"

    solution = [_RESULT.sub(compute, step).format(**values) for step in steps]
    return question.format(**values), solution, list(values.values())[-1]
