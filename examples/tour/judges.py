"""The tour's judge: what `fusedpo judge`, `pairs` and `iterate` call as judges:liked."""

import collections
import functools
import json
import re


def liked(prompt, first, second):
    """Prefer the answer with more words that the data's preferred answers use more than the others.

    Crude, and quick; with a strong model behind a server, name its address instead.
    """
    if share(first) == share(second):
        return "tie"
    return "A" if share(first) > share(second) else "B"


def share(answer):
    words = words_of(answer)
    return sum(word in liked_words() for word in words) / max(len(words), 1)


@functools.cache
def liked_words():
    counts = {"chosen": collections.Counter(), "rejected": collections.Counter()}
    with open("clean.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            for side in counts:
                counts[side].update(words_of(row[side]))
    chosen, rejected = counts["chosen"], counts["rejected"]
    return {word for word in chosen if chosen[word] > rejected[word]}


def words_of(text):
    return re.findall(r"\w+", text.lower())
