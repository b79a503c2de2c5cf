"""Small Python functions described in a sentence; the wrong bodies are near misses that fail a check."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from builder.proxy.demo import draw
from builder.proxy.items import Item


@dataclass(frozen=True, slots=True)
class Function:
    """A task, the function's name and arguments, its body, three bodies that are wrong, and what tells them apart."""

    task: str
    signature: str
    right: str
    wrong: tuple[str, str, str]
    checks: tuple[str, ...]


FUNCTIONS = (
    Function(
        "Write a function to return twice the sum of two numbers.",
        "double_sum(a, b)",
        right="return 2 * (a + b)",
        wrong=("return 2 * (a - b)", "return (a + b) / 2", "return 2 * a + b"),
        checks=("double_sum(2, 3) == 10", "double_sum(0, 4) == 8"),
    ),
    Function(
        "Write a function to check whether a whole number is even.",
        "is_even(n)",
        right="return n % 2 == 0",
        wrong=("return n % 2 == 1", "return n / 2 == 0", "return n % 2"),
        checks=("is_even(4) is True", "is_even(7) is False"),
    ),
    Function(
        "Write a function to get the last digit of a positive number.",
        "last_digit(n)",
        right="return n % 10",
        wrong=("return n // 10", "return str(n)[0]", "return n - 10"),
        checks=("last_digit(457) == 7", "last_digit(30) == 0"),
    ),
    Function(
        "Write a function to count the vowels in a lowercase text.",
        "count_vowels(text)",
        right='return sum(1 for letter in text if letter in "aeiou")',
        wrong=(
            'return sum(1 for letter in text if letter not in "aeiou")',
            'return max(1 for letter in text if letter in "aeiou")',
            'return [letter for letter in text if letter in "aeiou"]',
        ),
        checks=('count_vowels("banana") == 3', 'count_vowels("rhythm") == 0'),
    ),
    Function(
        "Write a function to put the words of a sentence in the opposite order.",
        "reverse_words(sentence)",
        right='words = sentence.split()\nreturn " ".join(words[::-1])',
        wrong=(
            'words = list(sentence)\nreturn " ".join(words[::-1])',
            'words = sentence.split()\nreturn " ".join(words[:-1])',
            "words = sentence.split()\nreturn words[::-1]",
        ),
        checks=('reverse_words("red green blue") == "blue green red"', 'reverse_words("hi") == "hi"'),
    ),
    Function(
        "Write a function to check whether a word reads the same in both directions.",
        "is_palindrome(word)",
        right="return word == word[::-1]",
        wrong=("return word != word[::-1]", "return word[0] == word[-1]", "return word == word[:-1]"),
        checks=('is_palindrome("level") is True', 'is_palindrome("cabbc") is False'),
    ),
    Function(
        "Write a function to find the difference between the largest and the smallest number of a list.",
        "spread(numbers)",
        right="return max(numbers) - min(numbers)",
        wrong=(
            "return max(numbers) + min(numbers)",
            "return numbers[-1] - numbers[0]",
            "return min(numbers) - max(numbers)",
        ),
        checks=("spread([4, 9, 1, 6]) == 8", "spread([5]) == 0"),
    ),
    Function(
        "Write a function to compute the average of a list of numbers.",
        "average(numbers)",
        right="return sum(numbers) / len(numbers)",
        wrong=(
            "return sum(numbers) / max(numbers)",
            "return len(numbers) / sum(numbers)",
            "return max(numbers) / len(numbers)",
        ),
        checks=("average([2, 4, 9]) == 5", "average([3]) == 3"),
    ),
    Function(
        "Write a function to remove all negative numbers from a list.",
        "drop_negatives(numbers)",
        right="return [n for n in numbers if n >= 0]",
        wrong=(
            "return [n for n in numbers if n < 0]",
            "return [n for n in numbers if n <= 0]",
            "return [abs(n) for n in numbers if n >= -1]",
        ),
        checks=("drop_negatives([3, -1, 0, -7, 2]) == [3, 0, 2]",),
    ),
    Function(
        "Write a function to square every number in a list.",
        "squares(numbers)",
        right="return [n ** 2 for n in numbers]",
        wrong=(
            "return [n * 2 for n in numbers]",
            "return sum(n ** 2 for n in numbers)",
            "return [2 ** n for n in numbers]",
        ),
        checks=("squares([1, 3, 5]) == [1, 9, 25]",),
    ),
    Function(
        "Write a function to compute the factorial of a number with a loop.",
        "factorial(n)",
        right="result = 1\nfor i in range(2, n + 1):\n    result *= i\nreturn result",
        wrong=(
            "result = 1\nfor i in range(2, n):\n    result *= i\nreturn result",
            "result = 0\nfor i in range(2, n + 1):\n    result *= i\nreturn result",
            "result = 1\nfor i in range(2, n + 1):\n    result += i\nreturn result",
        ),
        checks=("factorial(5) == 120", "factorial(2) == 2"),
    ),
    Function(
        "Write a function to add up the digits of a positive number.",
        "digit_sum(n)",
        right="total = 0\nwhile n > 0:\n    total += n % 10\n    n //= 10\nreturn total",
        wrong=(
            "total = 0\nwhile n > 0:\n    total += 1\n    n //= 10\nreturn total",
            "total = 0\nwhile n > 0:\n    total += n\n    n //= 10\nreturn total",
            "total = 1\nwhile n > 0:\n    total *= n % 10\n    n //= 10\nreturn total",
        ),
        checks=("digit_sum(482) == 14", "digit_sum(70) == 7"),
    ),
    Function(
        "Write a function to convert degrees Celsius to degrees Fahrenheit.",
        "to_fahrenheit(celsius)",
        right="return celsius * 9 / 5 + 32",
        wrong=("return celsius * 5 / 9 + 32", "return celsius * 9 / 5 - 32", "return (celsius - 32) * 5 / 9"),
        checks=("to_fahrenheit(100) == 212", "to_fahrenheit(0) == 32"),
    ),
    Function(
        "Write a function to find the area of a triangle from its base and height.",
        "triangle(base, height)",
        right="return base * height / 2",
        wrong=("return base * height", "return (base + height) / 2", "return base * height * 2"),
        checks=("triangle(6, 5) == 15", "triangle(2, 8) == 8"),
    ),
    Function(
        "Write a function to return the first and the last item of a list as a tuple.",
        "ends(items)",
        right="return items[0], items[-1]",
        wrong=("return items[1], items[-1]", "return items[0], items[len(items)]", "return items[-1], items[0]"),
        checks=("ends([7, 8, 9]) == (7, 9)",),
    ),
    Function(
        "Write a function to count the words in a sentence.",
        "count_words(sentence)",
        right="return len(sentence.split())",
        wrong=('return len(sentence.split("e"))', "return sentence.split()", "return len(sentence.strip())"),
        checks=('count_words("the cat sat down") == 4', 'count_words("hello") == 1'),
    ),
    Function(
        "Write a function to count how often an item occurs in a list.",
        "occurrences(items, wanted)",
        right="count = 0\nfor item in items:\n    if item == wanted:\n        count += 1\nreturn count",
        wrong=(
            "count = 0\nfor item in items:\n    if item != wanted:\n        count += 1\nreturn count",
            "count = 0\nfor item in items:\n    if item == wanted:\n        count += item\nreturn count",
            "count = 1\nfor item in items:\n    if item == wanted:\n        count += 1\nreturn count",
        ),
        checks=("occurrences([3, 5, 3, 3, 8], 3) == 3", "occurrences([1, 2], 9) == 0"),
    ),
    Function(
        "Write a function to join two dictionaries, where the second one wins.",
        "merge(first, second)",
        right="merged = dict(first)\nmerged.update(second)\nreturn merged",
        wrong=(
            "merged = dict(second)\nmerged.update(first)\nreturn merged",
            "merged = dict(first)\nmerged.update(second)\nreturn second",
            "merged = dict(first)\nmerged.update(first)\nreturn merged",
        ),
        checks=('merge({"a": 1, "b": 2}, {"b": 5}) == {"a": 1, "b": 5}',),
    ),
    Function(
        "Write a function to exchange the keys and the values of a dictionary.",
        "invert(table)",
        right="return {value: key for key, value in table.items()}",
        wrong=(
            "return {key: value for key, value in table.items()}",
            "return {value: key for key, value in table}",
            "return {value: value for key, value in table.items()}",
        ),
        checks=('invert({"a": 1, "b": 2}) == {1: "a", 2: "b"}',),
    ),
    Function(
        "Write a function to remove repeated items from a list and keep the order.",
        "unique(items)",
        right="seen = []\nfor item in items:\n    if item not in seen:\n        seen.append(item)\nreturn seen",
        wrong=(
            "seen = []\nfor item in items:\n    if item in seen:\n        seen.append(item)\nreturn seen",
            "seen = []\nfor item in items:\n    if item not in items:\n        seen.append(item)\nreturn seen",
            "seen = []\nfor item in items:\n    if item not in seen:\n        seen.append(item)\nreturn items",
        ),
        checks=("unique([4, 1, 4, 2, 1]) == [4, 1, 2]",),
    ),
    Function(
        "Write a function to find the second largest of several different numbers.",
        "runner_up(numbers)",
        right="ordered = sorted(numbers)\nreturn ordered[-2]",
        wrong=(
            "ordered = sorted(numbers)\nreturn ordered[1]",
            "ordered = sorted(numbers)\nreturn ordered[-3]",
            "ordered = sorted(numbers)\nreturn ordered[-1] - 1",
        ),
        checks=("runner_up([10, 3, 8, 1, 5]) == 8", "runner_up([2, 9]) == 2"),
    ),
    Function(
        "Write a function to add all whole numbers from one up to n.",
        "sum_to(n)",
        right="return n * (n + 1) // 2",
        wrong=("return n * (n - 1) // 2", "return n * (n + 1)", "return sum(range(1, n))"),
        checks=("sum_to(4) == 10", "sum_to(1) == 1"),
    ),
    Function(
        "Write a function to tell whether a number greater than one is a prime number.",
        "is_prime(n)",
        right="for i in range(2, n):\n    if n % i == 0:\n        return False\nreturn True",
        wrong=(
            "for i in range(1, n):\n    if n % i == 0:\n        return False\nreturn True",
            "for i in range(2, n):\n    if n % i == 0:\n        return True\nreturn False",
            "for i in range(2, n):\n    if n % i == 1:\n        return False\nreturn True",
        ),
        checks=("is_prime(7) is True", "is_prime(9) is False"),
    ),
    Function(
        "Write a function to compute the n-th number of the series 0, 1, 1, 2, 3, 5, counted from zero.",
        "fibonacci(n)",
        right="a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
        wrong=(
            "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a * b\nreturn a",
            "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn b",
            "a, b = 1, 2\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
        ),
        checks=("fibonacci(0) == 0", "fibonacci(6) == 8"),
    ),
    Function(
        "Write a function to find the greatest common divisor of two positive numbers.",
        "common_divisor(a, b)",
        right="while b:\n    a, b = b, a % b\nreturn a",
        wrong=(
            "while b:\n    a, b = b, a // b\nreturn a",
            "while b:\n    a, b = b, a % b\nreturn b",
            "while a:\n    a, b = b, a % b\nreturn a",
        ),
        checks=("common_divisor(12, 18) == 6", "common_divisor(35, 14) == 7"),
    ),
    Function(
        "Write a function to keep a value between a lower and an upper limit.",
        "clamp(value, low, high)",
        right="return max(low, min(value, high))",
        wrong=(
            "return min(low, max(value, high))",
            "return max(low, max(value, high))",
            "return min(low, min(value, high))",
        ),
        checks=("clamp(15, 0, 10) == 10", "clamp(-3, 0, 10) == 0"),
    ),
    Function(
        "Write a function to return 1 for a positive, -1 for a negative number and 0 for zero.",
        "sign(n)",
        right="if n > 0:\n    return 1\nif n < 0:\n    return -1\nreturn 0",
        wrong=(
            "if n > 0:\n    return -1\nif n < 0:\n    return 1\nreturn 0",
            "if n >= 0:\n    return 1\nreturn -1",
            "if n > 0:\n    return 1\nif n < 0:\n    return 0\nreturn -1",
        ),
        checks=("sign(12) == 1", "sign(-4) == -1", "sign(0) == 0"),
    ),
    Function(
        "Write a function to make the first letter of every word a capital letter.",
        "title(text)",
        right='return " ".join(word.capitalize() for word in text.split())',
        wrong=(
            'return " ".join(word.upper() for word in text.split())',
            'return " ".join(word.capitalize() for word in list(text))',
            'return "".join(word.capitalize() for word in text.split())',
        ),
        checks=('title("green old house") == "Green Old House"',),
    ),
    Function(
        "Write a function to delete all the spaces in a string.",
        "squeeze(text)",
        right='return text.replace(" ", "")',
        wrong=('return text.replace("  ", " ")', 'return text.replace("", " ")', 'return text.replace(" ", "_")'),
        checks=('squeeze(" a b  c ") == "abc"',),
    ),
    Function(
        "Write a function to list the items that two lists share, in the order of the first list.",
        "shared(first, second)",
        right="return [item for item in first if item in second]",
        wrong=(
            "return [item for item in first if item not in second]",
            "return [item for item in first if item != second]",
            "return [item for item in second if item in second]",
        ),
        checks=("shared([5, 1, 3], [3, 4, 5]) == [5, 3]",),
    ),
    Function(
        "Write a function to turn a list of lists into one flat list.",
        "flatten(lists)",
        right="flat = []\nfor inner in lists:\n    flat.extend(inner)\nreturn flat",
        wrong=(
            "flat = []\nfor inner in lists:\n    flat.append(inner)\nreturn flat",
            "flat = []\nfor inner in lists:\n    flat.extend(inner)\n    return flat",
            "flat = []\nfor inner in lists:\n    flat.extend(lists)\nreturn flat",
        ),
        checks=("flatten([[1, 2], [3], [4, 5]]) == [1, 2, 3, 4, 5]",),
    ),
    Function(
        "Write a function to pair each name with its age as a list of tuples.",
        "pair_up(names, ages)",
        right="return list(zip(names, ages))",
        wrong=("return list(zip(ages, names))", "return list(zip(names, names))", "return list(enumerate(names))"),
        checks=('pair_up(["Ann", "Bo"], [9, 7]) == [("Ann", 9), ("Bo", 7)]',),
    ),
    Function(
        "Write a function to take every second item of a list, beginning with the first.",
        "every_other(items)",
        right="return items[::2]",
        wrong=("return items[1::2]", "return items[:2]", "return items[2:]"),
        checks=("every_other([1, 2, 3, 4, 5]) == [1, 3, 5]",),
    ),
    Function(
        "Write a function to move the first k items of a list to its end.",
        "rotate(items, k)",
        right="return items[k:] + items[:k]",
        wrong=("return items[:k] + items[k:]", "return items[-k:] + items[:-k]", "return items[k:] + items[k:]"),
        checks=("rotate([1, 2, 3, 4, 5], 2) == [3, 4, 5, 1, 2]",),
    ),
    Function(
        "Write a function to find out whether all numbers of a list are positive.",
        "all_positive(numbers)",
        right="return all(n > 0 for n in numbers)",
        wrong=(
            "return any(n > 0 for n in numbers)",
            "return all(n < 0 for n in numbers)",
            "return all(n > 0 for n in numbers[:1])",
        ),
        checks=("all_positive([3, 1, 8]) is True", "all_positive([9, -2, 4]) is False"),
    ),
    Function(
        "Write a function to find the longest word of a sentence.",
        "longest_word(sentence)",
        right="return max(sentence.split(), key=len)",
        wrong=(
            "return max(sentence.split())",
            "return min(sentence.split(), key=len)",
            "return len(max(sentence.split(), key=len))",
        ),
        checks=('longest_word("we like elephants very much") == "elephants"',),
    ),
    Function(
        "Write a function to sort a list of words from the shortest to the longest.",
        "by_length(words)",
        right="return sorted(words, key=len)",
        wrong=(
            "return sorted(words, key=max)",
            "return sorted(words, key=len, reverse=True)",
            "return words.sort(key=len)",
        ),
        checks=('by_length(["apple", "fig", "plum"]) == ["fig", "plum", "apple"]',),
    ),
    Function(
        "Write a function to multiply two lists of numbers item by item and add up the products.",
        "dot(first, second)",
        right="return sum(a * b for a, b in zip(first, second))",
        wrong=(
            "return sum(a + b for a, b in zip(first, second))",
            "return sum(a * a for a, b in zip(first, second))",
            "return [a * b for a, b in zip(first, second)]",
        ),
        checks=("dot([1, 2, 3], [4, 5, 6]) == 32",),
    ),
    Function(
        "Write a function to raise a base to a whole exponent by repeated multiplication.",
        "power(base, exponent)",
        right="result = 1\nfor _ in range(exponent):\n    result *= base\nreturn result",
        wrong=(
            "result = base\nfor _ in range(exponent):\n    result *= base\nreturn result",
            "result = 1\nfor _ in range(exponent):\n    result += base\nreturn result",
            "result = 1\nfor _ in range(base):\n    result *= exponent\nreturn result",
        ),
        checks=("power(2, 5) == 32", "power(7, 0) == 1"),
    ),
    Function(
        "Write a function to decide whether a year is a leap year.",
        "is_leap(year)",
        right="return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
        wrong=(
            "return year % 4 == 0 or (year % 100 != 0 and year % 400 == 0)",
            "return year % 4 == 0 and year % 100 != 0",
            "return year % 4 == 0 and (year % 100 == 0 or year % 400 != 0)",
        ),
        checks=("is_leap(2000) is True", "is_leap(1900) is False", "is_leap(2024) is True"),
    ),
    Function(
        "Write a function to measure the distance between two points in the plane.",
        "distance(x1, y1, x2, y2)",
        right="return ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5",
        wrong=(
            "return (x2 - x1) ** 2 + (y2 - y1) ** 2",
            "return ((x2 + x1) ** 2 + (y2 + y1) ** 2) ** 0.5",
            "return ((x2 - x1) * 2 + (y2 - y1) * 2) ** 0.5",
        ),
        checks=("distance(1, 1, 4, 5) == 5",),
    ),
    Function(
        "Write a function to convert hours, minutes and seconds to seconds.",
        "to_seconds(hours, minutes, seconds)",
        right="return hours * 3600 + minutes * 60 + seconds",
        wrong=(
            "return hours * 60 + minutes * 60 + seconds",
            "return hours + minutes * 60 + seconds * 3600",
            "return hours * 24 + minutes * 60 + seconds",
        ),
        checks=("to_seconds(1, 2, 3) == 3723",),
    ),
    Function(
        "Write a function to build the initials of a full name.",
        "initials(name)",
        right='return "".join(part[0] for part in name.split())',
        wrong=(
            'return "".join(part[-1] for part in name.split())',
            'return "".join(part[0] for part in list(name))',
            'return "".join(part for part in name.split())',
        ),
        checks=('initials("Mary Ann Lee") == "MAL"',),
    ),
    Function(
        "Write a function to find the position of the largest number in a list.",
        "top_index(numbers)",
        right="return numbers.index(max(numbers))",
        wrong=(
            "return numbers.index(min(numbers))",
            "return numbers[max(numbers)]",
            "return numbers.index(max(numbers)) + 1",
        ),
        checks=("top_index([4, 11, 6]) == 1",),
    ),
    Function(
        "Write a function to list the running totals of a list of numbers.",
        "running_totals(numbers)",
        right="total, totals = 0, []\nfor n in numbers:\n    total += n\n    totals.append(total)\nreturn totals",
        wrong=(
            "total, totals = 0, []\nfor n in numbers:\n    total += n\n    totals.append(n)\nreturn totals",
            "total, totals = 0, []\nfor n in numbers:\n    totals.append(total)\n    total += n\nreturn totals",
            "total, totals = 0, []\nfor n in numbers:\n    total += n\n    totals.append(total)\nreturn total",
        ),
        checks=("running_totals([2, 3, 5]) == [2, 5, 10]",),
    ),
    Function(
        "Write a function to count each letter of a word in a dictionary.",
        "letter_counts(word)",
        right="counts = {}\nfor letter in word:\n    counts[letter] = counts.get(letter, 0) + 1\nreturn counts",
        wrong=(
            "counts = {}\nfor letter in word:\n    counts[letter] = counts.get(letter, 0)\nreturn counts",
            "counts = {}\nfor letter in word:\n    counts[letter] += 1\nreturn counts",
            "counts = {}\nfor letter in word:\n    counts[letter] = counts.get(letter, 1) + 1\nreturn counts",
        ),
        checks=('letter_counts("noon") == {"n": 2, "o": 2}',),
    ),
    Function(
        "Write a function to check whether a list contains a word with more than n letters.",
        "has_longer(words, n)",
        right="return any(len(word) > n for word in words)",
        wrong=(
            "return all(len(word) > n for word in words)",
            "return any(len(word) >= n for word in words)",
            "return any(len(word) < n for word in words)",
        ),
        checks=(
            'has_longer(["tea", "coffee"], 5) is True',
            'has_longer(["cat", "dog"], 3) is False',
            'has_longer(["ox"], 4) is False',
        ),
    ),
    Function(
        "Write a function to repeat a text n times with a dash in between.",
        "repeat(text, n)",
        right='return "-".join([text] * n)',
        wrong=('return "-".join(text * n)', 'return "-".join(n * [text + "-"])', 'return "-".join([n] * len(text))'),
        checks=('repeat("ab", 3) == "ab-ab-ab"',),
    ),
    Function(
        "Write a function to count the numbers of a list from low to high, both included.",
        "count_between(numbers, low, high)",
        right="return sum(1 for n in numbers if low <= n <= high)",
        wrong=(
            "return sum(1 for n in numbers if low < n < high)",
            "return sum(n for n in numbers if low <= n <= high)",
            "return sum(1 for n in numbers if n <= low or n >= high)",
        ),
        checks=("count_between([1, 4, 6, 9, 12], 4, 9) == 3",),
    ),
    Function(
        "Write a function to exchange the two values of a pair.",
        "swap(pair)",
        right="first, second = pair\nreturn second, first",
        wrong=(
            "first, second = pair\nreturn first, second",
            "first, second = pair\nreturn second, second",
            "first, second = pair\nreturn first, first",
        ),
        checks=("swap((1, 2)) == (2, 1)",),
    ),
    Function(
        "Write a function to return the item in the middle of a list of odd length.",
        "middle(items)",
        right="return items[len(items) // 2]",
        wrong=("return items[len(items) // 2 + 1]", "return items[len(items) / 2]", "return items[len(items) // 3]"),
        checks=("middle([5, 6, 9, 1, 7]) == 9", 'middle(["a"]) == "a"'),
    ),
    Function(
        "Write a function to list the multiples of n that are not greater than a limit.",
        "multiples(n, limit)",
        right="return list(range(n, limit + 1, n))",
        wrong=(
            "return list(range(n, limit, n))",
            "return list(range(0, limit + 1, n))",
            "return list(range(n, limit + 1))",
        ),
        checks=("multiples(3, 12) == [3, 6, 9, 12]",),
    ),
    Function(
        "Write a function to count the capital letters in a string.",
        "count_capitals(text)",
        right="return sum(1 for letter in text if letter.isupper())",
        wrong=(
            "return sum(1 for letter in text if letter.islower())",
            "return sum(1 for letter in text if letter.upper())",
            "return max(1 for letter in text if letter.isupper())",
        ),
        checks=('count_capitals("Hello Big World") == 3', 'count_capitals("none") == 0'),
    ),
    Function(
        "Write a function to write the items of a list in one line with commas between them.",
        "comma_list(items)",
        right='return ", ".join(str(item) for item in items)',
        wrong=(
            'return ", ".join(str(items) for item in items)',
            'return "".join(str(item) for item in items)',
            'return [str(item) + ", " for item in items]',
        ),
        checks=('comma_list([1, 2, 3]) == "1, 2, 3"',),
    ),
    Function(
        "Write a function to cut a list into parts of a given size.",
        "chunks(items, size)",
        right="return [items[i : i + size] for i in range(0, len(items), size)]",
        wrong=(
            "return [items[i : i + 1] for i in range(0, len(items), size)]",
            "return [items[i:size] for i in range(0, len(items), size)]",
            "return [items[i : i + size] for i in range(0, size, len(items))]",
        ),
        checks=("chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]",),
    ),
    Function(
        "Write a function to turn the rows of a table into its columns.",
        "transpose(rows)",
        right="return [list(column) for column in zip(*rows)]",
        wrong=(
            "return [list(column) for column in zip(rows)]",
            "return [list(column) for column in rows[::-1]]",
            "return [sum(column) for column in zip(*rows)]",
        ),
        checks=("transpose([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]",),
    ),
    Function(
        "Write a function to write a positive number in binary digits.",
        "to_binary(n)",
        right='digits = ""\nwhile n > 0:\n    digits = str(n % 2) + digits\n    n //= 2\nreturn digits',
        wrong=(
            'digits = ""\nwhile n > 0:\n    digits = digits + str(n % 2)\n    n //= 2\nreturn digits',
            'digits = ""\nwhile n > 0:\n    digits = str(n // 2) + digits\n    n //= 2\nreturn digits',
            'digits = ""\nwhile n > 0:\n    digits = str(n % 10) + digits\n    n //= 10\nreturn digits',
        ),
        checks=('to_binary(6) == "110"', 'to_binary(1) == "1"'),
    ),
    Function(
        "Write a function to count how many times a number can be halved before it becomes odd.",
        "halvings(n)",
        right="count = 0\nwhile n % 2 == 0:\n    n //= 2\n    count += 1\nreturn count",
        wrong=(
            "count = 0\nwhile n % 2 == 1:\n    n //= 2\n    count += 1\nreturn count",
            "count = 0\nwhile n > 1:\n    n //= 2\n    count += 1\nreturn count",
            "count = 1\nwhile n % 2 == 0:\n    n //= 2\n    count += 1\nreturn count",
        ),
        checks=("halvings(24) == 3", "halvings(7) == 0"),
    ),
    Function(
        "Write a function to throw away the None values of a list.",
        "drop_none(values)",
        right="return [value for value in values if value is not None]",
        wrong=(
            "return [value for value in values if value is None]",
            "return [value for value in values if value is not False]",
            "return [None for value in values if value is not None]",
        ),
        checks=("drop_none([0, None, 5, None]) == [0, 5]",),
    ),
    Function(
        "Write a function to find the median of an odd number of values.",
        "median(values)",
        right="ordered = sorted(values)\nreturn ordered[len(ordered) // 2]",
        wrong=(
            "ordered = list(values)\nreturn ordered[len(ordered) // 2]",
            "ordered = sorted(values)\nreturn ordered[len(ordered) // 2 - 1]",
            "ordered = sorted(values)\nreturn sum(ordered) / len(ordered)",
        ),
        checks=("median([9, 2, 20, 4, 5]) == 5",),
    ),
    Function(
        "Write a function to multiply all the numbers of a list.",
        "product(numbers)",
        right="result = 1\nfor n in numbers:\n    result *= n\nreturn result",
        wrong=(
            "result = 0\nfor n in numbers:\n    result *= n\nreturn result",
            "result = 1\nfor n in numbers:\n    result += n\nreturn result",
            "result = 1\nfor n in numbers:\n    result = n\nreturn result",
        ),
        checks=("product([2, 3, 4]) == 24", "product([5, 0]) == 0"),
    ),
    Function(
        "Write a function to hide all but the last four characters of a string behind stars.",
        "mask(text)",
        right='return "*" * (len(text) - 4) + text[-4:]',
        wrong=(
            'return "*" * len(text) + text[-4:]',
            'return "*" * (len(text) - 4) + text[:4]',
            'return text[:-4] + "*" * (len(text) - 4)',
        ),
        checks=('mask("12345678") == "****5678"',),
    ),
    Function(
        'Write a function to convert a clock time such as "2:30" to minutes.',
        "to_minutes(clock)",
        right='hours, minutes = clock.split(":")\nreturn int(hours) * 60 + int(minutes)',
        wrong=(
            'hours, minutes = clock.split(":")\nreturn int(hours) + int(minutes) * 60',
            'hours, minutes = clock.split(":")\nreturn int(hours) * 100 + int(minutes)',
            'hours, minutes = clock.split(":")\nreturn hours * 60 + minutes',
        ),
        checks=('to_minutes("2:30") == 150',),
    ),
    Function(
        "Write a function to get the value of a key from a dictionary, or a default when the key is missing.",
        "lookup(table, key, default)",
        right="if key in table:\n    return table[key]\nreturn default",
        wrong=(
            "if key in table:\n    return default\nreturn table[key]",
            "if key in table:\n    return key\nreturn default",
            "if key in table:\n    return table[key]\nreturn key",
        ),
        checks=('lookup({"a": 1}, "a", 0) == 1', 'lookup({"a": 1}, "b", 0) == 0'),
    ),
)
COUNT = len(FUNCTIONS)


def items(units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item for each of `units`, in their order."""
    return [_item(FUNCTIONS[unit], rng) for unit in units]


def _item(function: Function, rng: random.Random) -> Item:
    right, *others = (textwrap.indent(body, "    ") for body in (function.right, *function.wrong))
    return draw.shuffled(f'"""{function.task}"""\ndef {function.signature}:\n', right, others, rng)
