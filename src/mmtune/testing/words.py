"""The words of the generated pages and of their queries; the tiny tokenizers know each of them as one token."""

COMPANIES = (
    "Amberly",
    "Borealis",
    "Cobalt",
    "Dunmore",
    "Everest",
    "Fjordland",
    "Granit",
    "Halcyon",
    "Juniper",
    "Kestrel",
)
UNIT_BY_TOPIC = {
    "Revenue": "EUR m",
    "Profit": "EUR m",
    "Exports": "kt",
    "Hiring": "staff",
    "Energy": "GWh",
    "Safety": "audits",
    "Traffic": "trips",
    "Water": "ML",
}
TOPICS = tuple(UNIT_BY_TOPIC)
YEARS = ("2019", "2020", "2021", "2022", "2023", "2024")
QUARTERS = ("Q1", "Q2", "Q3", "Q4")
REGIONS = ("Asia", "Africa", "Europe", "Americas")

QUERY_TEMPLATES = (
    "What does {company} report on {topic} in {period}?",
    "How did {topic} develop at {company} in {period}?",
    "{company} {topic} figures for {period}",
    "Show the {topic} report of {company} for {period}",
)

BODY_TEMPLATES = (
    "{topic} at {company} {verb} by {percent} % in {period}.",
    "In {period}, {topic} {verb} by {percent} %.",
    "{company} closed {period} with {topic} that {verb} by {percent} %.",
)
BODY_ENDINGS = (
    "The last quarter was the strongest.",
    "The plan for next year is unchanged.",
    "Details are in the table and the chart.",
    "The board had expected less.",
    "All figures are unaudited.",
)
VERBS = ("rose", "fell", "grew", "shrank")


def sentences() -> list[str]:
    """Text in which every word of a page or of a query occurs, to train a tokenizer on."""
    names = " ".join((*COMPANIES, *TOPICS, *YEARS, *QUARTERS, *REGIONS, *VERBS))
    return [names, *QUERY_TEMPLATES, *BODY_TEMPLATES, *BODY_ENDINGS, "edition yes no query document"]
