"""How a query is worded: whether it points at its page, and when two queries have the same words."""

import re
import unicodedata

_WORDS: dict[str, tuple[str, str, str]] = {
    # what points; what comes before "the" and the like; the things on a page
    "en": (
        r"this|these|the (?:above|following|given|provided|attached|shown|same)",
        r"(?:in|on|from|of|by|see|does|do|according to|shown in|based on) the",
        r"figures?|images?|pictures?|photos?|pages?|tables?|charts?|diagrams?|graphs?|plots?|documents?|screenshots?"
        r"|illustrations?|excerpts?|passages?|slides?",
    ),
    "de": (
        r"diese[rsnm]?|(?:der|die|das|dem|den) (?:obige|folgende|gezeigte|vorliegende)n?",
        r"(?:in|auf|aus|von|laut|zeigt|gemäß|nach) (?:der|dem|den|das|die)|im|vom|zum",
        r"abbildung(?:en)?|bild(?:er)?|seiten?|tabellen?|diagramms?|diagramme?|grafik(?:en)?|dokuments?|dokumente?"
        r"|schaubild(?:er)?|folien?",
    ),
    "fr": (
        r"ce(?:tte|t|s)?",
        r"(?:dans|sur|de|selon|d'après) (?:le|la|les|l')|du|au",
        r"figures?|images?|pages?|tableaux?|graphiques?|diagrammes?|documents?|illustrations?|schémas?",
    ),
    "es": (
        r"est[aeo]s?|es[aeo]s?",
        r"(?:en|de|según|sobre) (?:el|la|los|las)|del|al",
        r"figuras?|im[aá]gen(?:es)?|páginas?|tablas?|gráfic[oa]s?|diagramas?|documentos?|ilustraci(?:ón|ones)",
    ),
    "it": (
        r"quest[aeio]|quest'",
        r"(?:secondo|in|su) (?:il|lo|la|le|i|gli)|nel(?:la|le|lo)?|sul(?:la)?|del(?:la)?",
        r"figur[ae]|immagin[ei]|pagin[ae]|tabell[ae]|grafic[oi]|diagramm[ai]|document[oi]",
    ),
    "pt": (
        r"est[ae]s?|ess[ae]s?|nest[ae]|dest[ae]",
        r"(?:em|segundo|conforme) [oa]s?|n[oa]s?|d[oa]s?",
        r"figuras?|imagens?|imagem|páginas?|tabelas?|gráficos?|diagramas?|documentos?",
    ),
    "nl": (
        r"deze|dit|(?:de|het) (?:bovenstaande|volgende)",
        r"(?:in|op|uit|van|volgens) (?:de|het)",
        r"figuur|figuren|afbeelding(?:en)?|pagina'?s?|tabel(?:len)?|grafiek(?:en)?|diagram(?:men)?|document(?:en)?",
    ),
}
_ENDS = r"(?=\s*(?:[?,.;:!)]|$|show|say|list|mention|describe|contain|depict|present|above|below|zeig|abgebildet|oben))"
_NUMBERED = r"\b(?:figure|fig\.?|table|tab\.?|chart|abbildung|abb\.?|tabelle|tableau|tabla|tabella|tabela|figura)\s+\d+"
_CJK = (
    r"(?:这张|这个|该|此|本|上面的|この|上記の|下記の|以下の)"
    r"(?:图|表|页|文档|文件|图片|图表|図|ページ|文書|グラフ|画像|資料)"
)
_POINTING = re.compile(
    "|".join(
        [
            *(
                rf"\b(?:{points})\s+(?:\w+\s+)?(?:{things})\b|\b(?:{before})\s*(?:{things})\b{_ENDS}"
                for points, before, things in _WORDS.values()
            ),
            _NUMBERED,
            _CJK,
        ]
    ),
    re.IGNORECASE,
)


def points_at_its_page(query: str) -> bool:
    """Whether a query refers to the page it was written about, which nobody sees who searches.

    English, German, French, Spanish, Italian, Portuguese and Dutch, and a little Chinese and Japanese.

    Example:
        >>> points_at_its_page("What does this figure show?"), points_at_its_page("Who wrote the Book of Kells?")
        (True, False)
    """
    plain = unicodedata.normalize("NFKC", query).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return _POINTING.search(plain) is not None


def normalized(query: str) -> str:
    """A text that two queries share where their words are the same.

    Example:
        >>> normalized("How many  work here?") == normalized("how many work here")
        True
    """
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split()).strip(" ?!.。")
