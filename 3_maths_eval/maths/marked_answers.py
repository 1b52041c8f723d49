"""Answers that are marked as such: boxed, behind ####, or announced in words (`the answer is …`, `Ответ: …`)."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from run_on import run_on_places
from thinking_text import without_thinking

from maths.numerals import Number
from maths.reading import FUNCTIONS, UNITS, Mark, ParsedAnswer, Reading, mark_numbers, unreadable


def answer_phrase(text: str, prompt: str = "") -> str:
    """What a response gives as its answer, as written, for answers that are expressions; '' if it gives none."""
    text = without_thinking(text, prompt)
    for cut, is_turn in run_on_places(text, prompt):
        if is_turn or _ANNOUNCES.search(text, 0, cut):
            text = text[:cut]
            break
    boxes, cues = _box_run(text), list(_ANNOUNCES.finditer(text))
    if boxes and (not cues or cues[-1].start() <= boxes[-1][1]):
        return ", ".join(inner.strip() for _, _, inner in boxes)
    if cues:
        text = text[cues[-1].end() :].lstrip("*_: \n")
    elif len(text.strip()) > 80 or "\n" in text.strip():
        segments = _SEGMENT.findall(text)
        text = segments[-1] if segments else ""
    line = re.split(r"\.\s|\.?\Z|\n|, (?:which|because|since)\b| because\b", text.strip(), maxsplit=1)[0]
    return line.strip(" *_")


_ANNOUNCES = re.compile(
    r"####|(?:\A|\n)[*_ ]{0,4}A(?:ns)?[*_]{0,2}:"
    r"|\b(?:answer|result|solution)s?\b[^.\n:=$]{0,60}?(?:\b(?:is|are)\b:?|[:=])",
    re.IGNORECASE,
)
_SEGMENT = re.compile(r"\$[^$\n]{1,200}\$|\\[(\[].{1,200}?\\[)\]]")

CORRECTION = re.compile(
    r"\b(?:wait|oops|sorry|correction|correcting|corrected|mistake|mistaken|apologi[sz]e|my bad|re-?check(?:ing)?"
    r"|hold on|scratch that|(?:is|was|that's) wrong|incorrect|instead)\b",
    re.IGNORECASE,
)


def last_marked_answer(reading: Reading) -> ParsedAnswer | None:
    """The last answer that is marked as one: boxed, behind ####, or announced in words."""
    found = [*_markers(reading), *_announcements(reading)]
    if boxes := _boxes(reading):
        start, end, parsed = boxes
        found = [entry for entry in found if not start <= entry[0] < end] + [(start, False, parsed)]
    if not found:
        return None
    found.sort(key=lambda entry: entry[0])
    finals = [entry for entry in found if entry[1]]
    last = found[-1]
    if finals and last[2].rule == "answer_is" and not CORRECTION.search(reading.text, finals[-1][0], last[0]):
        last = finals[-1]
    return _corrected(reading, last[0]) or last[2]


_TAKES_BACK = re.compile(
    r"\b(?:wait|oops|hold on|scratch that|correction|no)[,:!]| no wait|\bI (?:made|forgot|missed|meant)\b"
    r"|\bmy mistake\b|[.!?\n]\s{0,3}(?:actually|wait|oops|hold on)\b",
    re.IGNORECASE,
)
_SAYS = re.compile(r"(?:\b(?:is|be|been|it's|meant|to|get|no)|[:=])[\s$*]{0,4}\Z", re.IGNORECASE)


def _corrected(reading: Reading, start: int) -> ParsedAnswer | None:
    """The value that takes an answer back (`… is 12. Wait, it is 13.`); unreadable if it is not clear which."""
    place = _TAKES_BACK.search(reading.text, start)
    behind = [mark for mark in reading.marks if place and mark.number.start > place.start() and mark.free]
    said = [mark for mark in behind if mark.right_side] or [
        mark for mark in behind if _SAYS.search(reading.text[max(0, mark.number.start - 16) : mark.number.start])
    ]
    if said:
        return reading.found(said[-1].number, "answer_is")
    return unreadable("answer_is", reading.text[behind[0].number.start :]) if behind else None


_BOX = re.compile(r"\\(?:boxed|fbox) ?")
_BOX_GAP = re.compile(r"[\s$,;]{0,9}(?:and|or|\{ ?(?:and|or) ?\})?[\s$]{0,4}")


def _box_run(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last box that has content, and of those that it follows as in `3, 5 and 7`."""
    spans: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(text))[-8:]:
        if text[match.end() : match.end() + 1] == "{":
            inner = _in_braces(text, match.end())
            spans.append((match.start(), match.end() + len(inner) + 2, inner))
        else:
            inner = text[match.end() : match.end() + 40].partition("\n")[0].rstrip(" .$")
            spans.append((match.start(), match.end() + len(inner), inner))
    spans = [span for span in spans if span[2].strip()]
    first = len(spans) - 1
    while first > 0 and _BOX_GAP.fullmatch(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    return spans[max(first, 0) :]


def _boxes(reading: Reading) -> tuple[int, int, ParsedAnswer] | None:
    spans = _box_run(reading.text)
    if not spans:
        return None
    start, end = spans[0][0], spans[-1][1]
    answers = {value_of_phrase(inner, reading.prompt) for _, _, inner in spans}
    if len({answer and answer.value for answer in answers}) == 1 and (answer := answers.pop()) is not None:
        return start, end, answer._replace(rule="boxed")
    return start, end, unreadable("boxed", reading.text[start:end])


_SEVERAL = re.compile(r"[,;]|\b(?:or|and)\b")
_ALGEBRA = re.compile(r"[A-Za-z)] ?[-+*/^] ?[\d(]|\d ?[-+*/] ?[A-Za-z(\\]")
_UNIT_POWER = re.compile(r"\b(?:[a-z]?m|ft|in|yd|mi|units?|inch(?:es)?|feet)\^[23]\b")
_CALL = re.compile(r"\b[a-z]\([-\d, ]{1,20}\)")


def value_of_phrase(text: str, prompt: str = "") -> ParsedAnswer | None:
    """The number that a short text such as `12 apples`, `x = 5` or `7 + 5 = 12` gives; None if it is not one number."""
    marks = mark_numbers(text)
    if not marks or re.search(r"[±□∪∩≤≥≠]|\d!\s*\Z|[∞π√]\W*\Z|\d:\d", text):
        return None
    free = [mark for mark in marks if mark.free]
    right = [mark for mark in free if mark.right_side]
    if right:
        several = len({mark.number.value for mark in right}) > 1 and bool(_SEVERAL.search(text))
        left = _CALL.sub("", text[: right[-1].number.start])
        several |= bool(re.search(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])", left) and re.search(r"\d|[-+*/^|]", left))
        chosen = right[-1] if right[-1] is marks[-1] and not several else None
    else:
        whole = len(free) == len(marks) and len({mark.number.value for mark in free}) == 1
        chosen = free[-1] if whole and not _ALGEBRA.search(_UNIT_POWER.sub("", text)) else None
    reading = Reading(text, marks, prompt)
    return None if chosen is None or reading.restates(chosen.number) else reading.found(chosen.number, "phrase")


def _in_braces(text: str, opened: int, limit: int = 300) -> str:
    depth = 0
    for position in range(opened, min(len(text), opened + limit)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[opened + 1 : position]
    return text[opened + 1 : opened + limit]


_AFTER_MARKER = re.compile(r"####[\s$:*]{0,8}")
_Marked = tuple[int, bool, ParsedAnswer]  # where it stands, whether it is called final, what it is


def _markers(reading: Reading) -> Iterator[_Marked]:
    text = reading.text
    for match in _AFTER_MARKER.finditer(text):  # a heading (#### Step 1) announces no number
        line_end = text.find("\n", match.end())
        line_end = len(text) if line_end < 0 else line_end
        line = text[match.end() : min(line_end, match.end() + 80)]
        announced = _announced(reading, match.end(), match.end() + len(line)) if not _HEADING.match(line) else None
        if announced is not None:
            number = announced.number
            yield (
                announced.start,
                False,
                unreadable("marker", line) if number is None else reading.found(number, "marker"),
            )
        elif line.strip() and not re.search(r"\d", line) and not text[line_end:].strip():
            yield match.start(), False, unreadable("marker", line)


_HEADING = re.compile(r"(?!x\b)[A-Za-z]")
BARE_END = re.compile(
    r"[\"'*_)\]$}]{0,4}(?:\s*\Z|[ ]*\n|[ ]*[.!;:?,](?=[\s\"'*)$}]|\Z)|[ ]*\(|[ ]-+[ ][a-z]"
    r"|[ ](?:because|since|which|so)\b|[ ]is[ ](?:the|your|our|what|how)\b)"
)
UNIT_END = re.compile(
    r"(?:[ ]?(?:[^\W\d_]|[°%/'€-]){1,20})(?:[ ](?:[^\W\d_]|[°%/'-]){1,20}){0,3}[ ]?(?P<stop>[.!;,]|\n|\Z)"
)
_LIST_GAP = re.compile(
    r"(?:[ ]?[,;][ ]?(?:or[ ]|and[ ])?|(?:[ ][A-Za-z]{1,15})?[ ](?:or|and|to|&)[ ])(?:[a-z][ ]?=[ ]?)?"
)


def listed(reading: Reading, position: int) -> bool:
    """`12, 13`, `2, 3 and 5` or `8 or 9`: several answers, none of them chosen."""
    marks, last = reading.marks, position
    while last + 1 < len(marks) and last < position + 20 and marks[last + 1].free and not marks[last + 1].left_side:
        if not _LIST_GAP.fullmatch(reading.text[marks[last].number.end : marks[last + 1].number.start]):
            break
        last += 1
    rest = reading.text[marks[last].number.end : marks[last].number.end + 100]
    if last == position or not (BARE_END.match(rest) or UNIT_END.match(rest)):
        return False
    return len({mark.number.value for mark in marks[position : last + 1]}) > 1


# "answer" in other languages; the second group is written without spaces around it
_OTHER_CUES = (
    "réponse|reponse|résultat|respuesta|resultado|resposta|risposta|risultato|antwort|lösung|ergebnis|antwoord|svar|svaret"
    "|vastaus|odpowied[źz]|wynik|odpověď|odpoveď|válasz|răspuns|răspunsul|cevap|yanıt|jawaban|jawabannya|đáp án|đáp số"
    "|kết quả|jibu|jawabu|ответ|відповідь|отговор|одговор|απάντηση|תשובה|الجواب|الإجابة|النتيجة|جواب|پاسخ|उत्तर|উত্তর"
)
_JOINED_CUES = "答案|答え|答(?=:)|结果|結果|정답|답|คำตอบ|సమాధానం"
_OTHER_IS = (
    r"\b(?:est|ist|es|é|è|jest|to|är|er|on|adalah|là|ni|הוא|היא|هو|هي|होगा|है|হল|হলো|είναι|است)\b"
    r"|[:=→—]|是|为|為|は|은|는|คือ"
)
_CUE = re.compile(
    r"(?P<final>\bfinal )?(?:\b(?:answers?|result|solutions?)\b"
    rf"|(?P<other>\b(?:{_OTHER_CUES})\b|(?:{_JOINED_CUES}))"
    r"|(?:\A|\n)[*#_ ]{0,4}(?P<label>A|Ans|(?P<weak>Output|Total))(?=[*_ ]{0,3}:))",
    re.IGNORECASE,
)
_IS = re.compile(r"\b(?:is|was|are|be|equals|becomes)\b|[:=→]|comes to", re.IGNORECASE)
_IS_ELSEWHERE = re.compile(_OTHER_IS, re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"\b(?:express|giv|writ|round|check|verify|simplify|submit|stat|report|format|enter|provid|convert"
    r"|find|comput|calculat|determin|obtain|solv)(?:e|es|ing)?"
    r" (?:(?:the|your|our|my|this|that) )?\Z",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"[\"'*_)\]$}]{0,3}(?:,? (?:which|that|this))? (?:is|was) (?:indeed )?(?:the|your|my|our)"
    r" (?:[a-z]{1,12} )?(?:answer|result|solution)\b",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not|never|no longer|isn't|wasn't)\b", re.IGNORECASE)
CUE_WINDOW = 200


_GROUPED = re.compile(r"\D*[1-9]\d{0,2}\.\d{3}")


def _announcements(reading: Reading) -> Iterator[_Marked]:
    """`The answer is …`, `A: …`, `… is the answer`; `Total: …` only if it comes last and nothing else is marked."""
    text, found = reading.text, False
    weak: _Marked | None = None
    cues = list(_CUE.finditer(text))
    for position, cue in enumerate(cues):
        stop = cues[position + 1].start() if position + 1 < len(cues) else len(text)
        announced = _after_cue(reading, cue, min(stop, cue.end() + CUE_WINDOW))
        if announced is not None:
            number = announced.number
            answer = unreadable("answer_is", text[announced.start : announced.start + 80])
            if number is not None:
                answer = reading.found(number, "answer_is")
                if cue["other"] and number.decimals == 3 and _GROUPED.fullmatch(answer.text):  # 1.250 is not 1 1/4
                    answer = answer._replace(value=number.value * 1000, decimals=0)
            entry = (announced.start, cue["final"] is not None, answer)
            if cue["weak"]:
                weak = entry
            else:
                found = True
                yield entry
    for mark in reading.marks:
        if mark.free and not reading.restates(mark.number) and _IS_THE_ANSWER.match(text, mark.number.end):
            found = True
            yield mark.number.start, False, reading.found(mark.number, "answer_is")
    if weak and not found and not any(mark.right_side and mark.number.start > weak[0] for mark in reading.marks):
        yield weak


def _after_cue(reading: Reading, cue: re.Match[str], stop: int) -> _Announced | None:
    """The value announced by one `answer`: behind the first `is` or `:` of its sentence that a value follows."""
    text = reading.text
    if _INSTRUCTION.search(text[max(0, cue.start() - 24) : cue.start()]):
        return None
    for verb in (_IS_ELSEWHERE if cue["other"] else _IS).finditer(text, cue.end(), stop):
        between = text[cue.end() : verb.start()]
        if re.search(r"[.!?]\s|\n\s*\n", between) or _NEGATION.search(between):
            return None
        announced = _announced(reading, verb.end(), stop)
        if announced is not None:
            return announced
        if cue["label"] or verb.group()[:1] == ":":
            return None
    return None


_PLAIN_WORDS = re.compile(r"[^\d\n.!?;=]{0,60}\Z")
_DETOUR = re.compile(
    r"\A to |\b(?:less|more|greater|smaller|fewer|higher|lower|than|because|since|between|reasonable|correct|rounded"
    r"|nearest|multiple|divisible|within|least|most|form|sense|consistent|closer?|step|first|if|when|for|cannot)\b",
    re.IGNORECASE,
)
_SYMBOLIC = re.compile(
    rf"[\s*_:$(\"'`~≈=\[{{>-]{{0,12}}(?:[√π±∞□]|{FUNCTIONS}|[A-Za-z] ?(?:[<>≤≥∈^]|\\in\b)|[a-z] ?[-+*/^] ?[\da-z(]\b)"
)
_NO_NUMBER = re.compile(
    r"[\s*_:$\"'\[{]{0,9}(?:none|undefined|impossible|unknown|infinit[ey]|infinity|indeterminate|DNE"
    r"|no\b(?! more| less)|yes\b|cannot|can't"
    r"|[负零〇一二两三四五六七八九十百千万亿壹贰叁肆伍陆柒捌玖拾佰仟])(?![^.\n]{0,60}\d)",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\d[a-z]\b ?[-+*/=]")
_BOUND = re.compile(
    r"[\s*$]{0,4}(?:(?<![-=])[<>≤≥]|(?:between|at (?:least|most)"
    r"|(?:less|more|greater|fewer|higher|lower|smaller) than)\b)"
    r"[^\d\n.]{0,12}\d"
)
_DIRECT_DIGIT = re.compile(r"[\s*_:$(\"'`~≈=\[{>+-]{0,12}\d")


class _Announced(NamedTuple):
    """Where an announced value begins, and the number; None if it is not a number."""

    start: int
    number: Number | None


_GOES_ON = re.compile(
    r"[\s)\]}$,]{0,3}(?:(?:which|that|it|and it)\s+)?(?:is|equals|gives|makes|comes to)\s", re.IGNORECASE
)


def _announced(reading: Reading, start: int, stop: int) -> _Announced | None:
    """The value that begins at `start`: a number, or what the expression there is said to equal."""
    marks = reading.marks
    position = _first_from(marks, start)
    if _BOUND.match(reading.text, start, stop):
        return _Announced(start, None)
    if _SYMBOLIC.match(reading.text, start, stop) or _NO_NUMBER.match(reading.text, start, stop):
        return _Announced(start, _end_of_equation(reading, position, stop))
    begins = _DIRECT_DIGIT.match(reading.text, start, stop)
    if position == len(marks) or marks[position].number.start >= stop:
        return _Announced(start, None) if begins else None
    first = marks[position]
    if begins and first.number.start >= begins.end():
        return _Announced(start, None)  # 2:00
    gap = reading.text[start : first.number.start]
    direct = not gap.strip(" \n*_$:(\"'`~≈=[{>")
    if not direct and (not _PLAIN_WORDS.match(gap) or _NEGATION.search(gap) or _DETOUR.search(gap)):
        return None
    if not first.aside and listed(reading, position):
        return _Announced(first.number.start, None)
    if first.aside or (not direct and _others_in_sentence(reading, position)):
        return None
    last = position
    while last + 1 < len(marks) and marks[last + 1].joined:
        last += 1
    while last + 1 < len(marks) and _continues(reading.text, marks[last], marks[last + 1]):
        last += 1
        while last + 1 < len(marks) and marks[last + 1].joined:
            last += 1
    chosen = marks[last]
    if chosen.operand and not first.operand:
        chosen = first  # 12 = 7 + 5
    if chosen.term or _VARIABLE.search(reading.text, first.number.start, chosen.number.start):
        return _Announced(first.number.start, None)
    if not chosen.free or reading.restates(chosen.number):
        return None
    return _Announced(first.number.start, chosen.number)


def _end_of_equation(reading: Reading, position: int, stop: int) -> Number | None:
    """12 in `the answer is √144 = 12`."""
    inside = [mark for mark in reading.marks[position : position + 20] if mark.number.start < stop]
    line = [mark for mark in inside if "\n" not in reading.text[inside[0].number.start : mark.number.end]]
    return line[-1].number if line and line[-1].right_side and line[-1].free else None


def _continues(text: str, mark: Mark, following: Mark) -> bool:
    gap = text[mark.number.end : following.number.start]
    if len(gap) > 60 or "\n" in gap:
        return False
    if following.right_side and re.fullmatch(rf"[\s$)}}\]]{{0,4}}{UNITS}[\s$)}}\]]{{0,4}}(?:=|≈|equals).{{0,20}}", gap):
        return True
    return mark.operand and _GOES_ON.match(gap) is not None


def _others_in_sentence(reading: Reading, position: int) -> bool:
    """True where another free number stands in the rest of the sentence (`the answer is that 5 of the 12 …`)."""
    mark = reading.marks[position]
    if position + 1 == len(reading.marks) or mark.operand:
        return False
    gap = reading.text[mark.number.end : reading.marks[position + 1].number.start]
    return len(gap) < 100 and not re.search(r"[.!?\n]", gap)


def _first_from(marks: list[Mark], start: int) -> int:
    return bisect_right(marks, start, key=lambda mark: mark.number.end)
