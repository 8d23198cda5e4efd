"""What is done to one text before it is looked at beside others, in the order of Wu et al., "GEB-1.3B: Open
Lightweight Large Language Model", 2024 (arXiv 2406.09900): markup, garbled text, addresses, lines, words, length.

The paper names the steps; the patterns and bounds are ours, those of lines are of Raffel et al., "Exploring the Limits
of Transfer Learning with a Unified Text-to-Text Transformer", 2019 (arXiv 1910.10683), section 2.2.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from dataclasses import dataclass

from pegbox.data.identity import normalised
from pegbox.data.shingles import UNSPACED
from pegbox.pretrain.settings import CleanSettings

ROUNDS = 16  # a text that is still not clean has tags in tags in tags, and was made to hold up whoever cleans it


@dataclass(frozen=True)
class Cleaned:
    """A text, or the reason for which it is dropped."""

    text: str | None
    reason: str | None = None


def clean(text: str, settings: CleanSettings) -> Cleaned:
    """A text without what does not belong to it. Cleaning what is clean changes nothing: steps are repeated for as
    long as one makes work for an earlier one."""
    for _ in range(ROUNDS):
        cleaned = _once(text, settings)
        if cleaned.text is None or cleaned.text == text:
            return cleaned
        text = cleaned.text
    return Cleaned(None, "nested markup")


def too_short(text: str, settings: CleanSettings) -> str | None:
    """The reason to drop a text of too few characters, or None."""
    if not text or text.isspace():
        return "empty"
    return "short" if len(text) < settings.least else None


def without_repeated_paragraphs(text: str) -> str:
    """A paragraph that says what the one before it says, case and spacing aside, is left out."""
    parts, last = [], None
    for part in re.split(r"(\n[ \t]*\n\s*)", text):  # paragraphs, and what lies between them
        said = normalised(part)
        if said and said == last:
            parts.pop()
            continue
        parts.append(part)
        last = said or last
    return "".join(parts)


def _once(text: str, settings: CleanSettings) -> Cleaned:
    text = re.sub("\r\n?|[\v\f]", "\n", text).replace("\ufeff", "")
    if settings.markup:
        text = without_markup(text)
    if sum(map(len, GARBLED.findall(text))) > settings.garbled * len(text):
        return Cleaned(None, "garbled")
    text = GARBLED.sub("", text)
    if settings.addresses:
        text = without_addresses(text)
    if settings.lines:
        text = _whole_lines(text)
    if settings.words and _any_of(settings.words).search(text.casefold()):
        return Cleaned(None, "words")
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())  # indentation of the first line stays
    text = text if settings.most is None else _cut(text, settings.most)
    reason = too_short(text, settings)
    return Cleaned(None, reason) if reason else Cleaned(text)


# Markup

KINDS = {  # kind of element -> names, and what its tags leave in the text
    "inline": (
        "a|abbr|acronym|b|bdi|bdo|big|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark|meter|output|progress|q|rp|rt|"
        "ruby|s|samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr",
        "",
    ),
    "cell": ("td|th", " "),
    "line": (
        "address|applet|area|article|aside|audio|base|body|br|button|canvas|caption|center|col|colgroup|datalist|dd|"
        "details|dialog|dir|dl|dt|embed|fieldset|figcaption|figure|footer|form|frame|frameset|head|header|hr|html|iframe|"
        "img|input|legend|li|link|main|map|menu|meta|nav|noframes|noscript|object|optgroup|option|param|picture|script|"
        "select|source|style|summary|svg|tbody|template|textarea|tfoot|thead|title|tr|track|video",
        "\n",
    ),
    "paragraph": ("blockquote|div|h1|h2|h3|h4|h5|h6|ol|p|pre|section|table|ul", "\n\n"),
}
BARE = (  # attributes without a value
    "allowfullscreen|async|autoplay|checked|compact|controls|defer|disabled|hidden|itemscope|loop|multiple|muted|noshade|"
    "nowrap|open|readonly|required|reversed|selected"
)
# Only what HTML knows is taken for a tag: a < b, <EOL> and vector<int> are text.
TAG = re.compile(
    rf"""</?(?:{"|".join(f"(?P<{kind}>{names})" for kind, (names, _) in KINDS.items())})
    (?:\s+(?:[\w:@.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)|(?:{BARE})(?![\w-])))*
    \s*/?>|<!doctype[^<>]*>|<\?xml[^<>]*>""",
    re.IGNORECASE | re.VERBOSE,
)
HIDDEN = [  # opening, closing: no reader sees what is between
    (re.compile(rf"<{name}(?=[\s>])", re.IGNORECASE), re.compile(rf"</{name}\s*>", re.IGNORECASE))
    for name in ("script", "style")
] + [(re.compile("<!--"), re.compile("-->"))]
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\da-fA-F]{1,6}|[a-zA-Z]\w{1,30});")


def without_markup(text: str) -> str:
    """Text as a browser would show it: scripts, styles, comments and tags gone, blocks on lines of their own."""
    for opening, closing in HIDDEN:
        text = _without_spans(text, opening, closing)
    if TAG.search(text):
        text = ENTITY.sub(_character, TAG.sub(_gap, text))
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(map(str.rstrip, text.split("\n"))))
    return text


def _without_spans(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str:
    parts, at = [], 0
    while (start := opening.search(text, at)) and (end := closing.search(text, start.end())):
        parts.append(text[at : start.start()])
        at = end.end()
    return "".join([*parts, text[at:]])


def _gap(tag: re.Match[str]) -> str:
    return KINDS[tag.lastgroup or "line"][1]


def _character(entity: re.Match[str]) -> str:
    """What an entity stands for; of < and > it stays, as it would make tags that are none."""
    sign = html.unescape(entity[0]).replace("\xa0", " ")
    return entity[0] if "<" in sign or ">" in sign else sign


# Garbled text and addresses

# Control characters, undecodable bytes, halves of surrogate pairs, private and impossible characters.
GARBLED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffd-\uffff]+")

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
ADDRESSES = [  # in this order: a link may hold an address; letters are those of ASCII, as Chinese sets no spaces
    (re.compile(pattern, re.ASCII | re.IGNORECASE), placeholder)
    for pattern, placeholder in [
        (r"(?<!\w)(?:(?:https?|ftp)://|www\.(?=\w))[!#-&*-;=?-Z\\^-z|~]*[#-&*+\-/-9=@-Z\\^-z|~]", "[link]"),
        (r"(?<![\w.+-])[\w.+-]+@(?:[\w-]+\.)+[a-z]{2,}", "[email]"),
        (rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\d)", "[ip]"),
        (r"(?<![\w:])(?:[\da-f]{1,4}:){7}[\da-f]{1,4}(?![\w:])", "[ip]"),
        (
            r"(?<![\w+])\+(?=(?:[ ()./-]*\d){8})\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}(?!\w)",
            "[phone]",
        ),  # +44 20 7946 0958
        (r"(?<![\w-])(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-])", "[phone]"),  # (212) 555-0123
        (r"(?<![\w-])0\d{2,4}[ /-]\d{3,4}[ /-]?\d{3,5}(?![\w-])", "[phone]"),  # 030 123 4567, 010-1234-5678
        (r"(?<!\w)1[3-9]\d{9}(?!\w)", "[phone]"),  # Chinese mobiles
    ]
]


def without_addresses(text: str) -> str:
    """Links, e-mail addresses, IP and telephone numbers as placeholders in brackets."""
    for pattern, placeholder in ADDRESSES:
        text = pattern.sub(placeholder, text)
    return text


# Lines, words, length

CLOSED = re.compile(r"""[.!?…。！？؟۔।॥][\])}"'”’»›」』）*_]*\s*\Z""")  # as emphasis or a quotation may follow
WEB = re.compile("javascript|terms of use|privacy policy|cookie policy|use of cookies|uses? cookies", re.IGNORECASE)


def _whole_lines(text: str) -> str:
    """Without lines that are no sentences. A line that goes on in lower case is judged by where its sentence ends."""
    kept: list[str] = []
    following = ""  # the next line, if it is kept
    for line in reversed(text.split("\n")):
        blank = not line.strip()
        goes_on = following.lstrip()[:1].islower()
        whole = _has_letter(line) and not WEB.search(line) and (goes_on or CLOSED.search(line))
        if blank or whole:
            kept.append(line)
        following = line if whole else ""
    return re.sub(r"\n[^\S\n]*(?:\n[^\S\n]*){2,}", "\n\n", "\n".join(reversed(kept)))


def _has_letter(line: str) -> bool:
    return any(map(str.isalpha, line))


@functools.lru_cache(maxsize=16)
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    """Each as a whole word, case aside; of scripts without spaces, anywhere."""
    return re.compile("|".join(_whole(word.casefold()) for word in words if word.strip()) or "(?!)")


def _whole(word: str) -> str:
    left, right = (r"(?<!\w)", r"(?!\w)") if not re.search(f"[{UNSPACED}]", word) else ("", "")
    return f"{left}{re.escape(word)}{right}"


def _cut(text: str, most: int) -> str:
    """At most so many characters, ending with a word where spaces tell words apart."""
    if len(text) <= most:
        return text
    end = most
    while end and unicodedata.combining(text[end]):  # not between a letter and its accent
        end -= 1
    space = next((at for at in range(end, most // 2, -1) if text[at].isspace()), end)
    return text[:space].rstrip()
