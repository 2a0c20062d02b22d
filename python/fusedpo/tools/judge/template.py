"""What a server is asked: the words around a prompt and its two answers."""

from __future__ import annotations

import re

DEFAULT_TEMPLATE = """\
Which of two answers serves better what was asked? Weigh whether it does what was asked, whether it
is right, and whether it is clear. Length by itself is no merit, nor is the order in which the
answers stand here.

<question>
{prompt}
</question>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

Give your reasons in at most three sentences. Then end with a line of its own: [[A]] if answer A is
better, [[B]] if answer B is better, [[C]] if neither is.
"""

_FIELD = re.compile(r"\{(prompt|first|second)\}")


def check_template(template: str) -> str:
    """Return the template.

    Raises:
        ValueError: it lacks one of {prompt}, {first}, {second}.
    """
    missing = {"prompt", "first", "second"} - set(_FIELD.findall(template))
    if missing:
        wanted = ", ".join(f"{{{name}}}" for name in sorted(missing))
        raise ValueError(f"a judge's template must contain {wanted} where the text is to stand.")
    return template


def fill(template: str, prompt: str, first: str, second: str) -> str:
    """Put the texts in, in one pass: braces within a text, or around other words, stay."""
    texts = {"prompt": prompt, "first": first, "second": second}
    return _FIELD.sub(lambda match: texts[match[1]], template)
