"""Find the numbers of a text and what joins them: signs, operators, equals signs. Exact, linear in the text's length.

Nothing is evaluated: digits become `Fraction`, and an expression is only recognised as such, so that its operands are
not taken for an answer.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from gold_words import ONE_WORDS, TEN_WORDS

MAX_DIGITS = 300  # longer digit strings are no answers, and Python's int() is quadratic in them
MAX_EXPONENT = 300

# --- one spelling for every sign

_TRANSLATION: dict[int, str] = {
    **{ord(c): "-" for c in "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"},
    **{ord(c): " " for c in "\u00a0\u2003\u2002\u3000\t\r"},
    **{ord(c): "\u2009" for c in "\u2009\u202f\u2007"},  # thin spaces part thousands
    **{ord(c): "" for c in "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\ufe0f\u20e3"},
    **{ord(a): b for a, b in zip("⁄∕∙⋅•＝＋，．％（）：＄’٫٬٪。、；！", "//··*=+,.%():$'.,%.,;!", strict=True)},
}
_VULGAR = {c: Fraction(unicodedata.numeric(c)).limit_denominator(8) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_TRANSLATION |= {ord(sign): f" {text}" for sign, text in _VULGAR.items()}  # 2½ is 2 1/2, not 21/2
_OVERSTRUCK = re.compile("(?:\\S[\u0335\u0336])+")
_RAISED = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
_OTHER_DIGITS = re.compile(rf"(?P<raised>[{_RAISED}]+)|(?![0-9])\d")  # every digit of Unicode: ٣ ۳ ३ ３ 𝟑

_COMMANDS = (
    "times=× cdot=· ast=· div=÷ approx=≈ dots=... ldots=... cdots=... sqrt=√ pi=π pm=± mp=± infty=∞ le=≤ leq=≤ "
    "leqslant=≤ ge=≥ geq=≥ geqslant=≥ lt=< gt=> ne=≠ neq=≠ degree=° circ=° Rightarrow=→ implies=→ to=→ "
    "rightarrow=→ cup=∪ cap=∩ lbrace={ rbrace=} left= right= quad= qquad= displaystyle="
)
_PLAIN_COMMANDS = {name: sign or " " for name, sign in (pair.split("=") for pair in _COMMANDS.split())}
NO_VALUE = "□"  # stands for a matrix or a system of equations, which has no value
_TEXT = "text|textbf|textit|textrm|mathrm|mathbf|mbox|bf|bold|boldsymbol|operatorname"
_BRACED = r"\{ ?(-? ?[\d.,]{1,40}) ?\}"
_LATEX: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\! ?"), ""),
    (re.compile(r"\{\{([^{}]{1,40})\}\}"), r"{\1}"),
    (re.compile(r"\{([^{}]{1,40}?) ?\\over ?([^{}]{1,40})\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{,\}(?=\d{3})"), ","),
    (
        re.compile(r"\\begin ?\{(?P<kind>[pbvBV]?matrix|cases|array)\}.{0,2000}?\\end ?\{(?P=kind)\}", re.DOTALL),
        NO_VALUE,
    ),
    (re.compile(r"\\(?:s?out|[bx]?cancel) ?\{[^{}]{0,80}\}"), " "),
    (re.compile(r"\\overline ?\{ ?(\d{1,20}) ?\}"), r"(\1)"),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\,"), "\u2009"),
    (re.compile(r"\\[;: ()\[\]]"), " "),
    (re.compile(rf" ?\\(?:{_TEXT}) ?\{{ ?([^{{}}$\\]{{0,80}}?) ?\}} ?"), r" \1 "),
    (re.compile(r" (\^ ?\{?[23])"), r"\1"),
    (re.compile(rf"\\(?:{_TEXT}) ?\{{"), " {"),
    (re.compile(r"(\d) ?\^ ?\{? ?\\circ ?\}?"), r"\1°"),
]
_FRACTION = re.compile(rf"\\(?:[dtc]|nice)?s?frac ?(?:{_BRACED}|(\d)) ?(?:{_BRACED}|(\d))")
_OTHER_FRACTION = re.compile(r"\\[dtc]?frac ?\{([^{}]{1,60})\} ?\{([^{}]{1,60})\}")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_POWER = re.compile(r"\^ ?[{(] ?(-? ?\d{1,6}) ?[)}]")
_STARS = re.compile(r"(?<=\d)\*\*(?=\d)|(?<=\s)\*\*(?=\s)|\*\*|__")
_ITALICS = re.compile(r"(?<![\w)*])\*([^\s*][^*\n]{0,80})\*(?![\w(*])")
_CALCULATOR = re.compile(r"<<[^<>]{0,200}>>")
_STRUCK = re.compile(r"~~[^~\n]{1,80}~~|<(?P<tag>s|del|strike)>[^<>\n]{1,80}</(?P=tag)>")
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")
_PLAIN_DECIMAL = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")


def plain_text(text: str) -> str:
    """`text` with typographic signs, LaTeX and markdown written as plain characters; \\boxed{…} stays."""
    if not text.isascii():
        text = _OVERSTRUCK.sub("", _OTHER_DIGITS.sub(_plain_digit, text)).translate(_TRANSLATION)
    elif "\t" in text or "\r" in text:
        text = text.translate(_TRANSLATION)
    if "\\" in text or "{," in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        text = _OTHER_FRACTION.sub(r" (\1) / (\2)", _FRACTION.sub(_plain_fraction, text))
        text = _COMMAND.sub(lambda match: _PLAIN_COMMANDS.get(match[1], match.group()), text)
    if "^" in text:
        text = _POWER.sub(r"^\1", text)
    if "~~" in text or "<" in text:
        text = _STRUCK.sub(" ", text)
    if "*" in text or "__" in text:
        text = _STARS.sub(lambda match: "" if _is_markup(match) else "^", text)
        text = _ITALICS.sub(r"\1", text)
    if "<<" in text:
        text = _CALCULATOR.sub("", text)
    return text.replace("`", " ")


def _plain_digit(match: re.Match[str]) -> str:
    if match["raised"]:
        return "^" + "".join("-" if c == "⁻" else str(_RAISED.index(c) - 1) for c in match["raised"])
    return str(unicodedata.decimal(match.group()))


def _plain_fraction(match: re.Match[str]) -> str:
    """\\frac{-3}{4}, \\frac12, \\frac{1,000}{2.5} as -3/4, 1/2, 10000/25."""
    top, bottom = (_THOUSANDS.sub("", match[one] or match[other]).replace(" ", "") for one, other in ((1, 2), (3, 4)))
    if any(not _PLAIN_DECIMAL.fullmatch(part) for part in (top, bottom)):
        return f" ({top}) / ({bottom})"
    sign = "-" if top.startswith("-") != bottom.startswith("-") else ""
    top, bottom = top.lstrip("-"), bottom.lstrip("-")
    places = max(len(part.partition(".")[2]) for part in (top, bottom))
    top, bottom = (str(int(Fraction(part) * 10**places)) for part in (top, bottom))
    before = match.string[: match.start()][-1:]
    return f"{' ' if before.isdigit() or before.isalpha() else ''}{sign}{top}/{bottom}"


def _is_markup(match: re.Match[str]) -> bool:
    before, after = match.string[: match.start()][-1:], match.string[match.end() : match.end() + 1]
    both_digits = before.isdigit() and after.isdigit()
    return match.group() == "__" or not (both_digits or (before.isspace() and after.isspace()))


# --- numbers


class Number(NamedTuple):
    """A number at text[start:end]. `decimals`: digits after the point as written; None for a fraction. `fraction` and
    `power` are the two numbers of 3/4 and of 2^10 as written."""

    start: int
    end: int
    value: Fraction
    decimals: int | None = 0
    significant: int = 0
    percent: bool = False
    ellipsis: bool = False
    fraction: tuple[int, int] | None = None
    power: tuple[int, int] | None = None


_DIGITS = (
    r"\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?"  # 1,234.5
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)(?:\.\d+)?"  # 1,23,456
    r"|\d{1,3}(?:[\u2009'_]\d{3})+(?!\d)(?:[.,]\d+)?"  # thin space, apostrophe, underscore
    r"|(?!0)\d{1,3}(?:[ ]\d{3})+(?![\d/])(?:\.\d+|,\d{1,2}(?!\d))?(?![,\d/]?\d|-[a-z])"  # 12 000,50
    r"|\d{1,3}(?:\.\d{3}){2,}(?!\d)(?:,\d+)?"  # 1.234.567
    r"|\d{1,3}(?:\.\d{3})+,\d{1,2}(?!\d)"  # 1.234,50
    r"|(?P<grouped>\d{1,3}\.\d{3})(?=[ ]?(?:€|EUR\b|[Ee]uros?\b|zł|₫|₽|руб|TL\b|kr\b))"  # 12.000 €
    r"|(?<![,(\[{])(?<![,(\[{]-)\d+,(?:\d{1,2}|\d{4,9})(?![\d,]|[.]\d)"  # 45,50
    r"|\d+(?:\.\d+)?|\.\d+"
)
_DIGIT = re.compile(r"[0-9]")
_POWERS = (  # of ten
    "hundred=2 thousand=3 lakh=5 million=6 crore=7 billion=9 trillion=12 lac=5 cr=7 mn=6 mln=6 mio=6 bn=9 mld=9"
)
_SCALES = {"dozen": 12} | {word: 10 ** int(power) for word, power in (pair.split("=") for pair in _POWERS.split())}
_SCALE_WORDS = "|".join(f"{word}s?" if word in ("lakh", "lac", "crore", "dozen") else word for word in _SCALES)
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SUFFIXES |= dict.fromkeys("千천", 10**3) | dict.fromkeys("万萬만", 10**4) | dict.fromkeys("亿億억", 10**8)
_NUMBER = re.compile(
    rf"""
    (?:
        (?P<whole>\d{{1,40}})[ ]{{1,2}}(?:and[ ])?(?P<over>\d{{1,40}})/(?P<under>\d{{1,40}})(?![\d/])(?!\.\d)
      | (?P<top>\d{{1,40}})/(?P<bottom>\d{{1,40}})(?![\d/])(?!\.\d)
      | (?P<odds>\d{{1,6}})[ -]{{1,2}}(?:in|out[ ]of)[ -]{{1,2}}(?P<chances>(?!(?:19|20)\d\d\b)\d{{1,6}})
        (?=[ ]?(?:[.;!)\n$*"}}]|\Z))(?!\.\d)
      | (?P<base>\d{{1,40}}(?:\.\d{{1,9}})?)[ ]?\^[ ]?(?P<power>[-+]?\d{{1,6}})
      | (?P<period>\d{{1,20}}\.\d{{0,20}}\(\d{{1,20}}\))
      | (?P<digits>{_DIGITS})
        (?:[eE](?P<e>[-+]?\d{{1,9}})(?![\w])
          |[ ]{{0,2}}[x×*·][ ]{{0,2}}10[ ]?\^[ ]?(?P<ten>[-+]?\d{{1,9}}))?
        (?P<ellipsis>\.\.\.|…)?
        (?:[ ]{{0,2}}(?P<scale>(?i:{_SCALE_WORDS}))\b(?:[ ](?P<more>thousand|million|billion)\b)?
          |(?P<suffix>[kKMB](?!\w)|[千천万萬만亿億억]|[mbT](?!\w)(?=[ ]?[.,;!)$*"}}]|[ ]?\Z)))?
    )
    (?P<percent>[ ]?(?:%|per[ ]?cent\b))?
    """,
    re.VERBOSE | re.ASCII,
)
_NOT_A_COUNT = re.compile(
    r"(?:st|nd|rd|th)\b|:\d|[/.]\d|-\d{1,2}-\d|[ ]?(?:[ap]\.?m\b|[AP]\.?M\b|o'clock\b)|_\{?\d|[ ]?base[ ]\d"
)


def find_numbers(text: str) -> list[Number]:
    """The numbers of a plain text, from left to right. Ordinals, times, dates, versions and x2 are none."""
    found = []
    digit = _DIGIT.search(text)
    while digit is not None:
        start = digit.start()
        before = text[max(0, start - 2) : start]
        if before.endswith(".") and not before[0].isalnum():
            start -= 1  # .5
        match = _NUMBER.match(text, start)
        if match is None:
            raise AssertionError("a digit always begins a number")
        number = _number(match, text, before)
        if number is not None:
            found.append(number)
        digit = _DIGIT.search(text, match.end())
    return found


def _number(match: re.Match[str], text: str, before: str) -> Number | None:
    start, end = match.span()
    part_of_a_date = len(before) == 2 and before[1] in ":./" and before[0].isdigit()
    if part_of_a_date or (text[end : end + 1] and _NOT_A_COUNT.match(text, end)):
        return None
    sign = _sign(text, start, end)
    if sign is None:
        return None
    negative, begin = sign
    if match["suffix"] in ("m", "b", "T") and _CURRENCY_SIGNS.isdisjoint(text[begin:start]):  # metres, not millions
        end = match.start("suffix")
        match = _NUMBER.match(text, match.start(), end) or match
    value, decimals, significant = _value(match)
    if value is None:
        return None
    percent, ellipsis = match["percent"] is not None, match["ellipsis"] is not None
    value = value / 100 if percent else value
    fraction = (int(match["top"]), int(match["bottom"])) if match["top"] else None
    power = (int(Fraction(match["base"])), int(match["power"])) if match["power"] else None
    return Number(begin, end, -value if negative else value, decimals, significant, percent, ellipsis, fraction, power)


_NO_VALUE_READ = (None, None, 0)


def _value(match: re.Match[str]) -> tuple[Fraction | None, int | None, int]:
    """(value, decimals, significant digits) of a match of _NUMBER without its sign; no value for 5/0 or 9^9^9."""
    if match["bottom"] or match["under"] or match["chances"]:
        top = int(match["top"] or match["over"] or match["odds"])
        bottom = int(match["bottom"] or match["under"] or match["chances"])
        if bottom == 0 or (match["odds"] and top > bottom):
            return _NO_VALUE_READ
        return int(match["whole"] or 0) + Fraction(top, bottom), None, 0
    if match["power"]:
        base, exponent = Fraction(match["base"]), int(match["power"])
        if abs(exponent) * len(match["base"]) > MAX_EXPONENT or (base == 0 and exponent < 1):
            return _NO_VALUE_READ
        return base**exponent, None, 0
    if match["period"]:  # 0.1(6): the bracketed digits repeat for ever
        fixed, period = match["period"].rstrip(")").split("(")
        places = len(fixed.partition(".")[2])
        return Fraction(fixed + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places), None, 0
    digits = match["grouped"].replace(".", "") if match["grouped"] else _without_separators(match["digits"])
    exponent = int(match["e"] or match["ten"] or 0)
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return _NO_VALUE_READ
    value = Fraction(f"{digits}e{exponent}") if exponent or "." in digits else Fraction(int(digits))
    decimals = len(digits.partition(".")[2])
    significant = len(digits.replace(".", "").lstrip("0"))
    word = (match["scale"] or "").lower().removesuffix("s")
    before = match.string[: match.start()].rstrip(" $") if word == "dozen" else ""
    if before.endswith("=") or (match["scale"] == "dozens" and decimals):
        return value, None, significant  # 28 / 12 = 2.33 dozens
    scale = _SCALES.get(word, 1) * _SCALES.get(match["more"], 1) * _SUFFIXES.get((match["suffix"] or "").lower(), 1)
    return (value, decimals, significant) if scale == 1 and not exponent else (value * scale, None, significant)


def _without_separators(digits: str) -> str:
    """The digits with a point for decimals, whichever way they were grouped."""
    if digits.count(".") > 1 or _EUROPEAN.fullmatch(digits):
        digits = digits.replace(".", "").replace(",", ".")
    return re.sub(r"[, \u2009'_]", "", digits)


_EUROPEAN = re.compile(r"\d{1,3}(?:\.\d{3})+,\d{1,2}|[\d \u2009'_]+,(?:\d{1,2}|\d{4,9})")
_CURRENCY_SIGNS = frozenset("$€£¥₹₽₩₫₺")
_CURRENCY = r"(?:(?:\b(?:US|AU|A|CA|C|HK|NZ|R))?[$€£¥₹₽₩₫₺]|\b(?:USD|EUR|GBP|Rs\.?|INR)) ?"
_SIGN = re.compile(  # $-5, -$5 or - 5, $5
    rf"(?:{_CURRENCY})?(?P<inner>[-+])\Z|(?P<outer>[-+])(?P<space> ?)(?:{_CURRENCY})?\Z|{_CURRENCY}\Z"
)
_SIGN_WORD = re.compile(r"(?P<value>\d\s*)?\b(?:negative|minus) \Z", re.IGNORECASE)
_ENDS_IN_VALUE = re.compile(r"[\d)\]}%]\s*\Z")
_AFTER_EQUALS = re.compile(r"(?:[=(≈{$]|\b(?:is|was|equals))\s*\Z")
_BARE = re.compile(r"\s*(?:[.,;!)\n]|\Z)")


def _sign(text: str, start: int, end: int) -> tuple[bool, int] | None:
    """(negative?, where the number starts with its sign and currency); None for digits that end a word, as x2.

    A dash after a value is an operator, and one before a space a bullet, save after an equals sign.
    """
    offset = max(0, start - 14)
    before = text[offset:start]
    match = _SIGN.search(before)
    ahead = before[: match.start()] if match else before
    begin = offset + len(ahead)
    dash = match and (match["inner"] or match["outer"])
    if not match and before and (before[-1] in "_^" or (before[-1].isalpha() and before[-1].isascii())):
        return None
    if not match or not dash:
        word = _SIGN_WORD.search(ahead)
        negative = word is not None and not word["value"]  # in `5 minus 3` the word is an operator
        return negative, begin - len(word.group()) if word and negative else begin
    spaced = match["space"] == " "
    if ahead[-1:].isalpha() and not spaced:
        return None
    operator = _ENDS_IN_VALUE.search(ahead) is not None or ahead[-1:] in ("-", "+")
    if spaced and not _AFTER_EQUALS.search(ahead):
        opens = begin < 40 and not text[:begin].strip(" \n*_$:(\"'") and _BARE.match(text, end) is not None
        operator = operator or not opens
    return (False, begin + 1) if operator else (dash == "-", begin)


# --- number words

_ONES = {word: value for value, word in enumerate(ONE_WORDS.split())}
_TENS = {word: 10 * (value + 2) for value, word in enumerate(TEN_WORDS.split())}
_BIG = {word: size for word, size in _SCALES.items() if len(word) > 4 or word == "lakh"}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4}
_PARTS |= {"fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_WORD = rf"(?:{'|'.join([*sorted([*_ONES, *_TENS], key=len, reverse=True), *_BIG])})(?![^\W_])"
_WORDS = re.compile(
    rf"""
    (?P<cue>\A[\s:*_"'(]{{0,9}}|\b(?:answer|result)\s?(?:is|:)\s{{0,2}}|=\s?|boxed\{{[ ]?)?
    (?P<minus>(?<![^\W_])(?:minus|negative)[ ])?(?<![^\W_])
    (?P<words>(?:a[ ](?={_SCALE_WORDS}))?(?P<whole>{_WORD}(?:[ -](?:and[ ])?{_WORD}){{0,14}})
        (?:[ ]point(?P<decimals>(?:[ ](?:{"|".join(_ONES)})\b){{1,12}})
          |(?P<half>[ ]and[ ]a[ ]half\b)|[ -](?P<part>{"|".join(_PARTS)})s?\b)?
      |(?:a[ ]|one[ ])?(?P<share>half|quarter)\b)
    (?:(?:[ ]of)?(?:[ ]a)?(?P<scale>[ ](?:{_SCALE_WORDS})\b))?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_AND_A_HALF = re.compile(r"(?<=\d)[ ]{1,2}and a half\b")
_WEAK_WORDS = ("one", "half", "a half", "quarter", "a quarter", "one half", "one quarter")
_ALONE = re.compile(rf"\s*(?:[.!,;)}}]|\n|$)|[ ](?:in|out[ ]of)[ ](?:\d|{_WORD})")


def digits_for_words(text: str) -> str:
    """English number words as digits: all of them if the text has no digit, else only those announced as an answer."""
    text = _AND_A_HALF.sub(".5", text)
    has_digits = _DIGIT.search(text) is not None

    def as_digits(match: re.Match[str]) -> str:
        # "one" and "half" are mostly no numbers ("this one"): only where they are announced and nothing follows.
        announced = match["cue"] is not None
        alone = announced and _ALONE.match(text, match.end()) is not None
        weak = match["words"].lower() in _WEAK_WORDS and not match["scale"] and not alone
        written = None if weak or (has_digits and not announced) else _digits(match)
        cue, minus, scale = (match[name] or "" for name in ("cue", "minus", "scale"))
        return match.group() if written is None else cue + minus + written + scale

    return _WORDS.sub(as_digits, text)


def _digits(match: re.Match[str]) -> str | None:
    """`205`, `3.14`, `2.5`, `3/4` of a match of _WORDS; None if its words make no number."""
    if match["share"]:
        return "0.5" if match["share"].lower() == "half" else "0.25"
    value = words_value(match["whole"])
    if value is None or not match["decimals"]:
        end = ".5" if match["half"] else f"/{_PARTS[match['part'].lower()]}" if match["part"] else ""
        return None if value is None else f"{value}{end}"
    decimals = [_ONES[word] for word in match["decimals"].lower().split()]
    return f"{value}.{''.join(map(str, decimals))}" if max(decimals) < 10 else None


def words_value(words: str) -> int | None:
    """two hundred and five → 205; None for words that make no number, such as `two three`."""
    total, group, last = 0, 0, 10**9
    for word in words.lower().replace("-", " ").split():
        if size := _BIG.get(word):
            total, group = (total, max(group, 1) * size) if size <= 100 else (total + max(group, 1) * size, 0)
            last = size
        elif word != "and":
            value = _ONES.get(word, _TENS.get(word, 0))
            if value >= last or last < 20 or (last < 100 and value > 9):
                return None
            group, last = group + value, value or last
    return total + group
