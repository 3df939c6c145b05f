"""Generated report pages, in the layout of ``llamaindex/vdr-multilingual-train``."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, product
from random import Random

from datasets import Dataset, Features, Image, List, Value

from mmtune.errors import ConfigError
from mmtune.testing import words
from mmtune.testing.drawing import draw_page

FEATURES = Features(
    {
        "id": Value("string"),
        "query": Value("string"),
        "image": Image(),
        "negatives": List(Value("string")),
        "language": Value("string"),
    }
)

Shared = tuple[tuple[str, str], ...]
"""Attributes that pages have in common, such as ``(("company", "Cobalt"), ("year", "2021"))``."""


@dataclass(frozen=True)
class Report:
    """What one page reports on; no two pages of a data set report on the same."""

    company: str
    topic: str
    year: str
    detail: str

    @property
    def period(self) -> str:
        """The year with its detail before it: ``2021``, ``Q3 2021``, ``Asia Q3 2021``."""
        return f"{self.detail} {self.year}".strip()


def generated_pages(num_queries: int, *, num_negatives: int = 4, page_size_px: int = 128, seed: int = 0) -> Dataset:
    """Return drawn report pages, each with a title, a text, a table and a chart, and queries that ask for them.

    Every page reports on one company, topic and period, and answers no query but its own. Its negatives are pages
    that share company, topic or year with it. A fifth more pages than queries are drawn; those have no query and
    stand among the others.

    Args:
        num_queries: Number of pages with a query, at least 1.
        num_negatives: Length of each row's list of negatives, closest first; less where there are too few pages.
        page_size_px: Height and width of a page in pixels, at least 64.
        seed: Seed of everything drawn. The same seed gives the same bytes, whatever fonts are installed.

    Returns:
        A table in memory:

        | column | |
        |---|---|
        | ``id`` | text that no page with other pixels has, also under another seed |
        | ``query`` | English text, or ``None`` |
        | ``image`` | the page, lossless PNG |
        | ``negatives`` | ids of other rows |
        | ``language`` | ``en`` |

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> pages = generated_pages(5)
        >>> len(pages), pages.column_names
        (6, ['id', 'query', 'image', 'negatives', 'language'])
        >>> pages[0]["image"].size
        (128, 128)
    """
    _check_at_least("num_queries", num_queries, 1)
    _check_at_least("num_negatives", num_negatives, 0)
    _check_at_least("page_size_px", page_size_px, 64)
    random = Random(f"pages {seed}")
    reports = _reports(num_queries + max(1, num_queries // 5), random)
    asked = set(random.sample(range(len(reports)), num_queries))
    images = [draw_page(r.company, r.topic, r.year, r.detail, random, page_size_px) for r in reports]
    names = [f"{report.company}-{report.topic}-{report.period}".lower().replace(" ", "-") for report in reports]
    ids = [f"{name}-{sha256(image).hexdigest()[:12]}" for name, image in zip(names, images, strict=True)]
    negatives = _negatives(reports, num_negatives, random)
    queries: list[str | None] = [None] * len(reports)
    for i in sorted(asked):
        report, template = reports[i], random.choice(words.QUERY_TEMPLATES)
        queries[i] = template.format(company=report.company, topic=report.topic.lower(), period=report.period)
    columns = {
        "id": ids,
        "query": queries,
        "image": [{"bytes": image, "path": None} for image in images],
        "negatives": [[ids[i] for i in row] for row in negatives],
        "language": ["en"] * len(ids),
    }
    return Dataset.from_dict(columns, features=FEATURES)


def _reports(num_pages: int, random: Random) -> list[Report]:
    # fewer companies for fewer pages, so that pages share attributes and negatives can be hard
    companies = random.sample(words.COMPANIES, min(len(words.COMPANIES), 1 + num_pages // 4))
    regional = [f"{region} {quarter}" for region, quarter in product(words.REGIONS, words.QUARTERS)]
    quarters = ["", *words.QUARTERS, *regional]
    reports: list[Report] = []
    edition = 1
    while len(reports) < num_pages:
        # what tells reports of one year apart; nothing for the first
        for detail in quarters if edition == 1 else [f"edition {edition} {detail}".strip() for detail in quarters]:
            block = [Report(*parts, detail) for parts in product(companies, words.TOPICS, words.YEARS)]
            reports += random.sample(block, min(len(block), num_pages - len(reports)))
        edition += 1
    random.shuffle(reports)
    return reports


def _check_at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ConfigError(f"{name} is {value}, but must be at least {smallest}. Pass {name}={smallest} or more.")


def _negatives(reports: list[Report], num_negatives: int, random: Random) -> list[list[int]]:
    """Return for each report the positions of others: first those that share two attributes with it, then one."""
    positions_by_shared: Mapping[Shared, list[int]] = defaultdict(list)
    for position, report in enumerate(reports):
        for shared in (shared for num_shared in (2, 1, 0) for shared in _shared(report, num_shared)):
            positions_by_shared[shared].append(position)
    negatives = []
    for position, report in enumerate(reports):
        chosen: list[int] = []
        for num_shared in (2, 1, 0):
            near = {other for shared in _shared(report, num_shared) for other in positions_by_shared[shared]}
            candidates = sorted(near - {position, *chosen})
            chosen += random.sample(candidates, min(len(candidates), num_negatives - len(chosen)))
            if len(chosen) == num_negatives:
                break
        negatives.append(chosen)
    return negatives


def _shared(report: Report, num_shared: int) -> Iterator[Shared]:
    """Yield every choice of that many attributes of a report; pages with a choice in common share these."""
    return combinations([("company", report.company), ("topic", report.topic), ("year", report.year)], num_shared)
