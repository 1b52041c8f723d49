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
from run_on import words_of

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
# Most numbers are a few digits with nothing after them that could belong to the number.
_SHORT = re.compile(
    r"\d{1,15}(?:(?=[;:!?)\]}\n\"=+])(?!:\d)|\Z|(?=[ ](?![ \dxX×*·%pPmMbBtThHlLcCdD.…^io-]|and[ ]\d))"
    r"|(?=[.,](?![\d.(€])))",
    re.ASCII,
)
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
        match = _SHORT.match(text, start) or _NUMBER.match(text, start)
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
    if match.re is _SHORT:
        digits = match.group()
        whole = int(digits)
        return Number(begin, end, Fraction(-whole if negative else whole), 0, len(digits.lstrip("0")))
    if match["suffix"] in ("m", "b", "T") and _CURRENCY_SIGNS.isdisjoint(text[begin:start]):  # metres, not millions
        end = match.start("suffix")
        match = _NUMBER.match(text, match.start(), end) or match
    read = _read(match)
    if read is None:
        return None
    value, decimals, significant, fraction = read
    percent = match["percent"] is not None
    value = value / 100 if percent else value
    ellipsis = match["ellipsis"] is not None
    power = (int(Fraction(match["base"])), int(match["power"])) if match["power"] else None
    return Number(begin, end, -value if negative else value, decimals, significant, percent, ellipsis, fraction, power)


def _read(match: re.Match[str]) -> tuple[Fraction, int | None, int, tuple[int, int] | None] | None:
    """(value, decimals, significant digits, fraction as written) without sign and percent; None if it has no value."""
    if match["bottom"] or match["under"]:
        top, bottom = int(match["top"] or match["over"]), int(match["bottom"] or match["under"])
        if bottom == 0:
            return None
        whole = int(match["whole"] or 0)
        return whole + Fraction(top, bottom), None, 0, None if match["whole"] else (top, bottom)
    if match["odds"]:
        one, chances = int(match["odds"]), int(match["chances"])
        return (Fraction(one, chances), None, 0, None) if one <= chances and chances else None
    if match["power"]:
        base, exponent = Fraction(match["base"]), int(match["power"])
        if abs(exponent) * len(match["base"]) > MAX_EXPONENT or (base == 0 and exponent < 1):
            return None
        return base**exponent, None, 0, None
    if match["period"]:
        return _repeating(match["period"]), None, 0, None
    digits = match["grouped"].replace(".", "") if match["grouped"] else _without_separators(match["digits"])
    exponent = int(match["e"] or match["ten"] or 0)
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return None
    before, _, after = digits.partition(".")
    value = Fraction(int((before or "0") + after), 10 ** len(after))
    significant = len((before + after).lstrip("0"))
    if exponent or match["suffix"] or match["scale"]:
        scale = _SUFFIXES[match["suffix"].lower()] if match["suffix"] else 1
        word = (match["scale"] or "").lower()
        quotient = match.string[max(0, match.start() - 4) : match.start()].rstrip(" $").endswith("=")
        if not (word == "dozens" and after) and not (word.startswith("dozen") and quotient):  # 28 / 12 = 2.33 dozens
            scale = _SCALES.get(word.removesuffix("s"), scale) * _SCALES.get(match["more"], 1)
        return value * scale * Fraction(10) ** exponent, None, significant, None
    return value, len(after), significant, None


def _without_separators(digits: str) -> str:
    """The digits with a point for decimals, whichever way they were grouped."""
    if digits.count(".") > 1 or _EUROPEAN.fullmatch(digits):
        digits = digits.replace(".", "").replace(",", ".")
    return _SEPARATORS.sub("", digits)


_EUROPEAN = re.compile(r"\d{1,3}(?:\.\d{3})+,\d{1,2}|[\d \u2009'_]+,(?:\d{1,2}|\d{4,9})")
_SEPARATORS = re.compile(r"[, \u2009'_]")


def _repeating(written: str) -> Fraction:
    """0.(3) and 0.1(6): the bracketed digits repeat for ever."""
    fixed, period = written.rstrip(")").split("(")
    places = len(fixed.partition(".")[2])
    return Fraction(fixed.rstrip(".") or "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)


_CURRENCY_SIGNS = frozenset("$€£¥₹₽₩₫₺")
_CURRENCY = re.compile(r"(?:(?:\b(?:US|AU|A|CA|C|HK|NZ|R))?[$€£¥₹₽₩₫₺]|\b(?:USD|EUR|GBP|Rs\.?|INR)) ?\Z")
_SIGN_WORD = re.compile(r"\b(?:negative|minus) \Z", re.IGNORECASE)
_ENDS_IN_VALUE = re.compile(r"[\d)\]}%]\s*\Z")
_AFTER_EQUALS = re.compile(r"(?:[=(≈{$]|\b(?:is|was|equals))\s*\Z")
_BARE = re.compile(r"\s*(?:[.,;!)\n]|\Z)")


def _sign(text: str, start: int, end: int) -> tuple[bool, int] | None:
    """(negative?, where the number starts with its sign and currency); None for digits that end a word, as x2.

    A dash after a value is an operator, and one before a space a bullet, save after an equals sign.
    """
    if start == 0:
        return False, 0
    before = text[max(0, start - 14) : start]
    last = before[-1]
    dash = None
    if last in "-+":
        dash, before = last, before[:-1]
    currency = _CURRENCY.search(before) if before[-1:] in _BEFORE_DIGITS else None
    if currency:
        before = before[: currency.start()]
    elif dash is None and (last in "_^" or (last.isalpha() and last.isascii())):
        return None
    spaced = False
    if dash is None and before.rstrip(" ")[-1:] in ("-", "+") and len(before) - len(before.rstrip(" ")) <= 1:
        spaced = before.endswith(" ")
        dash, before = before.rstrip(" ")[-1], before.rstrip(" ")[:-1]
    begin = start - len(text[max(0, start - 14) : start]) + len(before)
    if dash is None:
        return _worded_sign(before, begin)
    if before[-1:].isalpha() and not spaced:
        return None
    if _ENDS_IN_VALUE.search(before) or before[-1:] in ("-", "+"):
        return False, begin + 1
    if spaced and not _AFTER_EQUALS.search(before):
        opens = begin < 40 and not text[:begin].strip(" \n*_$:(\"'") and _BARE.match(text, end) is not None
        if not opens:
            return False, begin + 1
    return dash == "-", begin


_BEFORE_DIGITS = _CURRENCY_SIGNS | frozenset(" .DRPsN")


def _worded_sign(before: str, begin: int) -> tuple[bool, int]:
    """`negative 3`; in `5 minus 3` the word is an operator."""
    word = _SIGN_WORD.search(before) if before.endswith(("minus ", "negative ", "Minus ", "Negative ")) else None
    if word is None or re.search(r"\d\s*\Z", before[: word.start()]):
        return False, begin
    return True, begin - len(word.group())


# --- number words

_ONES = {word: value for value, word in enumerate(ONE_WORDS.split())}
_TENS = {word: 10 * (value + 2) for value, word in enumerate(TEN_WORDS.split())}
_BIG = {word: size for word, size in _SCALES.items() if len(word) > 4 or word == "lakh"}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4}
_PARTS |= {"fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_WORD = "|".join([*sorted([*_ONES, *_TENS], key=len, reverse=True), *_BIG])
_PART = "|".join(f"{part}s?" for part in _PARTS)
NUMBER_WORDS = (
    rf"(?:(?:minus|negative)[ ])?(?:a[ ](?={_SCALE_WORDS}))?(?:{_WORD})\b"
    rf"(?:[ -](?:and[ ])?(?:{_WORD})\b){{0,14}}"
    rf"(?:[ ]point(?:[ ](?:{'|'.join(_ONES)})\b){{1,12}}"
    rf"|[ ]and[ ]a[ ]half\b(?:[ ](?:{_SCALE_WORDS})\b)?|[ -](?:{_PART})\b)?"
    rf"|\b(?:a[ ]|one[ ])?(?:half|quarter)(?:[ ](?:a|of[ ]a)[ ](?:{_SCALE_WORDS}))?\b"
)
_ALL_WORDS = re.compile(rf"\b(?:{NUMBER_WORDS})", re.IGNORECASE)
_STRONG_WORDS = re.compile(
    rf"(?P<cue>\A[\s:*_\"'(]{{0,9}}|\b(?:answer|result)\s?(?:is|:)\s{{0,2}}|=\s?|boxed\{{[ ]?)"
    rf"(?P<words>{NUMBER_WORDS})",
    re.IGNORECASE,
)
_AND_A_HALF = re.compile(r"(?<=\d)[ ]{1,2}and a half\b")
_COUNTING_WORDS = frozenset([*_ONES, *_TENS, *_BIG, "half", "quarter"])
_WEAK_WORDS = ("one", "half", "a half", "quarter", "a quarter", "one half", "one quarter")
_ALONE = re.compile(rf"\s*(?:[.!,;)}}]|\n|$)|[ ](?:in|out[ ]of)[ ](?:\d|(?:{_WORD})\b)")


_CHINESE_DIGITS = {c: value for value, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_DIGITS |= {c: value for value, c in enumerate("壹贰叁肆伍陆柒捌玖", start=1)}
_CHINESE_SIZES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8, "拾": 10, "佰": 100, "仟": 1000}
_CHINESE_NUMERAL = f"[{''.join([*_CHINESE_DIGITS, *_CHINESE_SIZES])}]"
_CHINESE = re.compile(
    rf"(?P<cue>\A[ $*]{{0,4}}|(?:\bis |答案|答|结果|等于|是|为|は)[是为:= ]{{0,3}}|=[ ]?|boxed\{{)(?P<minus>负?)"
    rf"(?P<whole>{_CHINESE_NUMERAL}{{1,20}})(?:分之(?P<top>{_CHINESE_NUMERAL}{{1,20}})"
    rf"|点(?P<decimals>{_CHINESE_NUMERAL}{{1,20}}))?(?![起样定些般])"
)


def _chinese_as_digits(match: re.Match[str]) -> str:
    """答案是三十五 as 答案是 35; 三分之二 is 2/3."""
    text = str(_chinese_whole(match["whole"]))
    if match["top"]:
        text = f"{_chinese_whole(match['top'])}/{text}"
    elif match["decimals"]:
        text += "." + "".join(str(_CHINESE_DIGITS.get(c, "")) for c in match["decimals"])
    return f"{match['cue']} {'-' if match['minus'] else ''}{text}"


def _chinese_whole(numeral: str) -> int:
    if all(c in _CHINESE_DIGITS for c in numeral):
        return int("".join(str(_CHINESE_DIGITS[c]) for c in numeral))
    total, group, digit = 0, 0, 0
    for c in numeral:
        size = _CHINESE_SIZES.get(c, 0)
        if not size:
            digit = _CHINESE_DIGITS[c]
        elif size < 10**4:
            group, digit = group + (digit or 1) * size, 0
        else:
            total, group, digit = (total + group + digit) * size, 0, 0
    return total + group + digit


def digits_for_words(text: str) -> str:
    """Number words as digits: all of them where the text has no digit, else only where an answer is announced."""
    if not text.isascii():
        text = _CHINESE.sub(_chinese_as_digits, text)
    if _COUNTING_WORDS.isdisjoint(words_of(text)):
        return text
    text = _AND_A_HALF.sub(" 1/2", text)
    has_digits = _DIGIT.search(text) is not None
    text = _STRONG_WORDS.sub(lambda match: match["cue"] + _as_digits(match, match["words"]), text)
    if has_digits:
        return text
    return _ALL_WORDS.sub(lambda match: _as_digits(match, match.group()), text)


def _as_digits(match: re.Match[str], words: str) -> str:
    # "one" and "half" are mostly no numbers ("this one"): only where they are announced and nothing follows.
    if words.lower() in _WEAK_WORDS and (match.re is _ALL_WORDS or not _ALONE.match(match.string, match.end())):
        return words
    value = words_value(words)
    if value is None:
        return words
    return str(value) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


def words_value(words: str) -> Fraction | None:
    """Value of English number words: `minus two hundred and five`, `three point one four`, `two and a half`."""
    tokens = words.lower().replace("-", " ").split()
    negative = tokens[:1] in (["minus"], ["negative"])
    tokens = tokens[1:] if negative else tokens
    if tokens[-1:] and tokens[-1] in _BIG and "half" in tokens:  # half a million, two and a half million
        half = words_value(" ".join(tokens[:-1]).removesuffix(" a").removesuffix(" of"))
        return None if half is None else half * _BIG[tokens[-1]] * (-1 if negative else 1)
    part = Fraction(1)
    if tokens[-1:] and _part(tokens[-1]):
        if tokens[-3:-1] == ["and", "a"]:
            value = _whole(tokens[:-3])
            value = None if value is None else value + Fraction(1, 2)
            return None if value is None else (-value if negative else value)
        part = Fraction(1, _part(tokens[-1]))
        tokens = tokens[:-1] or ["one"]
    whole, _, decimals = " ".join(tokens).partition(" point ")
    value = _whole(whole.split())
    if value is None:
        return None
    for place, digit in enumerate(decimals.split(), start=1):
        if _ONES.get(digit, 10) > 9:
            return None
        value += Fraction(_ONES[digit], 10**place)
    return -value * part if negative else value * part


def _part(word: str) -> int:
    return _PARTS.get(word) or _PARTS.get(word.removesuffix("s"), 0)


def _whole(tokens: list[str]) -> Fraction | None:
    """two hundred and five → 205; None for words that make no number, such as `two three`."""
    total, group, last = 0, 0, 10**9
    for token in tokens:
        if token in ("and", "a"):
            continue
        if token in _BIG:
            size = _BIG[token]
            if size <= 100:
                group = max(group, 1) * size
            else:
                total, group = total + max(group, 1) * size, 0
            last = size
            continue
        value = _ONES.get(token, _TENS.get(token))
        if value is None or value >= last or (last < 20) or (20 <= last < 100 and value > 9):
            return None
        group, last = group + value, value if value else 0
    return Fraction(total + group)
