"""Judge two sets of answers against each other, with a server or a function, in both orders."""

from .answers import Answer, read_answers
from .asking import ask_all
from .cache import ReplyCache
from .callables import JudgeFunction, load_function
from .comparison import Comparison, Judge, Question, compare, judge_identity
from .endpoint import Endpoint, EndpointError, Request
from .report import JudgeReport
from .run import judge, judge_name
from .template import DEFAULT_TEMPLATE
from .verdict import Verdict, parse_verdict

__all__ = [
    "DEFAULT_TEMPLATE",
    "Answer",
    "Comparison",
    "Endpoint",
    "EndpointError",
    "Judge",
    "JudgeFunction",
    "JudgeReport",
    "Question",
    "ReplyCache",
    "Request",
    "Verdict",
    "ask_all",
    "compare",
    "judge",
    "judge_identity",
    "judge_name",
    "load_function",
    "parse_verdict",
    "read_answers",
]
