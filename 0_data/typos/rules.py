"""Rules that the generator of variants and the linter share: words, protected text, edits, and what each style allows.

Protected text is what no edit may touch: digits, number words, operators, units after a number, URLs, code, formulas,
quoted text, `{placeholders}`, labels such as `Answer:`, the row's `task` and its `answer`. In a prompt about arithmetic
(`is_arithmetic`) the words that decide the calculation (plus, from, halve, mean …) and every unit are protected too.
A label is one to three words, the first with a capital, that begin a line or a sentence and end in a colon. An
instruction (`Calculate:`, `Translate this:`) is no label.

A word is a run of ASCII letters with white space or punctuation around it; words with digits, hyphens, apostrophes
or other marks inside are never edited. A *real word* is one of Zipf frequency >= 3 in wordfreq's English list
(once per million words; Speer 2022). One edit is one of optimal string alignment distance 1: a letter replaced,
left out or added, or two neighbours transposed.
"""

from __future__ import annotations

import json
import math
import random
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from token_spans import LABEL_COLON

STYLES = (
    "main", "swap", "missing", "repeated", "two", "three", "grammar", "punctuation",
    "homonym", "polite", "urgent", "noise_words", "split", "real_word",
)  # fmt: skip
FRAMING_STYLES = ("polite", "urgent")
FIXED_COUNTS = {"two": 2, "three": 3}
NON_WORD_STYLES = ("main", "swap", "missing", "repeated", "two", "three", "noise_words")
OPERATIONS = {
    "main": ("substitution",),
    "swap": ("transposition",),
    "missing": ("deletion",),
    "repeated": ("doubling",),
}  # the one kind of edit that the style's name promises
TYPO_OPERATIONS = ("substitution", "transposition", "deletion", "doubling")

REAL_WORD_ZIPF = 3.0
CLEAR_WORD_ZIPF = 4.0  # what `real_word` makes: above 3 wordfreq lists many names and slips too
KNOWN_WORD_ZIPF = 2.0  # rarer than this: no sure spelling to depart from, and no word that a typo could make
SHORTEST_CONTENT_WORD = 4
SHORTEST_FUNCTION_WORD = 3
SOFT_HYPHEN = "\u00ad"

Span = tuple[int, int]  # characters, end exclusive
T = TypeVar("T")


def word_set(text: str) -> frozenset[str]:
    """The white-space separated words of `text`."""
    return frozenset(text.split())


FUNCTION_WORDS = word_set(
    """
    a about above across after again against all almost along already also although always am among an and
    another any anybody anyone anything are around as at away be because been before behind being below between
    both but by can cannot could did do does doing done down during each either else enough even ever every
    everyone everything few for from further had has have having he hence her here hers herself him himself his
    how however i if in indeed instead into is it its itself just least less like many may maybe me might mine
    more most much must my myself near neither never nevertheless no nobody none nor not nothing now of off
    often on once one only onto or other others otherwise ought our ours ourselves out over own per perhaps
    please quite rather really same shall she should since so some somebody someone something still such than
    that the their theirs them themselves then there therefore these they this those though through throughout
    thus to together too toward towards under unless until up upon us very was we well were what whatever when
    whenever where whereas wherever whether which whichever while who whoever whom whose why will with within
    without would yet you your yours yourself
    """
)

NUMBER_WORDS = word_set(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand
    thousands million millions billion billions trillion dozen dozens first second third fourth fifth sixth
    seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth
    nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth hundredth thousandth
    millionth billionth thirds quarter quarters fourths fifths sixths sevenths eighths ninths tenths elevenths twelfths
    sixteenths twentieths hundredths thousandths millionths trillions quadrillion half halves once twice thrice double
    triple quadruple single pair
    """
)

ARITHMETIC_WORDS = word_set(
    """
    plus minus times multiplied multiply multiplies multiplying divided divide divides dividing add adds added
    adding addition subtract subtracts subtracted subtracting subtraction multiplication division sum sums
    difference product quotient remainder total altogether less more fewer than by from into over greater
    smaller larger increased increase increases decreased decrease decreases reduced ratio percent percentage
    each every per left remaining remain remains equal equals equally square squared cube cubed power root
    negative positive modulo deduct deducted take away combined together split shared
    halve halved halving doubles doubled doubling triples tripled tripling treble trebled trebling quadruples
    quadrupled quadrupling quintuple quintupled twofold threefold fourfold fivefold tenfold squares squaring cubes
    cubing powers roots factorial factorials exponent exponents logarithm logarithms products quotients remainders
    differences ratios percents percentages percentile fraction fractions numerator denominator decimal decimals
    reciprocal factor factors factored multiple multiples divisor divisors divisible dividend summed summing totals
    totaled totalled totaling totalling reduces reducing deducts deducting deduction mean means median medians
    mode modes average averages averaged averaging range variance deviation minimum maximum least greatest smallest
    largest highest lowest fewest fewer integer integers prime primes odd even round rounds rounded rounding nearest
    gross score scores couple couples pairs splits splitting share shares sharing apiece extra additional exceed
    exceeds exceeded increment decrement increasing decreasing hourly daily weekly monthly quarterly yearly annual
    annually fortnight fortnights
    """
)

# Words that name a calculation whatever else the text says: with one number beside them, a prompt is about arithmetic.
SURE_ARITHMETIC_WORDS = word_set(
    """
    plus minus multiplied multiply multiplying divided subtract subtracted subtracting halve halved halving doubled
    doubling tripled tripling quadrupled factorial factorials squared cubed quotient remainder median modulo divisible
    """
)

# What begins an instruction: before a colon it is no label.
INSTRUCTION_VERBS = word_set(
    """
    add analyse analyze apply arrange brainstorm calculate check choose classify combine compare complete
    compose compute consider continue convert correct count create decide define derive describe detect determine
    discuss divide do draft draw edit estimate evaluate expand explain extract fill find finish fix follow format
    generate get give go guess help identify imagine improve integrate interpret keep know let listen look make match
    measure memorise memorize mention multiply paraphrase pick please plot predict produce propose prove provide put
    read recall recommend remember remove repeat replace reply respond return rewrite rank say see select send shorten
    show simplify solve sort spell subtract suggest summarise summarize take tell think transform translate try turn
    use verify work write
    """
)

UNITS = word_set(
    """
    mm cm m km metre metres meter meters kilometre kilometres kilometer kilometers centimetre centimetres
    centimeter centimeters millimetres millimeters mile miles yard yards foot feet inch inches g mg kg gram
    grams kilogram kilograms ton tons tonne tonnes pound pounds lb lbs ounce ounces oz l ml litre litres liter
    liters gallon gallons s sec ms second seconds min minute minutes h hour hours day days week weeks month
    months year years decade decades century centuries dollar dollars cent cents euro euros penny pence rupee
    rupees yen percent degree degrees celsius fahrenheit kelvin watt watts volt volts joule joules hertz hz khz
    mhz ghz bit bits byte bytes kb mb gb tb mph kph am pm
    """
)

# Never the outcome of an edit: a slip that insults is not the slip under study.
OFFENSIVE_WORDS = word_set(
    """
    anal anus arse ass bitch bollocks boob boobs bum butt clit cock coon crap cum cunt cunts dick dicks dike
    dyke fag fags fuck fucks fucked fucker homo hoe hoes jap japs jew jews kike klan muff negro nazi nigga
    nigger paki penis piss poof porn prick pussy queer rape raped raper rapist retard retards semen sex sexy
    shit shits shite shitty slag slut sluts spic tit tits tosser tranny turd twat twats wank wanker whore whores
    """
)

# Frequent names and short forms: real words to wordfreq, but not what a reader takes a slip for.
NAMES_AND_SHORT_FORMS = word_set(
    """
    aaron adam adams africa african alan alaska albert alex ali alice allen america american amy anderson andrew
    andy angela angeles ann anna anne anthony arab arabia arabic asia asian atlantic austin austria barry ben
    bennett berlin bernard blair blake boston brandon brazil brian broadway bruce cameron canadian carl carlos
    carolina caroline cbs celtic ceo chan charles chile chris christ cia clark clarke clinton cnn cole colin
    collins columbia costa cruz cuba dan daniel danny dave david davis dec del delhi dennis der des diana didnt
    dna doesnt donald dont doug douglas dvd dylan easter edward edwards egyptian ellen emily emma eric europe
    european evans fifa france francis fred friday gary geneva george georgia german germans germany gordon gps
    greece greek greg haha hannah harper harrison harvey helen henry hillary hindu hiv holmes hong howard http
    https hugh ian india indian indiana indians ios ipad iphone iran iranian iraq ireland irish isis islam
    israel israeli italian ive jacob jake james jamie jan jane jason jerry jesse jesus jim joan joe johnson jon
    jones jose juan julia julie july june justin karen karl kate keith kelly kenny kent kenya kevin kim kong
    korea korean kyle larry las latin laura lawrence leeds leo leonard les lgbt linda lisa lloyd lmao logan lol
    london los louis louise lucas lucy luke madison maine malaysia marc marcus marie mario marshall mary matt
    matthew mexican miami michael michelle milan monday moore morgan morris mps mrs muslim muslims nancy nasa
    nato nba nbc neil nicholas nigeria nigerian norman nov obama oliver olympic olympics oscar owen pakistan
    palmer paris parker patrick paul perry pete philip phillips poland pre rachel richard rio robert roberts
    rome ron ross roy russell russia russian russians ruth ryan sam samuel san santa sarah saturday saudi scott
    sean seattle sept shaw simon simpson singh sony spain spencer sri stan stephen steve steven stewart stuart
    sunday susan sweden swiss sydney syria syrian taylor texas thai thats thomas thompson thursday tim todd
    tommy tuesday usa vegas victoria von walter warner wayne william williams wilson york youtube
    """
)

# --- words and frequencies


@lru_cache(maxsize=1)
def word_frequencies() -> dict[str, float]:
    """Word -> share of all words, wordfreq's largest English list (read on the first call, 0.2 s)."""
    from wordfreq import get_frequency_dict

    return dict(get_frequency_dict("en", wordlist="best"))


def zipf(word: str) -> float:
    """Zipf frequency of one word: log10 of its count per billion words, to 2 decimals; 0.0 where it is unknown."""
    share = word_frequencies().get(word.lower(), 0.0)
    return round(math.log10(share) + 9, 2) if share > 0 else 0.0


def is_real_word(word: str) -> bool:
    """True for a word that readers know: Zipf frequency >= 3."""
    return zipf(word) >= REAL_WORD_ZIPF


def words_in(text: str) -> list[str]:
    """The words of any text: letters, with apostrophes inside."""
    return _ANY_WORD.findall(text)


_ANY_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class Word:
    """A word that could be edited. `index` counts the text's white-space separated pieces from 0."""

    index: int
    start: int
    end: int
    text: str
    starts_sentence: bool  # or follows a colon
    shows_name: bool  # a capital that no sentence's beginning explains

    @property
    def lower(self) -> str:
        return self.text.lower()


_PIECE = re.compile(r"\S+")
_CORE = re.compile(r"[(\[\"'“‘«*]*([A-Za-z]+)[)\]\"'”’»*.,;:!?…]*")
# A full stop after these ends no sentence: titles, places, Latin short forms, initials (J.), letters with stops (e.g.).
_ABBREVIATION = re.compile(
    r"\W*(?:(?:mr|mrs|ms|mx|dr|drs|prof|st|sr|jr|rev|fr|hon|messrs|gen|col|lt|sgt|capt|cmdr|cpl|maj|adm|gov|sen|rep|pres|"
    r"supt|insp|mt|ft|ave|blvd|rd|dept|univ|inc|ltd|corp|bros|vs|etc|cf|al|approx|ca|fig|figs|eq|vol|pp|ed|eds|est|"
    r"jan|feb|apr|aug|sept|oct|nov|dec)\.|(?!I\.)(?:[a-z]\.)+|ph\.d\.)\W*",
    re.IGNORECASE,
)
_STOP = re.compile(r"[.!?…][\"”’'»)\]*]*$")


def ends_sentence(piece: str) -> bool:
    """True for a white-space separated piece that ends in a full stop, ? or ! (in quotes or brackets, too)."""
    return _STOP.search(piece) is not None and _ABBREVIATION.fullmatch(piece) is None


def plain_words(text: str) -> list[Word]:
    """The words of `text` that are plain ASCII letters in lower or title case, with punctuation around them at most."""
    found = []
    new_sentence, after_colon = True, False
    for index, piece in enumerate(_PIECE.finditer(text)):
        core = None if _ABBREVIATION.fullmatch(piece[0]) else _CORE.fullmatch(piece[0])
        # A single letter is a word as a, A or I alone; `A)` and `b,` name an option or a variable.
        if core and (core[1].islower() or core[1].istitle()) and (len(core[1]) > 1 or piece[0] in ("a", "A", "I")):
            start = piece.start() + core.start(1)
            name = core[1][0].isupper() and not new_sentence
            found.append(Word(index, start, start + len(core[1]), core[1], new_sentence or after_colon, name))
        new_sentence, after_colon = ends_sentence(piece[0]), piece[0][-1] in ":："
    return found


def is_content_word(word: Word) -> bool:
    """True for a known word of at least four letters that is no function word."""
    if len(word.text) < SHORTEST_CONTENT_WORD or word.lower in FUNCTION_WORDS:
        return False
    return zipf(word.text) >= KNOWN_WORD_ZIPF


def by_importance(words: list[Word]) -> list[Word]:
    """Content words, each once, the most important first: the rarest, then the longer, then the earlier.

    The rarest tells most. Names (a capital inside a sentence, or after a colon, an initial or an abbreviation) come
    after all others: their spelling is the least sure.
    """
    names = {word.lower for word in words if word.shows_name}
    first: dict[str, Word] = {}
    for word in words:
        if is_content_word(word):
            first.setdefault(word.lower, word)
    return sorted(first.values(), key=lambda w: (w.lower in names, zipf(w.text), -len(w.text), w.start))


# --- protected text


def _any_of(words: frozenset[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=lambda word: (-len(word), word))) + ")"


_NUMBER = r"(?<![\d.,])[-−+]?[($€£¥]?\d[\d.,]*+[)%]?"
_OPERATOR = r"[-+*/×÷·=^−–xX]"
_START, _END = r"(?<![\w\u00ad])", r"(?![\w\u00ad])"  # of a word; a soft hyphen splits none
_NUMBER_WORD = _any_of(NUMBER_WORDS)
_PATTERNS = {
    "code": re.compile(
        r"```.*?(?:```|\Z)|^ {0,3}~~~.*?(?:^ {0,3}~~~|\Z)|``[^\n]{1,300}?''|``[^\n]+?``|`[^`\n]+`|^(?: {4}|\t)[^\n]*",
        re.DOTALL | re.MULTILINE,
    ),
    "element": re.compile(
        r"<(q|blockquote|code|pre|kbd|samp|tt|var|math|svg)\b[^<>]*>.{0,5000}?</\1\s*>", re.DOTALL | re.IGNORECASE
    ),
    # The rule of Pandoc: no space inside the dollar signs, no digit after the second, so $5 and $6 are no formula.
    "formula": re.compile(
        r"\$\$.+?\$\$|(?<![\w$\\])\$(?=[^\s$])[^$\n]*?(?<=[^\s$\\])\$(?![\w$])|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]|"
        r"\\begin\{(\w+\*?)\}.{0,5000}?\\end\{\1\}",
        re.DOTALL,
    ),
    # One pattern for all marks, since the closing mark of one language is the opening mark of another.
    "quote": re.compile(
        r"\"[^\"]*\"|\"[^\n]*|“[^”]*”|„[^“”„]*[“”]|«[^»]*»|»[^«]*«|‹[^›]*›|›[^‹]*‹|「[^」]*」|『[^』]*』|《[^》]*》|〈[^〉]*〉|"
        r"〝[^〞〟]*[〞〟]|＂[^＂]*＂|‚[^‘’‚\n]*[‘’]|‘[^\n]{1,300}?’(?!\w)|(?<![\w'])'[^\n]{1,300}?'(?!\w)|”[^”\n]*”"
    ),
    # Where marks do not pair up, the pairs are taken in the other way too: an opening mark before, a closing one after.
    "paired": re.compile(r"(?<!\w)([\"`])(?=\S)[^\"`\n]*(?<=\S)\1(?!\w)"),
    "placeholder": re.compile(r"\{[^{}\n]*\}|\[[^\[\]\n]*\]|<(?!\s)[^<>\n]*>"),
    "expression": re.compile(rf"{_NUMBER}(?:\s{{0,9}}{_OPERATOR}\s{{0,9}}[-−+]?[($€£¥]?\d[\d.,]*+[)%]?)++"),
    "unit": re.compile(
        rf"(?:(?<=\d)|(?<=\d[\s-])|{_START}{_NUMBER_WORD}[\s-]){_any_of(UNITS)}{_END}", re.IGNORECASE
    ),
}  # fmt: skip
_LABEL = re.compile(
    rf"{_START}(?i:answer|question|q|a|input|output|context|note|example|options?|choices?|text|passage|task|"
    r"instructions?|response|solution|result|problem|final)[^\S\n]{0,3}[:：]"
    r"|(?:^[^\S\n]{0,9}|(?<=[.!?…][^\S\n]))"
    r"(?P<name>[A-Z][\w'’/-]{0,30}(?: (?:[A-Z\d][\w'’/-]{0,20}|\([^()\n]{1,20}\))){0,2}(?: [a-z][\w'’/-]{2,20})?"
    r"|user|assistant|system|human)[^\S\n]{0,3}(?::(?=\s|\Z)|：)",
    re.MULTILINE,
)
_NO_LABEL = INSTRUCTION_VERBS | FUNCTION_WORDS | word_set("following next dear")
_TOKEN = re.compile(rf"{_START}[A-Za-z]+{_END}")
_SURE_UNITS = frozenset(unit for unit in UNITS - {"am", "pm"} if len(unit) > 1)  # units even without a number before
_ARITHMETIC = ARITHMETIC_WORDS | _SURE_UNITS
_MEAN_AS_VERB = re.compile(
    r"\b(?:to|does|do|did|would|will|can|could|may|might|not|i|you|we|they|it|this|that|which|what|by)\s+(means?)\b",
    re.IGNORECASE,
)
PROTECTED_WORDS = NUMBER_WORDS | ARITHMETIC_WORDS | UNITS
_MARKED = re.compile(
    r"[\d@#\\_=|~^<>{}\[\]&*$€£¥₹%°+×÷·−±√∑∫≤≥≠²³¹¼½¾⁰-₟⅐-\u218f①-⓿]|\(\)|\w\(|[A-Za-z]\.[A-Za-z]|\w/\w|::|://|->"
)
_BARE_OPERATOR = re.compile(r"[-–—/]+")
_DIGITS = re.compile(r"\d[\d.,]*+")


def is_arithmetic(text: str, row: dict[str, Any] | None = None) -> bool:
    """True if numbers decide: the row's `answer` is a number, or the text holds two numbers (digits or words), or one
    number and a word that names a calculation (halve, squared, median …)."""
    if _is_number(row.get("answer") if row else None) or _has_two_numbers(text):
        return True
    words = {match[0].lower() for match in _TOKEN.finditer(text)}
    number = _DIGITS.search(text) is not None or not words.isdisjoint(NUMBER_WORDS - _VAGUE_NUMBERS)
    return number and not words.isdisjoint(SURE_ARITHMETIC_WORDS)


_VAGUE_NUMBERS = word_set("one first second third double single pair once")  # often of no amount


def _has_two_numbers(text: str) -> bool:
    return len(_number_words(text)) + sum(1 for _ in _DIGITS.finditer(text)) >= 2


def _number_words(text: str) -> list[Span]:
    """Spans of numbers in words; words with a hyphen or one space between them (twenty-one) are one number."""
    spans: list[Span] = []
    for match in _TOKEN.finditer(text):
        if match[0].lower() in NUMBER_WORDS:
            joined = spans and text[spans[-1][1] : match.start()] in ("-", " ", "\n", "\u2011")
            start = spans.pop()[0] if joined else match.start()
            spans.append((start, match.end()))
    return spans


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return True
    return isinstance(value, str) and _NUMERIC_ANSWER.fullmatch(value.strip()) is not None


# A number with its sign, currency, fraction and unit: -3, .5, €5, 3/4, 25%, 12., 5 apples.
_NUMERIC_ANSWER = re.compile(
    r"[-+−]?\s?[$€£¥₹]?\s?[-−]?(?:\d[\d,]*+(?:\.\d*)?|\.\d+)(?:\s?/\s?\d+)?\s?[%€$£¥]?(?:\s?[A-Za-z]{1,20}){0,3}\.?"
)


def protected_spans(text: str, row: dict[str, Any] | None = None, clean: str | None = None) -> list[Span]:
    """Character spans of `text` that no edit may touch, in order, disjoint; `row` gives `task` and `answer`.

    `clean`: the clean form that `text` is a variant of. Its labels alone are labels then: an instruction that was
    misspelt (`Calcualte:`) has not become one.
    """
    task, answer = (row.get(key) if row else None for key in ("task", "answer"))
    return list(
        _protected_spans(
            text,
            task.strip() if isinstance(task, str) else "",
            answer.strip() if isinstance(answer, str) else "",
            is_arithmetic(text, row),
            None if clean is None else frozenset(clean[start:end] for start, end in _labels(clean)),
        )
    )


def protected_texts(text: str, row: dict[str, Any] | None = None, clean: str | None = None) -> list[str]:
    """The protected parts themselves, in order. An edit is safe only where this list stays as it is."""
    return [text[start:end] for start, end in protected_spans(text, row, clean)]


def _labels(text: str) -> Iterator[Span]:
    for match in _LABEL.finditer(text):
        words = [word.lower() for word in words_in(match["name"] or "")]
        if match["name"] is None or not (words[:1] and _NO_LABEL.intersection((words[0], words[-1]))):
            yield (match.start() if match["name"] is None else match.start("name")), match.end()


@lru_cache(maxsize=32)  # the clean prompt is asked for again with every style
def _protected_spans(
    text: str, task: str, answer: str, arithmetic: bool, labels: frozenset[str] | None
) -> tuple[Span, ...]:
    spans = [match.span() for pattern in _PATTERNS.values() for match in pattern.finditer(text)]
    spans += [(start, end) for start, end in _labels(text) if labels is None or text[start:end] in labels]
    spans += _marked_pieces(text)
    spans += _number_words(text)
    if arithmetic:
        verbs = {match.start(1) for match in _MEAN_AS_VERB.finditer(text)}
        tokens = (match for match in _TOKEN.finditer(text) if match[0].lower() in _ARITHMETIC)
        spans += [match.span() for match in tokens if match.start() not in verbs]
    if task:
        spans += [match.span() for match in re.finditer(re.escape(task), text)]
    if answer:
        spans += [match.span() for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)]
    return tuple(_merged(spans))


def _marked_pieces(text: str) -> Iterator[Span]:
    """Pieces with a digit, an operator or a sign of code, URL or mail address, less the punctuation that ends them."""
    for piece in _PIECE.finditer(text):
        if _MARKED.search(piece[0]) or _BARE_OPERATOR.fullmatch(piece[0]):
            end = piece.start() + len(piece[0].rstrip(".,;:!?"))
            yield piece.start(), max(end, piece.start() + 1)


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def touches(spans: list[Span], start: int, end: int) -> bool:
    """True where [start, end) overlaps any of the `spans`, which are in order and disjoint."""
    before_end = bisect_left(spans, (end, end))
    return before_end > 0 and spans[before_end - 1][1] > start


# --- keyboards

_KEY_ROWS = {
    "qwerty": ("qwertyuiop", "asdfghjkl", "zxcvbnm"),
    "qwertz": ("qwertzuiop", "asdfghjkl", "yxcvbnm"),
    "azerty": ("azertyuiop", "qsdfghjklm", "wxcvbn"),
    "dvorak": ("',.pyfgcrl", "aoeuidhtns", ";qjkxbmwvz"),
}
KEYBOARDS = tuple(_KEY_ROWS)


@lru_cache
def key_neighbours(keyboard: str) -> dict[str, str]:
    """Letter -> the letters on keys that touch its key; rows lie 0, 1/4 and 3/4 of a key to the right."""
    places = {
        key: (column + offset, row)
        for row, (keys, offset) in enumerate(zip(_KEY_ROWS[keyboard], (0.0, 0.25, 0.75), strict=True))
        for column, key in enumerate(keys)
        if key.isalpha()
    }
    return {
        key: "".join(sorted(o for o in places if o != key and math.dist(places[key], places[o]) < 1.3))
        for key in places
    }


# --- one edit of one word

Options = list[tuple[int, str]]  # (position of the first changed letter, the edited word)


def _substitutions(word: str, keyboard: str) -> Options:
    near = key_neighbours(keyboard)
    return [(i, word[:i] + o + word[i + 1 :]) for i in range(1, len(word)) for o in near[word[i]]]


def _transpositions(word: str, _: str) -> Options:
    return [
        (i, word[:i] + word[i + 1] + word[i] + word[i + 2 :]) for i in range(1, len(word) - 1) if word[i] != word[i + 1]
    ]


def _deletions(word: str, _: str) -> Options:
    return [(i, word[:i] + word[i + 1 :]) for i in range(1, len(word)) if word[i] != word[i - 1]]


def _doublings(word: str, _: str) -> Options:
    return [
        (i + 1, word[: i + 1] + word[i:])
        for i in range(1, len(word))
        if word[i] not in word[i - 1] + word[i + 1 : i + 2]
    ]


_EDITORS: dict[str, Callable[[str, str], Options]] = {
    "substitution": _substitutions,
    "transposition": _transpositions,
    "deletion": _deletions,
    "doubling": _doublings,
}


def typo_options(word: str, operation: str, keyboard: str = "qwerty") -> Options:
    """Every way to apply one operation to `word` (ASCII letters). Its first letter stays, as in most real typos."""
    lower = word.lower()
    return [(i, word[0] + after[1:]) for i, after in _EDITORS[operation](lower, keyboard)]


def one_edit_away(word: str) -> set[str]:
    """All strings of the letters a-z at optimal string alignment distance 1 from `word`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    away = {left + right[1:] for left, right in cuts if right}
    away |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    away |= {left + c + right[1:] for left, right in cuts if right for c in letters}
    away |= {left + c + right for left, right in cuts for c in letters}
    away.discard(word)
    return away


@lru_cache(maxsize=65536)
def is_clear_typo(clean: str, typo: str) -> bool:
    """True where readers know no word `typo`, and the likeliest word one edit away from it is `clean` (lower case)."""
    if zipf(typo) >= KNOWN_WORD_ZIPF or typo in OFFENSIVE_WORDS:
        return False
    frequencies = word_frequencies()
    expected = frequencies.get(clean, 0.0)
    return all(frequencies.get(other, 0.0) <= expected for other in one_edit_away(typo))


@lru_cache(maxsize=65536)
def real_word_options(word: str) -> list[str]:
    """Other real words one edit away from `word` (lower case), without its own forms, homophones and insults."""
    return sorted(
        other
        for other in one_edit_away(word)
        if len(other) >= SHORTEST_FUNCTION_WORD
        and zipf(other) >= CLEAR_WORD_ZIPF
        and other not in OFFENSIVE_WORDS | PROTECTED_WORDS | NAMES_AND_SHORT_FORMS
        and not are_homophones(word, other)
        and not _is_same_word(word, other)
    )


def _is_same_word(a: str, b: str) -> bool:
    """True where two words look like forms of one: the same but for an ending, or for British and American spelling."""
    stems = [{re.sub(rf"{ending}$", "", word) for ending in _ENDINGS} for word in (a, b)]
    return bool(stems[0] & stems[1]) or _american(a) == _american(b) or f"{min(a, b)}/{max(a, b)}" in _IRREGULAR


# Second spellings (or one British sound), then irregular forms, one edit apart and each pair in alphabetical order.
_IRREGULAR = word_set(
    """
    adviser/advisor ageing/aging aluminium/aluminum buses/busses defence/defense dependant/dependent disc/disk
    enquiry/inquiry farther/further gray/grey judgement/judgment licence/license offence/offense poor/pour
    practice/practise practices/practises programing/programming protesters/protestors storey/story tire/tyre
    tires/tyres
    analyses/analysis awake/awoke axes/axis bases/basis became/become began/begin began/begun begin/begun bend/bent
    bit/bite blew/blow build/built came/come chairman/chairmen choose/chose cling/clung crises/crisis
    diagnoses/diagnosis dig/dug drank/drink drank/drunk draw/drew drink/drunk drive/drove elder/older eldest/oldest
    fall/fell fed/feed fling/flung focused/focussed focusing/focussing forgave/forgive forget/forgot gave/give
    gentleman/gentlemen get/got grew/grow hang/hung hear/heard held/hold hid/hide knew/know lead/led lend/lent
    lose/lost made/make man/men mean/meant meet/met overcame/overcome ran/run rang/ring rang/rung ride/rode ring/rung
    rise/rose sang/sing sang/sung sank/sink sank/sunk sat/sit send/sent shine/shone shoot/shot shrank/shrink sing/sung
    sink/sunk slid/slide smell/smelt sped/speed spell/spelt spend/spent spin/spun sprang/spring sprang/sprung
    spring/sprung stank/stink stick/stuck string/strung swam/swim swam/swum swim/swum swing/swung theses/thesis
    threw/throw wake/woke win/won withdraw/withdrew woman/women write/wrote
    """
)
_ENDINGS = ("", "s", "es", "d", "ed", "r", "er", "n", "en", "y", "ly", "e", "ing", "t")


def _american(word: str) -> str:
    return word.replace("our", "or").replace("is", "iz").replace("ys", "yz").replace("re", "er").replace("ll", "l")


def operation_of(before: str, after: str) -> str | None:
    """The one operation that turns `before` into `after`; None where they are not exactly one edit apart.

    Letter case counts as no edit: two words that differ in it alone give None.
    """
    a, b = before.lower(), after.lower()
    if a == b or abs(len(a) - len(b)) > 1 or osa_distance(before, after) != 1:
        return None
    i = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if len(a) == len(b):
        return "substitution" if a[i + 1 :] == b[i + 1 :] else "transposition"
    if len(a) > len(b):
        return "deletion"
    return "doubling" if i > 0 and b[i] == b[i - 1] else "insertion"


def osa_distance(before: str, after: str, limit: int = 9) -> int:
    """Optimal string alignment distance (rapidfuzz); `limit` + 1 where it is larger than `limit`."""
    from rapidfuzz.distance import OSA

    return int(OSA.distance(before, after, score_cutoff=limit))


# --- homophones


@lru_cache(maxsize=1)
def _homophone_tables() -> dict[str, dict[str, list[str]]]:
    path = Path(__file__).resolve().parents[1] / "homophones.json"
    tables = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: {word: others.split() for word, others in tables[name].items()} for name in ("homophones", "sometimes")
    }


def homophones(word: str) -> list[str]:
    """Words of another spelling and the same pronunciation as `word` (0_data/homophones.json), whatever its case."""
    return _homophone_tables()["homophones"].get(word.lower(), [])


def are_homophones(before: str, after: str) -> bool:
    """True for two spellings that sound the same in at least one pronunciation of theirs, whatever their case."""
    sometimes = _homophone_tables()["sometimes"].get(before.lower(), [])
    return after.lower() in [*homophones(before), *sometimes]


# --- what a style allows


@dataclass(frozen=True)
class Fault:
    """Why a variant is not what its style says. `kind` is one of the linter's kinds of finding."""

    kind: str
    detail: str


def verify_variant(
    clean: str, variant: str, style: str, row: dict[str, Any] | None = None, intensity: int = 1
) -> list[Fault]:
    """What is wrong with `variant` as the form of `clean` in `style`; empty where nothing is.

    `row` gives `task` and `answer`, `intensity` the number of edits (`two`, `three` and the framings have their own).
    A style of the user's own is held to two rules: it differs from the clean text, and keeps its digits and operators.
    `other` (a free rewording) has to differ only.
    """
    if clean == variant:
        return [Fault("no_op", "equals the clean text")]
    if unicodedata.normalize("NFC", clean) == unicodedata.normalize("NFC", variant):
        return [Fault("no_op_unicode", "differs from the clean text in Unicode normalisation alone")]
    if style == "other":
        return []
    if style not in STYLES:
        return _number_faults(clean, variant)
    faults = _number_faults(clean, variant)
    if not faults and style not in FRAMING_STYLES:
        faults = _protected_faults(clean, variant, row)
    return faults + _STYLE_CHECKS[style](clean, variant, style, FIXED_COUNTS.get(style, intensity))


def _number_faults(clean: str, variant: str) -> list[Fault]:
    before, after = _numbers_and_operators(clean), _numbers_and_operators(variant)
    if before == after:
        return []
    lost, gained = next(
        ((a, b) for a, b in zip([*before, "nothing"], [*after, "nothing"], strict=False) if a != b), ("", "")
    )
    return [Fault("changed_numbers", f"digits or operators differ: {lost[:40]!r} became {gained[:40]!r}")]


_NUMBERS_AND_OPERATORS = re.compile(
    r"\d+(?:[.,]\d+)*|[+×÷=*/^%<>≤≥±√−]|(?<=[\d\s)])-(?=[\d\s(])|(?<!\w)-(?=\d)"
    r"|(?<=\d)[xX](?=\d)|(?<=\d )[xX](?= \d)"
)


def _numbers_and_operators(text: str) -> list[str]:
    return _NUMBERS_AND_OPERATORS.findall(text)


def _protected_faults(clean: str, variant: str, row: dict[str, Any] | None) -> list[Fault]:
    before, after = protected_texts(clean, row), protected_texts(variant, row, clean)
    if before == after and clean.count(":") == variant.count(":"):
        return []
    pairs = zip([*before, "nothing"], [*after, "nothing"], strict=False)
    lost, gained = next(((a, b) for a, b in pairs if a != b), ("':'", "another number of colons"))
    return [Fault("changed_protected", f"protected text differs: {lost[:40]!r} became {gained[:40]!r}")]


def changed_words(clean: str, variant: str) -> list[tuple[str, str]] | None:
    """Pairs of white-space separated pieces that differ; None where the white space differs as well."""
    if re.findall(r"\s+", clean) != re.findall(r"\s+", variant):
        return None
    left, right = clean.split(), variant.split()
    if len(left) != len(right):
        return None
    return [(a, b) for a, b in zip(left, right, strict=True) if a != b]


_OUTER = re.compile(r"[\W_]+")


def changed_parts(before: str, after: str) -> list[tuple[str, str]]:
    """The parts (between hyphens, apostrophes, other marks) in which two pieces differ; in doubt the pieces."""
    left, right = _OUTER.split(before), _OUTER.split(after)
    if len(left) != len(right) or _OUTER.findall(before) != _OUTER.findall(after):
        return [(before, after)]
    return [(a, b) for a, b in zip(left, right, strict=True) if a != b]


def _check_typos(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    pairs = changed_words(clean, variant)
    if pairs is None:
        return [Fault("edit_count", "words were added, left out or re-spaced")]
    faults = []
    if len(pairs) != count:
        faults.append(Fault("edit_count", f"{len(pairs)} words differ, {style} means {count}"))
    for before, after in pairs:
        faults += _check_typo(before, after, style)
    return faults


def _check_typo(before: str, after: str, style: str) -> Iterator[Fault]:
    operation = operation_of(before, after)
    shown = f"{before[:40]!r} -> {after[:40]!r}"
    if operation is None:
        yield Fault("wrong_edit", f"not one edit apart: {shown}")
        return
    if operation not in OPERATIONS.get(style, (operation,)):
        yield Fault("wrong_edit", f"{operation}, but {style} means {OPERATIONS[style][0]}: {shown}")
    for old, new in changed_parts(before, after):
        if style == "real_word":
            if not is_real_word(new) or new.lower() == old.lower():
                yield Fault("wrong_edit", f"no real word: {shown}")
        elif is_real_word(new):
            yield Fault("accidental_real_word", f"{shown}, Zipf {zipf(new)}")
        if style == "noise_words" and old.lower() not in FUNCTION_WORDS:
            yield Fault("wrong_edit", f"edits a content word: {shown}")


def _check_homonyms(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    pairs = changed_words(clean, variant)
    if pairs is None:
        return [Fault("edit_count", "words were added, left out or re-spaced")]
    parts = [part for pair in pairs for part in _homonym_parts(*pair)]
    faults = [Fault("false_homophone", f"{a[:40]!r} -> {b[:40]!r}") for a, b in parts if not are_homophones(a, b)]
    if len(pairs) != count:
        faults.append(Fault("edit_count", f"{len(pairs)} words differ, {style} means {count}"))
    return faults


def _homonym_parts(before: str, after: str) -> list[tuple[str, str]]:
    """Like changed_parts, with an apostrophe inside a word taken as a letter (its, it's)."""
    left, right = words_in(before), words_in(after)
    if len(left) != len(right):
        return [(before, after)]
    return [(a.replace("’", "'"), b.replace("’", "'")) for a, b in zip(left, right, strict=True) if a != b]


def _check_grammar(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    from rapidfuzz.distance import Levenshtein

    changed = int(Levenshtein.distance(clean.split(), variant.split(), score_cutoff=count))
    if changed == count:
        return []
    many = "more" if changed > count else str(changed)
    return [Fault("edit_count", f"{many} words differ, {style} means {count}")]


def _check_punctuation(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    from rapidfuzz.distance import Levenshtein

    if _letters(clean) != _letters(variant):
        return [Fault("wrong_edit", "letters or digits differ, not only marks and spaces")]
    changed = int(Levenshtein.distance(clean, variant, score_cutoff=count))
    faults = []
    if changed != count:
        many = "more" if changed > count else str(changed)
        faults.append(Fault("edit_count", f"{many} marks or spaces differ, {style} means {count}"))
    faults += [
        Fault("accidental_real_word", f"{new[:40]!r}, Zipf {zipf(new)}") for new in _joined_words(clean, variant)
    ]
    return faults


def _joined_words(clean: str, variant: str) -> list[str]:
    """Real words that stand in the variant and not in the clean text."""
    before = {word.lower() for word in re.findall(r"[^\W\d_]+", clean)}
    after = dict.fromkeys(re.findall(r"[^\W\d_]+", variant))
    return [word for word in after if word.lower() not in before and is_real_word(word)]


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


def _check_framing(clean: str, variant: str, style: str, _: int) -> list[Fault]:
    at = variant.find(clean.strip())
    if at < 0 or not clean.strip():
        reworded = Fault("request_changed", f"{style} does not keep the request word for word")
        return [reworded, *_changed_number_words(clean, variant)]
    added = variant[:at] + variant[at + len(clean.strip()) :]
    if not added.strip():
        return [Fault("no_op", "differs from the clean text in white space alone")]
    if LABEL_COLON.split(clean.rstrip(), 1)[1:] != LABEL_COLON.split(variant.rstrip(), 1)[1:]:
        return [Fault("task_split", "the text after the colon that splits off the task is no longer the same")]
    return []


def _changed_number_words(clean: str, variant: str) -> Iterator[Fault]:
    """In arithmetic, number words and the names of operations count as digits and operators do; more may be added."""
    if _has_two_numbers(clean):
        before, after = ([w for w in re.findall("[a-z]+", text.lower()) if w in _SAID] for text in (clean, variant))
        left = iter(after)
        if lost := next((word for word in before if word not in left), None):
            yield Fault("changed_numbers", f"number words differ: {lost!r} is not where it was")


_SAID = NUMBER_WORDS | {"plus", "minus", "times", "multiplied", "divided"}


def _check_split(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    if clean.replace(SOFT_HYPHEN, "") != variant.replace(SOFT_HYPHEN, ""):
        return [Fault("wrong_edit", "more than soft hyphens differ")]
    added = variant.count(SOFT_HYPHEN) - clean.count(SOFT_HYPHEN)
    return [] if added == count else [Fault("edit_count", f"{added} soft hyphens added, {style} means {count}")]


_STYLE_CHECKS: dict[str, Callable[[str, str, str, int], list[Fault]]] = {
    **dict.fromkeys((*NON_WORD_STYLES, "real_word"), _check_typos),
    "grammar": _check_grammar,
    "punctuation": _check_punctuation,
    "homonym": _check_homonyms,
    "split": _check_split,
    **dict.fromkeys(FRAMING_STYLES, _check_framing),
}


# --- seeded choice


def seeded(seed: int, row_id: str, style: str) -> random.Random:
    """A generator of its own for each (seed, row, style), so that no variant depends on which others are made."""
    return random.Random(f"{seed}|{row_id}|{style}".encode("utf-8", "surrogatepass"))


def shuffled(rng: random.Random, items: list[T]) -> list[T]:
    """`items` in random order. Uses random() alone, the one method whose numbers stay the same in all Pythons."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]
