"""What generators and judges are asked, in words."""

from collections.abc import Mapping
from types import MappingProxyType

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "fact": "Write a question that asks for one fact that this page states.",
        "table": (
            "Write a question whose answer has to be looked up in a table of this page: a value by its row and column. "
            "If the page has no table, ask for a number or a name that it states."
        ),
        "chart": (
            "Write a question whose answer has to be read from a chart, plot, diagram or picture of this page. If the "
            "page has none, ask for something that its layout or headings tell."
        ),
        "comparison": (
            "Write a question that compares two or more things that this page tells about: which is larger, what "
            "changed, how they differ."
        ),
        "open": "Write an open question, how or why, whose answer this page explains in a few sentences.",
    }
)
"""The kinds of questions, and what a generator is told about each."""

_RULES = (
    "Somebody will type the question into a search over many thousands of pages without having seen this one. So name "
    "what it is about (who, what, where, when), as a person would who needs to know, and never refer to the page: no "
    "'this page', 'the table above', 'the figure' or 'the document'."
)


def ask_for_query(prompt: str, language: str | None, again: int) -> str:
    """The instruction to write a query.

    Args:
        prompt: What kind of question.
        language: Its name; ``None`` is the language of the page.
        again: How often the same was asked about the page before.
    """
    where = "the language of the page" if language is None else f"this language: {language}"
    other = f"Leave out the {again} most obvious questions of this kind, and ask another." if again else ""
    parts = (
        prompt.strip(),
        other,
        f"{_RULES} This page must answer it, and as few others as can be.",
        f"Write question and answer in {where}.",
        'Reply with JSON alone: {"query": "the question", "answer": "the answer, as short as it can be"}',
    )
    return "\n".join(filter(None, parts))


def ask_for_near_misses(query: str, count: int) -> str:
    """The instruction to write questions that a page seems to answer, and does not."""
    return (
        f"This page answers the question: {query}\n"
        f"Write {count} other question{'s' if count > 1 else ''} that a careless reader would take for answered by "
        "this page, with the same subject and nearly the same words, and that it does not answer: about another year, "
        "place, name, product or quantity than those that the page tells of.\n"
        f"{_RULES}\n"
        "Write them in the language of the question.\n"
        'Reply with JSON alone: {"queries": ["a question", ...]}'
    )


def ask_whether_answered(query: str) -> str:
    """The instruction to judge whether a page answers a query."""
    return (
        f"Question: {query}\n"
        "Does this page answer the question? It does where somebody could answer from this page alone, for just what "
        "was asked: the same names, years, places and quantities. A page on the same subject that lacks the answer "
        "does not.\n"
        'Reply with JSON alone: {"answers": "yes"}, {"answers": "partly"} or {"answers": "no"}'
    )
