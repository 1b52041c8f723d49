"""Typos in other languages: one edit in a word, neighbours on the layout, protections, Unicode forms."""

from __future__ import annotations

import json
import unicodedata
from itertools import product
from pathlib import Path
from typing import Any

import check_prompts
import make_variants
import pytest
from command_line import UserError
from file_output import read_csv
from gold_words import accepted_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from load_json import STYLES
from rapidfuzz.distance import OSA
from semantics.answers import match_words, normalised
from typos.languages import ENGLISH_STYLES, KEYBOARDS, LANGUAGES, key_neighbours, zipf
from typos.protection import protected_texts
from typos.style_rules import verify_variant
from typos.variants import make_variants as variants_of
from wordfreq import zipf_frequency

DATA = Path(__file__).resolve().parents[1] / "0_data"
TYPOS = ("main", "swap", "missing", "repeated", "two", "three", "noise_words")
DOSES = ("typo@1", "typo@3")
MADE = (*TYPOS, "punctuation", "split", *DOSES)
PROMPTS = {
    "de": "Wie heißt die schöne Hauptstadt des Landes, und wie viele Menschen leben dort im Frühling?",
    "fr": "Quelle est la capitale de l'Italie, et pourquoi les élèves français aiment-ils la ville où l'on mange ?",
    "es": "¿Cuál es la montaña más alta de España y cuántos niños pequeños viven allí en otoño?",
    "pt": "Qual é a capital de Portugal e por que razão os irmãos gostam tanto da sua bela cidade?",
    "it": "Quale montagna è la più alta d'Italia, e perché gli alpinisti l'amano così tanto nella stagione calda?",
    "nl": "Welke stad is de hoofdstad van België en waarom komen er zoveel toeristen uit andere landen?",
    "pl": "Jaka jest stolica Polski i dlaczego ludzie lubią mieszkać w tym pięknym mieście?",
    "ru": "Как называется столица Франции, и почему весёлые люди любят этот прекрасный город?",
    "el": "Ποια είναι η πρωτεύουσα της Γαλλίας, και γιατί οι άνθρωποι αγαπούν αυτή την όμορφη πόλη;",
}
CODES = sorted(PROMPTS)
Row = dict[str, Any]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def row_of(code: str, text: str | None = None, **more: Any) -> Row:
    return {"element_index": 7, "normal": PROMPTS[code] if text is None else text, "_language": code, **more}


def changed(clean: str, variant: str) -> list[tuple[str, str]]:
    """Pairs of pieces that differ, without the marks around them."""
    pairs = zip(clean.split(), variant.split(), strict=True)
    return [(nfc(a).strip("¿?.,;:!»«"), nfc(b).strip("¿?.,;:!»«")) for a, b in pairs if a != b]


def last_part(piece: str) -> str:
    return piece.replace("’", "'").rpartition("'")[2]


def assert_sound(row: Row, made: Row) -> None:
    """What must hold for every typo of a row, by rapidfuzz and wordfreq alone."""
    clean, code = row["normal"], row["_language"]
    for style in {*TYPOS, *DOSES} & made.keys():
        pairs = changed(clean, made[style])
        distances = [OSA.distance(before, after) for before, after in pairs]
        if style in DOSES:
            assert sum(distances) == int(style[-1]), (style, pairs)
        else:
            assert distances == [1] * {"two": 2, "three": 3}.get(style, 1), (style, pairs)
        for before, after in pairs:
            assert zipf_frequency(last_part(after), code) < 3, (style, before, after)
    for style in set(MADE) & made.keys():
        assert verify_variant(clean, made[style], style, row) == []


# --- each language


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("seed", [0, 1])
def test_typos_are_one_edit_each_and_make_no_word(code: str, seed: int) -> None:
    row = row_of(code)
    (made,), log, summary = variants_of([row], [*STYLES, *DOSES], seed=seed)
    assert set(MADE) <= made.keys()
    assert not ENGLISH_STYLES & made.keys()
    assert all(summary["styles"][style]["lacking"] == {"it is made in English alone": 1} for style in ENGLISH_STYLES)
    assert_sound(row, made)
    (noise,) = [line["word"] for line in log if line["style"] == "noise_words"]
    assert noise.lower() in LANGUAGES[code].small_words
    words = {line["word"].lower() for line in log if line["style"] in ("main", "two", "three", "typo@1")}
    assert not words & LANGUAGES[code].small_words


@pytest.mark.parametrize("code", CODES)
def test_main_takes_a_neighbour_on_the_layout_of_the_language(code: str) -> None:
    near = key_neighbours(LANGUAGES[code].keyboard, LANGUAGES[code])
    for seed in range(10):
        (made,), _, _ = variants_of([row_of(code)], ["main"], seed=seed)
        ((before, after),) = changed(PROMPTS[code], made["main"])
        ((old, new),) = [(a, b) for a, b in zip(before.lower(), after.lower(), strict=True) if a != b]
        assert new in near[old]


@pytest.mark.parametrize(
    ("code", "letter", "near"),
    [
        ("de", "z", "tuhg"),
        ("de", "ü", "pöäß"),
        ("fr", "a", "zqé"),
        ("fr", "m", "lpù"),
        ("es", "ñ", "lp"),
        ("pt", "ç", "lp"),
        ("it", "ò", "lpàè"),
        ("ru", "а", "вкепсм"),
        ("ru", "х", "зъжэ"),
        ("el", "σ", "αδςεζχ"),
        ("el", "ω", "ψβφγ"),
        ("nl", "a", "qwsz"),
        ("pl", "l", "kop"),
    ],
)
def test_known_neighbours(code: str, letter: str, near: str) -> None:
    assert set(key_neighbours(LANGUAGES[code].keyboard, LANGUAGES[code])[letter]) == set(near)


@pytest.mark.parametrize("code", CODES)
def test_tables_are_of_their_language(code: str) -> None:
    language = LANGUAGES[code]
    near = key_neighbours(language.keyboard, language)
    assert all(key in near[other] for key in near for other in near[key])
    assert language.keyboard in KEYBOARDS
    for word in language.small_words:
        assert language.alphabet.issuperset(word)
        assert zipf(word, language) == pytest.approx(zipf_frequency(word, code), abs=0.011)
        assert zipf(word, language) >= 3


@pytest.mark.parametrize("code", CODES)
def test_a_prompt_in_form_nfd_takes_the_same_typos_and_stays_nfd(code: str) -> None:
    (plain,), _, _ = variants_of([row_of(code)], [*STYLES, *DOSES])
    apart = row_of(code, nfd(PROMPTS[code]))
    (made,), log, _ = variants_of([apart], [*STYLES, *DOSES])
    assert {style: nfd(plain[style]) for style in MADE} == {style: made[style] for style in MADE}
    assert_sound(apart, made)
    assert all(line["osa_distance"] == 1 for line in log if line["style"] in TYPOS)


def test_a_word_without_accents_takes_one_in_the_form_of_the_prompt() -> None:
    taken = set()
    for form, seed in product((nfc, nfd), range(40)):
        (made,), _, _ = variants_of([row_of("pt", form("Não é alto"))], ["main"], seed=seed)
        assert made["main"] == form(made["main"])
        taken.add(nfc(made["main"]))
    assert "Não é açto" in taken


def test_a_word_of_mixed_forms_is_left_alone() -> None:
    text = "Der schöne Mädchenchor su\u0308ßößö"
    (made,), log, _ = variants_of([row_of("de", text)], ["three", "main"])
    assert "three" not in made
    assert {line["word"] for line in log} <= {"schöne", "Mädchenchor"}


def test_a_letter_and_its_accent_are_one_letter() -> None:
    for seed in range(30):
        (made,), _, _ = variants_of([row_of("fr", nfd("élève créée"))], ["missing", "swap"], seed=seed)
        for style in {"missing", "swap"} & made.keys():
            assert not unicodedata.combining(made[style][0])
            ((before, after),) = changed(nfd("élève créée"), made[style])
            assert OSA.distance(before, after) == 1


@pytest.mark.parametrize(
    ("word", "code"), [("λόγος", "el"), (nfd("λόγος"), "el"), ("Straße", "de"), ("GROSS", "de"), (nfd("été"), "fr")]
)
def test_frequencies_do_not_depend_on_the_way_of_writing(word: str, code: str) -> None:
    assert zipf(word, LANGUAGES[code]) == pytest.approx(zipf_frequency(word, code), abs=0.011)
    assert zipf(word, LANGUAGES[code]) > 3


# --- what is protected


@pytest.mark.parametrize(
    ("code", "text", "protected"),
    [
        ("de", "Sie kauft zwölf Birnen und einundzwanzig Äpfel.", ["zwölf Birnen", "einundzwanzig Äpfel"]),
        ("de", "Wie groß ist die Summe von 12 und 7?", ["Summe", "von", "12", "7"]),
        ("de", "Frage: Wie geht es?\nAntwort:", ["Frage:", "Antwort:"]),
        (
            "de",
            "Siehe https://größe.de/ä und `größe()` sowie „schöne Größe“",
            ["https://größe.de/ä", "`größe()`", "Größe“"],
        ),
        ("fr", "Elle a trois pommes et 5 poires", ["trois pommes", "5 poires"]),
        ("es", "Tiene dieciséis años y mide 2 metros", ["dieciséis años", "2 metros"]),
        ("ru", "У неё пять яблок и двадцать семь груш", ["пять яблок", "двадцать семь груш"]),
        ("ru", "Вопрос: смотри яндекс.рф или «белый дом».\nОтвет:", ["Вопрос:", "яндекс.рф", "«белый дом»", "Ответ:"]),
        ("el", "Έχει δύο μήλα και είκοσι ένα πορτοκάλια", ["δύο μήλα", "είκοσι"]),
        ("pl", "Ma dwanaście jabłek", ["dwanaście jabłek"]),
        ("it", "Ha ventuno mele", ["ventuno mele"]),
        ("nl", "Zij heeft vijfentwintig appels", ["vijfentwintig appels"]),
        ("pt", "Ela tem dezesseis maçãs", ["dezesseis maçãs"]),
    ],
)
def test_numbers_their_units_code_quotes_and_labels_are_protected(code: str, text: str, protected: list[str]) -> None:
    for form in (nfc, nfd):
        row = row_of(code, form(text))
        found = " | ".join(protected_texts(row["normal"], row))
        for piece in protected:
            assert all(form(word) in found for word in piece.split()), (piece, found)
        for seed in range(5):
            (made,), _, _ = variants_of([row], [*STYLES, *DOSES], seed=seed)
            for style in set(MADE) & made.keys():
                assert all(form(word) in made[style] for piece in protected for word in piece.split()), made[style]


@pytest.mark.parametrize("form", [nfc, nfd])
def test_the_answer_is_protected_in_either_form(form: Any) -> None:
    row = row_of("pt", form("A cidade de São Paulo fica no grande país"), answer=["São Paulo"])
    assert protected_texts(row["normal"], row) == [form("São Paulo")]


def test_names_come_last_but_german_nouns_are_words() -> None:
    _, log, _ = variants_of([row_of("fr", "Pourquoi le professeur Dubois aime-t-il sa chienne Mirabelle ?")], ["main"])
    assert log[0]["word"] in ("professeur", "chienne")
    _, log, _ = variants_of([row_of("de", "Warum ist der Schneemann so gut?")], ["main"])
    assert log[0]["word"] == "Schneemann"


def test_only_words_in_the_letters_of_the_language_are_edited() -> None:
    text = "Übersetze bitte das schöne русское слово привет und das Wort computer auf Griechisch λέξη"
    for seed in range(10):
        (made,), log, _ = variants_of([row_of("de", text)], [*TYPOS, *DOSES], seed=seed)
        assert {line["word"] for line in log}.isdisjoint({"русское", "слово", "привет", "λέξη"})
        assert_sound(row_of("de", text), made)


def test_french_puts_a_space_before_a_question_mark() -> None:
    for seed in range(30):
        (made,), _, _ = variants_of([row_of("fr", "Quelle belle ville?")], ["punctuation"], seed=seed)
        assert made["punctuation"] != "Quelle belle ville ?"


# --- which language


def test_a_script_without_spaces_lacks_the_styles_and_says_why(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    source = tmp_path / "in.json"
    source.write_text(json.dumps([{"normal": "法国的首都是哪座城市？"}, {"normal": "东京在哪个国家？"}]))
    flags = ["--prompt_file", str(source), "--output_file", str(tmp_path / "out.json"), "--language", "zh"]
    assert make_variants.main([*flags, "--dose", "1"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [set(row) for row in rows] == [{"normal", "_language"}] * 2
    lines = [line for line in caplog.text.splitlines() if "made" in line]
    assert any(
        "main" in line and line.endswith("2 lack it: Chinese is written without spaces between words") for line in lines
    )
    assert any("grammar" in line and line.endswith("2 lack it: it is made in English alone") for line in lines)


def test_the_language_of_a_row_comes_before_the_flag_and_english_rows_are_as_ever() -> None:
    rows = [{"normal": PROMPTS["fr"], "_language": "fr"}, {"normal": PROMPTS["de"]}]
    made, _, _ = variants_of(rows, ["main"], language="de")
    assert [row["_language"] for row in made] == ["fr", "de"]
    english = {"normal": "Explain the beautiful mountain to the children."}
    ((plain,), _, _), ((marked,), _, _) = (variants_of([row]) for row in (english, english | {"_language": "en"}))
    assert "_language" not in plain
    assert plain == {key: value for key, value in marked.items() if key != "_language"}


def test_an_unknown_language_is_one_line_with_the_known_ones(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text(json.dumps([{"normal": "Wo?", "_language": "xx"}, {"normal": "Die Hauptstadt ist schön"}]))
    flags = ["--prompt_file", str(source), "--language", "tlh"]
    for script, more in ((make_variants, ["--output_file", str(tmp_path / "out.json")]), (check_prompts, [])):
        with pytest.raises(UserError, match=r"--language 'tlh' is no known language; choose from de, el, en, es"):
            script.main([*flags, *more])
    _, _, summary = variants_of([{"normal": "Wo?", "_language": 5}, {"normal": "Wo?", "_language": "xx"}])
    assert [index for index, _ in summary["bad_rows"]] == [0, 1]
    assert check_prompts.main(["--prompt_file", str(source), "--output_csv", str(tmp_path / "found.csv")]) == 1
    assert "'xx' is no known language" in " ".join(read_csv(tmp_path / "found.csv")["detail"])


def test_a_keyboard_of_another_script_is_refused() -> None:
    with pytest.raises(UserError, match="--keyboard dvorak: has no letters of Russian"):
        variants_of([row_of("ru")], ["main"], keyboard="dvorak")


def test_check_prompts_takes_the_language_of_the_row_or_the_flag(tmp_path: Path) -> None:
    source, found = tmp_path / "in.json", tmp_path / "found.csv"
    rows = [{"normal": "Die Katze schläft im Garten", "main": "Die Katze schläft im Karten"}]
    source.write_text(json.dumps(rows))
    assert check_prompts.main(["--prompt_file", str(source)]) == 0  # no English word
    assert check_prompts.main(["--prompt_file", str(source), "--language", "de", "--output_csv", str(found)]) == 1
    assert list(read_csv(found)["kind"]) == ["accidental_real_word"]
    source.write_text(json.dumps([rows[0] | {"_language": "de"}]))
    assert check_prompts.main(["--prompt_file", str(source)]) == 1


def test_a_tone_written_by_hand_stays_in_a_language_that_has_none() -> None:
    row = row_of("de", polite=f"Könnten Sie mir bitte helfen? {PROMPTS['de']}")
    (made,), _, summary = variants_of([row])
    assert made["polite"] == row["polite"]
    assert not summary["styles"]["polite"]["lacking"]
    assert verify_variant(row["normal"], made["polite"], "polite", row) == []


# --- languages.json


@pytest.mark.usefixtures("tables_as_written")
def test_the_file_of_four_languages_is_rebuilt_bit_for_bit_and_sound(tmp_path: Path) -> None:
    flags = ["--prompt_file", str(DATA / "languages_clean.json"), "--output_file", str(tmp_path / "languages.json")]
    styles = [*TYPOS[:-1], "punctuation", "noise_words"]
    assert make_variants.main([*flags, "--styles", *styles, "--dose", "1", "2"]) == 0
    for name in ("languages.json", "languages_edits.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: make it again"
    assert check_prompts.main(["--prompt_file", str(DATA / "languages.json")]) == 0
    rows = json.loads((DATA / "languages.json").read_text(encoding="utf-8"))
    assert {code: sum(row["_language"] == code for row in rows) for code in ("de", "fr", "es", "ru")} == dict.fromkeys(
        ("de", "fr", "es", "ru"), 10
    )
    for row in rows:
        assert_sound(row, row)


def test_answers_in_four_languages_are_scored_in_any_form_and_case() -> None:
    rows = json.loads((DATA / "languages.json").read_text(encoding="utf-8"))
    for row in rows:
        accepted = accepted_texts(row["answer"])
        assert accepted
        for text in accepted:
            for written in (text, nfd(text), text.upper(), nfd(text.upper()), f" {text.title()}.\n"):
                assert match_words(written, accepted).exact_match, written
        assert not match_words("Zzz", accepted).contains


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("СТРАНА Ёж", "страна еж"),
        ("май", "май"),
        (nfd("Май"), "май"),
        ("маи", "маи"),
        ("ΑΘΉΝΑΣ", "αθηνασ"),
        ("αθήνας", "αθηνασ"),
    ],
)
def test_answers_are_compared_without_accents_but_й_is_a_letter(text: str, expected: str) -> None:
    assert normalised(text) == expected


# --- any text at all

ODD = st.lists(
    st.one_of(
        st.sampled_from([word for text in PROMPTS.values() for word in text.split()]),
        st.sampled_from(
            ["12", "zwölf", "l'été", "¿Qué", "«дом»", "a.б", "ς", "ß", "ΐ", "İ", "ǅ", "\u0301", "ﬁ", "日本", "Ⅷ", ":"]
        ),
        st.text(max_size=6),
    ),
    max_size=12,
).map(" ".join)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ODD, st.sampled_from(sorted(LANGUAGES)), st.sampled_from([nfc, nfd, str]), st.integers(0, 3))
def test_any_text_in_any_language_gives_sound_variants_or_none(text: str, code: str, form: Any, seed: int) -> None:
    row = row_of(code, form(text), answer="été")
    (made,), _, _ = variants_of([row], [*STYLES, *DOSES], seed=seed)
    assert made["normal"] == row["normal"]
    assert_sound(row, made)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("请回答：中国的首都是哪座城市？", False),
        ("Как называется столица Франции, и почему?", False),
        ("Please translate the sentence: 你好", True),
        ("7 + 5 =", True),
    ],
)
def test_a_text_in_foreign_letters_gets_no_english_tone(text: str, made: bool) -> None:
    rows, _, summary = variants_of([{"normal": text}], ("polite", "swap"))
    assert ("polite" in rows[0]) is made
    reasons = " ".join(summary["styles"]["polite"]["lacking"])
    assert ("not in the letters of English; name its language in _language or with --language" in reasons) is not made
