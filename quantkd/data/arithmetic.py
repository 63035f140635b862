"""Grade-school word problems from a seeded generator, in GSM8K's row format: data without a download."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

from quantkd.errors import DataError

# One problem: its question, the lines of its solution, and the answer.
Problem = tuple[str, list[str], int]

_NAMES = (
    "Ada", "Ben", "Carla", "Dan", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Rosa", "Sam", "Tara", "Uma", "Victor", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
_THINGS = (
    "apples", "pencils", "marbles", "stickers", "cookies", "buttons", "seashells", "postcards", "beads", "balloons",
    "oranges", "cards", "stamps", "ribbons", "coins", "muffins",
)  # fmt: skip
_CONTAINERS = ("boxes", "bags", "packs", "baskets", "jars")

# After this many draws in a row without a new problem the supply counts as used up.
_MAX_FRUITLESS_DRAWS = 2_000


def generate_problems(
    n: int, seed: int, *, exclude: Iterable[Mapping[str, str]] = (), max_steps: int = 3
) -> list[dict[str, str]]:
    """Word problems of one to three steps with whole answers, their solutions written out.

    Example:
        >>> train = generate_problems(100, seed=0)
        >>> test = generate_problems(20, seed=1, exclude=train)
        >>> {row["question"] for row in train} & {row["question"] for row in test}
        set()
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
        question, steps, answer = rng.choice(_TEMPLATES)(rng)
        if len(steps) > max_steps:
            continue
        if question in seen:
            fruitless += 1
            if fruitless == _MAX_FRUITLESS_DRAWS:
                raise DataError(
                    f"Only {len(rows)} new problems were found of {n} that were asked for ({len(seen) - len(rows)} are "
                    "excluded). Ask for fewer, or exclude fewer."
                )
            continue
        fruitless = 0
        seen.add(question)
        rows.append({"question": question, "answer": "\n".join([*steps, f"#### {answer}"])})
    return rows


def _product(rng: random.Random) -> Problem:
    name, thing, container = rng.choice(_NAMES), rng.choice(_THINGS), rng.choice(_CONTAINERS)
    count, each = rng.randint(3, 12), rng.randint(4, 15)
    question = f"{name} buys {count} {container} of {thing}. Each holds {each} {thing}. How many {thing} are there?"
    return question, [f"There are {count} * {each} = {count * each} {thing}."], count * each


def _difference(rng: random.Random) -> Problem:
    (giver, taker), thing = rng.sample(_NAMES, 2), rng.choice(_THINGS)
    start = rng.randint(20, 95)
    given = rng.randint(5, start - 5)
    question = f"{giver} has {start} {thing} and gives {given} of them to {taker}. How many {thing} does {giver} keep?"
    return question, [f"{giver} keeps {start} - {given} = {start - given} {thing}."], start - given


def _share(rng: random.Random) -> Problem:
    name, thing, friends, each = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(3, 9), rng.randint(3, 14)
    total = friends * each
    question = f"{name} shares {total} {thing} equally among {friends} friends. How many {thing} does each friend get?"
    return question, [f"Each friend gets {total} / {friends} = {each} {thing}."], each


def _product_and_difference(rng: random.Random) -> Problem:
    name, thing, container = rng.choice(_NAMES), rng.choice(_THINGS), rng.choice(_CONTAINERS)
    count, each = rng.randint(3, 10), rng.randint(5, 12)
    total = count * each
    lost = rng.randint(2, total - 2)
    question = (
        f"{name} fills {count} {container} with {each} {thing} each. Later {name} gives away {lost} {thing}. "
        f"How many {thing} are left?"
    )
    return question, [
        f"{name} starts with {count} * {each} = {total} {thing}.",
        f"After giving some away, {total} - {lost} = {total - lost} {thing} are left.",
    ], total - lost  # fmt: skip


def _change(rng: random.Random) -> Problem:
    name, thing, count, price = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 9), rng.randint(2, 9)
    cost = count * price
    paid = rng.choice([bill for bill in (20, 50, 100) if bill > cost])
    question = (
        f"{name} buys {count} {thing} at ${price} each and pays with a ${paid} bill. "
        f"How many dollars of change does {name} get?"
    )
    return question, [
        f"The {thing} cost {count} * {price} = ${cost}.",
        f"The change is {paid} - {cost} = ${paid - cost}.",
    ], paid - cost  # fmt: skip


def _times_as_many(rng: random.Random) -> Problem:
    (first, second), thing = rng.sample(_NAMES, 2), rng.choice(_THINGS)
    few, factor = rng.randint(4, 25), rng.randint(2, 5)
    many = few * factor
    question = (
        f"{first} has {few} {thing}. {second} has {factor} times as many. How many {thing} do they have together?"
    )
    return question, [
        f"{second} has {few} * {factor} = {many} {thing}.",
        f"Together they have {few} + {many} = {few + many} {thing}.",
    ], few + many  # fmt: skip


def _wages(rng: random.Random) -> Problem:
    name, wage, hours, days = rng.choice(_NAMES), rng.randint(8, 20), rng.randint(2, 8), rng.randint(2, 6)
    daily, total = wage * hours, wage * hours * days
    spent = rng.randint(10, total - 5)
    question = (
        f"{name} earns ${wage} an hour and works {hours} hours a day for {days} days. Then {name} spends ${spent}. "
        "How many dollars are left?"
    )
    return question, [
        f"In one day {name} earns {wage} * {hours} = ${daily}.",
        f"In {days} days that is {daily} * {days} = ${total}.",
        f"After spending, {total} - {spent} = ${total - spent} are left.",
    ], total - spent  # fmt: skip


def _bus(rng: random.Random) -> Problem:
    start = rng.randint(12, 50)
    off, on = rng.randint(3, start - 3), rng.randint(2, 25)
    place = rng.choice(("the station", "the market", "the school", "the library", "the harbor", "the museum"))
    question = (
        f"A bus carries {start} people. At {place} {off} people get off and {on} get on. "
        "How many people are on the bus now?"
    )
    return question, [
        f"After people get off, {start} - {off} = {start - off} remain.",
        f"After others get on, there are {start - off} + {on} = {start - off + on} people.",
    ], start - off + on  # fmt: skip


def _reading(rng: random.Random) -> Problem:
    name, daily, days = rng.choice(_NAMES), rng.randint(8, 35), rng.randint(3, 9)
    read = daily * days
    pages = read + rng.randint(10, 150)
    question = (
        f"{name} reads {daily} pages a day of a book that has {pages} pages. "
        f"How many pages are left to read after {days} days?"
    )
    return question, [
        f"In {days} days {name} reads {daily} * {days} = {read} pages.",
        f"That leaves {pages} - {read} = {pages - read} pages.",
    ], pages - read  # fmt: skip


def _eggs(rng: random.Random) -> Problem:
    hens, each, price = rng.choice((6, 12, 18, 24, 30, 36)), rng.choice((2, 4, 6)), rng.randint(2, 7)
    eggs = hens * each
    dozens = eggs // 12  # hens is a multiple of 6 and each of 2, so this is exact
    question = (
        f"A farm has {hens} hens, and each lays {each} eggs a week. A dozen eggs sells for ${price}. "
        "How many dollars does the farm make in a week?"
    )
    return question, [
        f"The hens lay {hens} * {each} = {eggs} eggs.",
        f"That is {eggs} / 12 = {dozens} dozen.",
        f"The farm makes {dozens} * {price} = ${dozens * price}.",
    ], dozens * price  # fmt: skip


def _ages(rng: random.Random) -> Problem:
    first, second, third = rng.sample(_NAMES, 3)
    youngest, factor, more = rng.randint(3, 12), rng.randint(2, 4), rng.randint(2, 15)
    middle = youngest * factor
    question = (
        f"{third} is {youngest} years old. {second} is {factor} times as old as {third}, and {first} is {more} years "
        f"older than {second}. How old is {first}?"
    )
    return question, [
        f"{second} is {youngest} * {factor} = {middle} years old.",
        f"{first} is {middle} + {more} = {middle + more} years old.",
    ], middle + more  # fmt: skip


def _discount(rng: random.Random) -> Problem:
    name, percent = rng.choice(_NAMES), rng.choice((10, 20, 25, 50))
    item = rng.choice(("jacket", "lamp", "bicycle", "backpack", "watch", "chair", "radio", "tent"))
    price = rng.randint(2, 24) * (100 // percent)
    off = price * percent // 100
    question = (
        f"A {item} costs ${price}. {name} has a coupon for {percent}% off. "
        f"How many dollars does {name} pay for the {item}?"
    )
    return question, [
        f"The coupon saves {price} * {percent} / 100 = ${off}.",
        f"{name} pays {price} - {off} = ${price - off}.",
    ], price - off  # fmt: skip


def _journey(rng: random.Random) -> Problem:
    name, vehicle = rng.choice(_NAMES), rng.choice(("drives", "cycles", "travels", "rides"))
    fast, slow = rng.randint(30, 70), rng.randint(10, 29)
    hours, more = rng.randint(2, 6), rng.randint(2, 6)
    question = (
        f"{name} {vehicle} at {fast} miles an hour for {hours} hours, then at {slow} miles an hour for {more} hours. "
        f"How many miles does {name} go in all?"
    )
    first, second = fast * hours, slow * more
    return question, [
        f"The first part is {fast} * {hours} = {first} miles.",
        f"The second part is {slow} * {more} = {second} miles.",
        f"In all that is {first} + {second} = {first + second} miles.",
    ], first + second  # fmt: skip


def _fence(rng: random.Random) -> Problem:
    name, width, length, price = rng.choice(_NAMES), rng.randint(3, 15), rng.randint(16, 30), rng.randint(2, 9)
    half, around = width + length, 2 * (width + length)
    question = (
        f"{name} puts a fence around a garden that is {length} feet long and {width} feet wide. "
        f"The fence costs ${price} a foot. How many dollars does it cost?"
    )
    return question, [
        f"One long and one short side make {length} + {width} = {half} feet.",
        f"The whole fence is 2 * {half} = {around} feet.",
        f"It costs {around} * {price} = ${around * price}.",
    ], around * price  # fmt: skip


def _savings(rng: random.Random) -> Problem:
    name, weekly, weeks, have = rng.choice(_NAMES), rng.randint(4, 20), rng.randint(3, 12), rng.randint(5, 60)
    missing = weekly * weeks
    question = (
        f"{name} wants a game that costs ${have + missing} and already has ${have}. {name} saves ${weekly} a week. "
        "How many weeks does it take to have enough?"
    )
    return question, [
        f"{name} still needs {have + missing} - {have} = ${missing}.",
        f"That takes {missing} / {weekly} = {weeks} weeks.",
    ], weeks  # fmt: skip


def _tickets(rng: random.Random) -> Problem:
    event = rng.choice(("concert", "circus", "museum", "zoo", "play", "fair"))
    adults, children, price, cheap = rng.randint(2, 9), rng.randint(2, 12), rng.randint(9, 20), rng.randint(3, 8)
    full, reduced = adults * price, children * cheap
    question = (
        f"A ticket for the {event} costs ${price} for an adult and ${cheap} for a child. "
        f"How many dollars do {adults} adults and {children} children pay together?"
    )
    return question, [
        f"The adults pay {adults} * {price} = ${full}.",
        f"The children pay {children} * {cheap} = ${reduced}.",
        f"Together they pay {full} + {reduced} = ${full + reduced}.",
    ], full + reduced  # fmt: skip


_TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    _product, _difference, _share, _product_and_difference, _change, _times_as_many, _wages, _bus, _reading, _eggs,
    _ages, _discount, _journey, _fence, _savings, _tickets,
)  # fmt: skip
