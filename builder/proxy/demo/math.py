"""Word problems with worked answers; the wrong ones misreckon, use the wrong operation, or slip on the way."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from builder.proxy.demo import draw
from builder.proxy.items import Item


@dataclass(frozen=True, slots=True)
class Problem:
    """A situation with names and numbers left open.

    A number is drawn from its range, or follows from the numbers before it. A solution's [sums] are worked out when it
    is written down, `_` being the result of the sum before.
    """

    question: str
    numbers: dict[str, range | str]
    right: str
    wrong: str
    slip: str


NAMES = (
    *("Anna", "Ben", "Clara", "Dan", "Eva", "Felix", "Gina", "Hugo", "Ivan", "Julia", "Kim", "Leo", "Mia", "Nora"),
    *("Omar", "Paul", "Rita", "Sam", "Tom", "Zoe"),
)
MISSES = (-10, -3, -2, -1, 1, 2, 3, 10)
"""How far a misreckoned result may be from the right one."""

PROBLEMS = (
    Problem(
        "{who} picks {a} apples before lunch and {b} apples after lunch. How many apples does {who} pick?",
        {"a": range(10, 31), "b": range(3, 10)},
        right="{who} picks [a + b] apples.",
        wrong="{who} picks [a - b] apples.",
        slip="{who} picks [a + a] apples.",
    ),
    Problem(
        "{who} has {a} stickers and gives {b} of them to {pal}. How many stickers does {who} have left?",
        {"a": range(25, 51), "b": range(4, 12)},
        right="{who} has [a - b] stickers left.",
        wrong="{who} has [a + b] stickers left.",
        slip="{who} has [a - b - b] stickers left.",
    ),
    Problem(
        "{who} buys {a} notebooks that cost {b} dollars each. How much does {who} pay?",
        {"a": range(4, 13), "b": range(3, 8)},
        right="{who} pays [a * b] dollars.",
        wrong="{who} pays [a + b] dollars.",
        slip="{who} pays [a * b + b] dollars.",
    ),
    Problem(
        "{who} shares {n} cookies equally among {b} children. How many cookies does each child get?",
        {"b": range(3, 9), "k": range(3, 11), "n": "b * k"},
        right="Each child gets [n / b] cookies.",
        wrong="Each child gets [n - b] cookies.",
        slip="Each child gets [n / b + b] cookies.",
    ),
    Problem(
        "{who} is {a} years old. {pal} is {b} years younger. How old will {pal} be in {c} years?",
        {"a": range(18, 41), "b": range(3, 9), "c": range(4, 13)},
        right="{pal} is [a - b] years old now and will be [_ + c].",
        wrong="{pal} is [a + b] years old now and will be [_ + c].",
        slip="{pal} is [a - b] years old now and will be [_ - c].",
    ),
    Problem(
        "A bus drives {a} kilometers every hour. How far does it drive in {b} hours?",
        {"a": range(30, 91, 10), "b": range(2, 8)},
        right="The bus drives [a * b] kilometers.",
        wrong="The bus drives [a + b] kilometers.",
        slip="The bus drives [a * b - a] kilometers.",
    ),
    Problem(
        "The lake is {n} kilometers away. {who} cycles {b} kilometers each hour. How many hours does the ride take?",
        {"b": range(8, 19), "k": range(2, 7), "n": "b * k"},
        right="The ride takes [n / b] hours.",
        wrong="The ride takes [n - b] hours.",
        slip="The ride takes [n / b + b] hours.",
    ),
    Problem(
        "{who} buys a lamp for {b} dollars and pays with a {n} dollar bill. How much change does {who} get?",
        {"n": range(50, 101, 50), "b": range(12, 45)},
        right="{who} gets [n - b] dollars back.",
        wrong="{who} gets [n + b] dollars back.",
        slip="{who} gets [n - b - 10] dollars back.",
    ),
    Problem(
        "{who} buys {a} pens for {b} dollars each and a bag for {c} dollars. How much does {who} spend?",
        {"a": range(3, 9), "b": range(2, 6), "c": range(12, 31)},
        right="The pens cost [a * b] dollars, so {who} spends [_ + c] dollars.",
        wrong="The pens cost [a + b] dollars, so {who} spends [_ + c] dollars.",
        slip="The pens cost [a * b] dollars, so {who} spends [c - _] dollars.",
    ),
    Problem(
        "A garden is {a} meters long and {b} meters wide. What is the area of the garden in square meters?",
        {"a": range(8, 16), "b": range(3, 8)},
        right="The area is [a * b] square meters.",
        wrong="The area is [a + b] square meters.",
        slip="The area is [2 * a + 2 * b] square meters.",
    ),
    Problem(
        "{who} builds a fence around a yard that is {a} meters long and {b} meters wide. How long is the fence?",
        {"a": range(12, 26), "b": range(5, 12)},
        right="The fence is [2 * a + 2 * b] meters long.",
        wrong="The fence is [a * b] meters long.",
        slip="The fence is [a + b] meters long.",
    ),
    Problem(
        "There are {n} students in a school and {p} percent of them walk there. How many students walk to school?",
        {"n": range(110, 310, 20), "p": range(10, 70, 10)},
        right="There are [n * p / 100] students who walk.",
        wrong="There are [n - p] students who walk.",
        slip="There are [n / 10] students who walk.",
    ),
    Problem(
        "A jacket costs {n} dollars. Today the price is {p} percent lower. What does the jacket cost today?",
        {"n": range(60, 210, 10), "p": range(10, 50, 10)},
        right="The discount is [n * p / 100] dollars, so the jacket costs [n - _] dollars.",
        wrong="The discount is [n * p / 100] dollars, so the jacket costs [n + _] dollars.",
        slip="The discount is {p} dollars, so the jacket costs [n - p] dollars.",
    ),
    Problem(
        "A ferry leaves at {a} in the morning and arrives at {b} in the morning. How many hours is it on the water?",
        {"a": range(2, 6), "b": range(8, 12)},
        right="The ferry is on the water for [b - a] hours.",
        wrong="The ferry is on the water for [b + a] hours.",
        slip="The ferry is on the water for [b - a - 1] hours.",
    ),
    Problem(
        "A film lasts {a} hours and {b} minutes. How many minutes is that?",
        {"a": range(2, 5), "b": range(5, 56, 5)},
        right="The hours are [a * 60] minutes, so the film lasts [_ + b] minutes.",
        wrong="The hours are [a * 60] minutes, so the film lasts [_ - b] minutes.",
        slip="The hours are [a * 100] minutes, so the film lasts [_ + b] minutes.",
    ),
    Problem(
        "{who} puts {a} dollars into a piggy bank every week. How much is in it after {b} weeks?",
        {"a": range(4, 13), "b": range(6, 16)},
        right="There are [a * b] dollars in the piggy bank.",
        wrong="There are [a + b] dollars in the piggy bank.",
        slip="There are [a * b - a] dollars in the piggy bank.",
    ),
    Problem(
        (
            "A bike costs {n} dollars. {who} already has {c} dollars and saves {b} dollars a week. How many weeks must"
            " {who} save?"
        ),
        {"b": range(8, 16), "k": range(4, 11), "c": range(20, 61), "n": "b * k + c"},
        right="{who} still needs [n - c] dollars, which takes [_ / b] weeks.",
        wrong="{who} still needs [n - c] dollars, which takes [_ - b] weeks.",
        slip="{who} still needs [n - c] dollars, which takes [_ / b + 2] weeks.",
    ),
    Problem(
        "A book has {n} pages. {who} reads {b} pages a day. How many pages are left after {a} days?",
        {"n": range(120, 201, 10), "b": range(8, 15), "a": range(3, 8)},
        right="{who} reads [a * b] pages, so [n - _] pages are left.",
        wrong="{who} reads [a + b] pages, so [n - _] pages are left.",
        slip="{who} reads [a * b] pages, so [n + _] pages are left.",
    ),
    Problem(
        "A hall has {a} rows of {b} chairs, but {c} chairs are broken. How many chairs can be used?",
        {"a": range(6, 13), "b": range(8, 15), "c": range(4, 18)},
        right="There are [a * b] chairs, so [_ - c] can be used.",
        wrong="There are [a * b] chairs, so [_ + c] can be used.",
        slip="There are [a + b] chairs, so [_ - c] can be used.",
    ),
    Problem(
        "A box holds 12 eggs. A farmer has {n} eggs. How many boxes can the farmer fill?",
        {"k": range(3, 12), "n": "12 * k"},
        right="The farmer can fill [n / 12] boxes.",
        wrong="The farmer can fill [n - 12] boxes.",
        slip="The farmer can fill [n / 6] boxes.",
    ),
    Problem(
        "There are {a} cows and {b} chickens on a farm. How many legs do they have altogether?",
        {"a": range(4, 12), "b": range(5, 16)},
        right="They have [4 * a + 2 * b] legs.",
        wrong="They have [a + b] legs.",
        slip="They have [2 * a + 2 * b] legs.",
    ),
    Problem(
        (
            "At noon it is {a} degrees. By the evening the temperature has dropped by {b} degrees. How warm is it in "
            "the evening?"
        ),
        {"a": range(16, 33), "b": range(4, 11)},
        right="It is [a - b] degrees in the evening.",
        wrong="It is [a + b] degrees in the evening.",
        slip="It is [a - b - b] degrees in the evening.",
    ),
    Problem(
        (
            "A shop gets {a} boxes. Each box has {b} bags and each bag has {c} candies. How many candies does the shop"
            " get?"
        ),
        {"a": range(3, 8), "b": range(4, 9), "c": range(5, 11)},
        right="There are [a * b] bags and [_ * c] candies.",
        wrong="There are [a + b] bags and [_ * c] candies.",
        slip="There are [a * b] bags and [_ + c] candies.",
    ),
    Problem(
        "A ribbon is {n} centimeters long. {who} cuts it into {b} equal pieces. How long is each piece?",
        {"b": range(4, 10), "k": range(6, 16), "n": "b * k"},
        right="Each piece is [n / b] centimeters long.",
        wrong="Each piece is [n - b] centimeters long.",
        slip="Each piece is [n / b - 1] centimeters long.",
    ),
    Problem(
        (
            "A path is {n} meters long. There is a lamp every {b} meters and one at the very start. How many lamps are"
            " there?"
        ),
        {"b": range(5, 13), "k": range(5, 15), "n": "b * k"},
        right="There are [n / b] gaps, so there are [_ + 1] lamps.",
        wrong="There are [n / b] gaps, so there are [_ - 1] lamps.",
        slip="There is a lamp for each gap, so there are [n / b] lamps.",
    ),
    Problem(
        (
            "One tap gives {a} liters a minute and another gives {b} liters a minute. How much water do both give in "
            "{c} minutes?"
        ),
        {"a": range(9, 16), "b": range(3, 8), "c": range(4, 11)},
        right="Both give [a + b] liters a minute, so they give [_ * c] liters.",
        wrong="Both give [a - b] liters a minute, so they give [_ * c] liters.",
        slip="Both give [a + b] liters a minute, so they give [_ + c] liters.",
    ),
    Problem(
        (
            "{who} earns {b} dollars an hour and works {a} hours. Then {who} spends {c} dollars on dinner. How much is"
            " left?"
        ),
        {"a": range(4, 9), "b": range(11, 19), "c": range(8, 24)},
        right="{who} earns [a * b] dollars and has [_ - c] dollars left.",
        wrong="{who} earns [a * b] dollars and has [_ + c] dollars left.",
        slip="{who} earns [a + b] dollars and has [_ - c] dollars left.",
    ),
    Problem(
        "{who} has {a} marbles. {pal} has three times as many. How many marbles do they have together?",
        {"a": range(6, 21)},
        right="{pal} has [3 * a] marbles, so together they have [_ + a].",
        wrong="{pal} has [3 + a] marbles, so together they have [_ + a].",
        slip="{pal} has [3 * a] marbles, so together they have [_ - a].",
    ),
    Problem(
        "{who} bakes {n} muffins and sells half of them. How many muffins does {who} sell?",
        {"n": range(18, 61, 2)},
        right="{who} sells [n / 2] muffins.",
        wrong="{who} sells [n * 2] muffins.",
        slip="{who} sells [n - 2] muffins.",
    ),
    Problem(
        "A tank holds {n} liters of oil. A quarter of the oil is used. How many liters are left?",
        {"n": range(40, 121, 4)},
        right="The part used is [n / 4] liters, so [n - _] liters are left.",
        wrong="The part used is [n / 4] liters, so [n + _] liters are left.",
        slip="The part used is 4 liters, so [n - 4] liters are left.",
    ),
    Problem(
        "{who} throws three balls {a}, {b} and {c} meters far. What is the average distance?",
        {"a": range(11, 16), "b": range(10, 15), "m": range(12, 18), "c": "3 * m - a - b"},
        right="The throws add up to [a + b + c] meters, so the average is [_ / 3] meters.",
        wrong="The throws add up to [a + b + c] meters, so the average is [_ - 3] meters.",
        slip="The first two throws add up to [a + b] meters, so the average is [_ - c] meters.",
    ),
    Problem(
        "A square table has a perimeter of {n} decimeters. How long is one side?",
        {"n": range(24, 81, 4)},
        right="One side is [n / 4] decimeters long.",
        wrong="One side is [n - 4] decimeters long.",
        slip="One side is [n / 2] decimeters long.",
    ),
    Problem(
        "A crate is {a} cm long, {b} cm wide and {c} cm high. What is its volume in cubic centimeters?",
        {"a": range(10, 16), "b": range(5, 10), "c": range(3, 7)},
        right="The base is [a * b] square centimeters, so the volume is [_ * c].",
        wrong="The base is [a + b] square centimeters, so the volume is [_ * c].",
        slip="The base is [a * b] square centimeters, so the volume is [_ + c].",
    ),
    Problem(
        (
            "One cake needs {a} cups of flour. {who} wants to bake {b} cakes and has {c} cups. How many more cups are "
            "needed?"
        ),
        {"a": range(3, 7), "b": range(5, 11), "c": range(4, 13)},
        right="The cakes need [a * b] cups, so [_ - c] more cups are needed.",
        wrong="The cakes need [a * b] cups, so [_ + c] more cups are needed.",
        slip="The cakes need [a + b] cups, so [_ - c] more cups are needed.",
    ),
    Problem(
        (
            "There are {a} people on a tram. At the next stop {b} people get off and {c} people get on. How many "
            "people are on the tram now?"
        ),
        {"a": range(25, 51), "b": range(5, 15), "c": range(3, 13)},
        right="After the stop there are [a - b + c] people on the tram.",
        wrong="After the stop there are [a + b + c] people on the tram.",
        slip="After the stop there are [a - b - c] people on the tram.",
    ),
    Problem(
        (
            "A library puts {n} books evenly on {b} shelves. Then {c} more books are added to the top shelf. How many "
            "books are on the top shelf?"
        ),
        {"b": range(4, 9), "k": range(9, 21), "c": range(3, 9), "n": "b * k"},
        right="Each shelf gets [n / b] books, so the top shelf has [_ + c] books.",
        wrong="Each shelf gets [n / b] books, so the top shelf has [_ - c] books.",
        slip="The shelves get {n} books, so the top shelf has [n + c] books.",
    ),
    Problem(
        "On a trip there are {n} students and {c} teachers. One van seats {b} people. How many vans are needed?",
        {"b": range(6, 10), "k": range(4, 10), "c": range(3, 7), "n": "b * k - c"},
        right="There are [n + c] people, so [_ / b] vans are needed.",
        wrong="There are [n + c] people, so [_ - b] vans are needed.",
        slip="There are [n + c] people, so [_ / b - 1] vans are needed.",
    ),
    Problem(
        (
            "There are {b} steps between one floor and the next. {who} walks from floor 1 up to floor {a}. How many "
            "steps does {who} climb?"
        ),
        {"a": range(5, 11), "b": range(12, 21)},
        right="{who} goes up [a - 1] floors and climbs [_ * b] steps.",
        wrong="{who} goes up [a + 1] floors and climbs [_ * b] steps.",
        slip="{who} goes up {a} floors and climbs [a * b] steps.",
    ),
    Problem(
        (
            "It rained {a} mm on Monday, {b} mm on Tuesday and {c} mm on Wednesday. How much did it rain in the three "
            "days?"
        ),
        {"a": range(8, 21), "b": range(5, 16), "c": range(2, 8)},
        right="It rained [a + b + c] mm.",
        wrong="It rained [a + b - c] mm.",
        slip="It rained [a + b] mm.",
    ),
    Problem(
        "The Bears score {a} points and the Hawks score {b} points. By how many points do the Bears win?",
        {"a": range(60, 91), "b": range(35, 58)},
        right="The Bears win by [a - b] points.",
        wrong="The Bears win by [a + b] points.",
        slip="The Bears win by [a - b + 10] points.",
    ),
    Problem(
        (
            "A choir has {n} singers and {b} of them are women. The others are men. How many more women than men are "
            "there?"
        ),
        {"m": range(6, 15), "d": range(4, 13), "b": "m + d", "n": "m + b"},
        right="There are [n - b] men, so there are [b - _] more women.",
        wrong="There are [n - b] men, so there are [b + _] more women.",
        slip="There are {n} men, so there are [n - b] more women.",
    ),
    Problem(
        "A set of {c} candles costs {n} dollars. How much do {d} such candles cost?",
        {"c": range(3, 7), "k": range(2, 6), "d": range(8, 13), "n": "c * k"},
        right="One candle costs [n / c] dollars, so {d} candles cost [_ * d] dollars.",
        wrong="One candle costs [n / c] dollars, so {d} candles cost [_ + d] dollars.",
        slip="One candle costs {n} dollars, so {d} candles cost [n * d] dollars.",
    ),
    Problem(
        (
            "{who} puts {n} dollars in a bank that pays {p} percent interest a year. How much money is there after one"
            " year?"
        ),
        {"n": range(200, 1000, 100), "p": range(2, 9)},
        right="The interest is [n * p / 100] dollars, so there are [n + _] dollars.",
        wrong="The interest is [n * p / 100] dollars, so there are [n - _] dollars.",
        slip="The interest is {p} dollars, so there are [n + p] dollars.",
    ),
    Problem(
        (
            "{b} friends eat out. The bill is {n} dollars and they add a tip of {c} dollars. They split it equally. "
            "How much does each pay?"
        ),
        {"b": range(3, 8), "k": range(12, 26), "c": range(5, 13), "n": "b * k - c"},
        right="They pay [n + c] dollars, so each pays [_ / b] dollars.",
        wrong="They pay [n + c] dollars, so each pays [_ - b] dollars.",
        slip="They pay [n + c] dollars, so each pays [_ / b + c] dollars.",
    ),
    Problem(
        (
            "Two boats leave a harbor in the same direction at {a} and {b} kilometers an hour. How far apart are they "
            "after {c} hours?"
        ),
        {"a": range(22, 36), "b": range(10, 19), "c": range(2, 7)},
        right="The gap grows by [a - b] kilometers an hour, so it is [_ * c] kilometers.",
        wrong="The gap grows by [a + b] kilometers an hour, so it is [_ * c] kilometers.",
        slip="The gap grows by [a - b] kilometers an hour, so it is [_ + c] kilometers.",
    ),
    Problem(
        "{who} goes on a holiday of {a} weeks and {b} days. How many days does it last?",
        {"a": range(2, 8), "b": range(2, 7)},
        right="The weeks are [7 * a] days, so it lasts [_ + b] days.",
        wrong="The weeks are [7 + a] days, so it lasts [_ + b] days.",
        slip="The weeks are [5 * a] days, so it lasts [_ + b] days.",
    ),
    Problem(
        "A baby sleeps {a} hours every night and {b} hours every afternoon. How many hours does it sleep in a week?",
        {"a": range(8, 12), "b": range(2, 5)},
        right="It sleeps [a + b] hours a day, so it sleeps [_ * 7] hours a week.",
        wrong="It sleeps [a - b] hours a day, so it sleeps [_ * 7] hours a week.",
        slip="It sleeps [a + b] hours a day, so it sleeps [_ * 5] hours a week.",
    ),
    Problem(
        "A bean plant is {a} cm tall and grows {b} cm each week. How tall is it after {c} weeks?",
        {"a": range(10, 31), "b": range(3, 8), "c": range(4, 10)},
        right="It grows [b * c] cm, so it is [a + _] cm tall.",
        wrong="It grows [b + c] cm, so it is [a + _] cm tall.",
        slip="It grows {b} cm, so it is [a + b] cm tall.",
    ),
    Problem(
        "A rope is {a} meters long. {who} cuts off {c} pieces of {b} meters each. How many meters of rope remain?",
        {"a": range(40, 71), "b": range(3, 6), "c": range(4, 8)},
        right="The pieces are [c * b] meters, so [a - _] meters remain.",
        wrong="The pieces are [c + b] meters, so [a - _] meters remain.",
        slip="The pieces are {b} meters, so [a - b] meters remain.",
    ),
    Problem(
        "A workshop has {n} wheels. Each tricycle needs three wheels. How many tricycles can be built?",
        {"k": range(6, 26), "n": "3 * k"},
        right="They can build [n / 3] tricycles.",
        wrong="They can build [n * 3] tricycles.",
        slip="They can build [n - 3] tricycles.",
    ),
    Problem(
        "{who} has {a} coins of 5 cents and {b} coins of 10 cents. How many cents is that?",
        {"a": range(4, 13), "b": range(3, 10)},
        right="{who} has [5 * a + 10 * b] cents.",
        wrong="{who} has [a + b] cents.",
        slip="{who} has [10 * a + 10 * b] cents.",
    ),
    Problem(
        (
            "A basket with {b} equal melons weighs {n} kilograms. The empty basket weighs {c} kilograms. How heavy is "
            "one melon?"
        ),
        {"b": range(3, 9), "k": range(2, 6), "c": range(2, 5), "n": "b * k + c"},
        right="The melons weigh [n - c] kilograms, so one weighs [_ / b] kilograms.",
        wrong="The melons weigh [n - c] kilograms, so one weighs [_ - b] kilograms.",
        slip="The melons weigh [n - c] kilograms, so one weighs [_ / b + c] kilograms.",
    ),
    Problem(
        (
            "A snail climbs {a} centimeters by day and slides down {b} centimeters at night. How high is it after {c} "
            "days and nights?"
        ),
        {"a": range(10, 19), "b": range(2, 8), "c": range(4, 10)},
        right="It gains [a - b] centimeters a day, so it is [_ * c] centimeters high.",
        wrong="It gains [a + b] centimeters a day, so it is [_ * c] centimeters high.",
        slip="It gains {a} centimeters a day, so it is [a * c] centimeters high.",
    ),
    Problem(
        (
            "{who} has {c} silver cards. {pal} gives {who} {b} silver cards for each of {a} gold cards. How many "
            "silver cards does {who} have now?"
        ),
        {"a": range(3, 8), "b": range(4, 9), "c": range(6, 16)},
        right="{who} gets [a * b] silver cards and now has [_ + c].",
        wrong="{who} gets [a + b] silver cards and now has [_ + c].",
        slip="{who} gets {b} silver cards and now has [b + c].",
    ),
    Problem(
        "At the zoo an adult pays {a} dollars and a child pays {b} dollars. What do two adults and {c} children pay?",
        {"a": range(12, 21), "b": range(5, 10), "c": range(3, 7)},
        right="They pay [2 * a + c * b] dollars.",
        wrong="They pay [a + b + c] dollars.",
        slip="They pay [a + c * b] dollars.",
    ),
    Problem(
        "{who} orders {a} pizzas, each cut into 8 slices. The guests eat {n} slices. How many slices are left over?",
        {"a": range(4, 10), "n": range(12, 28)},
        right="There are [8 * a] slices, so [_ - n] are left over.",
        wrong="There are [8 * a] slices, so [_ + n] are left over.",
        slip="There are [6 * a] slices, so [_ - n] are left over.",
    ),
    Problem(
        "A pool is {b} meters long. {who} swims there and back {a} times. How many meters does {who} swim?",
        {"a": range(4, 13), "b": range(20, 51, 5)},
        right="There and back is [2 * b] meters, so {who} swims [_ * a] meters.",
        wrong="There and back is [2 + b] meters, so {who} swims [_ * a] meters.",
        slip="One length is {b} meters, so {who} swims [b * a] meters.",
    ),
    Problem(
        "{a} hens lay {b} eggs each and {c} eggs crack. How many whole eggs are there?",
        {"a": range(5, 13), "b": range(4, 8), "c": range(2, 9)},
        right="The hens lay [a * b] eggs, so [_ - c] eggs are whole.",
        wrong="The hens lay [a * b] eggs, so [_ + c] eggs are whole.",
        slip="The hens lay [a + b] eggs, so [_ - c] eggs are whole.",
    ),
    Problem(
        (
            "On a map one centimeter stands for {b} kilometers. Two towns are {a} centimeters apart on the map. What "
            "is the real distance?"
        ),
        {"a": range(4, 13), "b": range(5, 21, 5)},
        right="The real distance is [a * b] kilometers.",
        wrong="The real distance is [a + b] kilometers.",
        slip="The real distance is [a * b * 2] kilometers.",
    ),
    Problem(
        "A theater has {n} seats and {p} percent of them are taken. How many seats are empty?",
        {"n": range(100, 400, 20), "p": range(55, 100, 5)},
        right="There are [n * p / 100] seats taken, so [n - _] are empty.",
        wrong="There are [n * p / 100] seats taken, so [n + _] are empty.",
        slip="There are {p} seats taken, so [n - p] are empty.",
    ),
    Problem(
        (
            "{who} is {b} years old. The grandmother of {who} is {a} times as old. How many years older is the "
            "grandmother?"
        ),
        {"a": range(5, 9), "b": range(7, 13)},
        right="The grandmother is [a * b] years old, so she is [_ - b] years older.",
        wrong="The grandmother is [a + b] years old, so she is [_ - b] years older.",
        slip="The grandmother is [a * b] years old, so she is [_ + b] years older.",
    ),
    Problem(
        "{who} reads from the top of page {a} to the bottom of page {b}. How many pages is that?",
        {"a": range(11, 31), "b": range(40, 76)},
        right="There are [b - a] pages after page {a}, so {who} reads [_ + 1] pages.",
        wrong="There are [b - a] pages after page {a}, so {who} reads [_ - 1] pages.",
        slip="The difference is the number of pages, so {who} reads [b - a] pages.",
    ),
    Problem(
        "A tree was planted in the year {y}. How old was the tree in the year {z}?",
        {"y": range(1950, 1986), "z": range(1995, 2021)},
        right="The tree was [z - y] years old.",
        wrong="The tree was [z + y] years old.",
        slip="The tree was [z - y - 10] years old.",
    ),
    Problem(
        (
            "In a quiz {who} gets {b} points for each of {a} right answers and loses {c} points for mistakes. What is "
            "the score?"
        ),
        {"a": range(6, 13), "b": range(4, 9), "c": range(3, 12)},
        right="The right answers give [a * b] points, so the score is [_ - c].",
        wrong="The right answers give [a * b] points, so the score is [_ + c].",
        slip="The right answers give [a + b] points, so the score is [_ - c].",
    ),
)
COUNT = len(PROBLEMS)


def items(units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item for each of `units`, in their order."""
    return [_item(PROBLEMS[unit], rng) for unit in units]


def _item(problem: Problem, rng: random.Random) -> Item:
    who, pal = rng.sample(NAMES, 2)
    while True:
        numbers = _numbers(problem, rng)
        solutions = [_solve(text, numbers) for text in (problem.right, problem.wrong, problem.slip)]
        worked, result = solutions[0]
        miss = result + rng.choice(MISSES)
        head, _, tail = worked.rpartition(f"= {result}")
        solutions.append((f"{head}= {miss}{tail}", miss))
        results = [result for _, result in solutions]
        # Small numbers may make two solutions agree, or a wrong one negative: then the numbers are drawn again.
        if min(results) > 0 and len(set(results)) == len(results):
            break
    question = problem.question.format(who=who, pal=pal, **numbers)
    right, *others = (
        f" {text.format(who=who, pal=pal, **numbers)} The answer is {result}." for text, result in solutions
    )
    return draw.shuffled(f"Question: {question}\nAnswer:", right, others, rng)


def _numbers(problem: Problem, rng: random.Random) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for name, source in problem.numbers.items():
        numbers[name] = _reckon(source, numbers)[1] if isinstance(source, str) else rng.choice(source)
    return numbers


def _solve(text: str, numbers: dict[str, int]) -> tuple[str, int]:
    """`text` with its [sums] worked out, and the result of the last one."""
    known = dict(numbers)

    def work(match: re.Match[str]) -> str:
        shown, known["_"] = _reckon(match[1], known)
        return f"{shown} = {known['_']}"

    return re.sub(r"\[(.+?)\]", work, text), known["_"]


def _reckon(formula: str, numbers: dict[str, int]) -> tuple[str, int]:
    """`formula` with its letters replaced by `numbers`, and its value."""
    shown = re.sub(r"\b[a-z_]\b", lambda letter: str(numbers[letter[0]]), formula)
    # Every division above comes out even, for whatever numbers are drawn.
    return shown, int(eval(shown.replace("/", "//")))
