"""Rebuild 0_data/homophones.json, the table of true homophones behind the style `homonym`, from two public sources.

Reads   the CMU Pronouncing Dictionary (`cmudict.dict`), its licence, and a list of American English words, one a line
Writes  the table with the licence of the pronunciations inside (docs/METHODS.md says which pairs it holds)

The word list is every word of the dictionary that spylls 0.1.7 (Hunspell's en_US, the normal size) accepts:

    cut -d' ' -f1 cmudict.dict | python -c "import sys; from spylls.hunspell import Dictionary; \\
        accepts = Dictionary.from_files('en_US').lookup; \\
        print(*(word for word in sys.stdin.read().split() if accepts(word)), sep=chr(10))" > words.txt
    python 0_data/run_scripts/make_homophones.py --cmudict_file cmudict.dict --cmudict_licence LICENSE \\
        --word_file words.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from file_output import write_json
from load_json import read_text
from logger import get_logger

SOURCE = (
    "Derived by 0_data/run_scripts/make_homophones.py from the CMU Pronouncing Dictionary (pronunciations), with "
    "wordfreq (frequencies) and the en_US Hunspell dictionary (which words are American English) as filters."
)


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
    from typos.homophone_tables import homophone_tables, read_pronunciations, usable_words

    pronunciations = read_pronunciations(args.cmudict_file)
    american = set(read_text(args.word_file, "a word list").split())
    sure, sometimes = homophone_tables(pronunciations, usable_words(pronunciations, american))
    tables = {"homophones": sure, "sometimes": sometimes}
    joined = {name: {word: " ".join(others) for word, others in table.items()} for name, table in tables.items()}
    licence = read_text(args.cmudict_licence, "the dictionary's licence").splitlines()
    write_json(args.output_file, {"source": SOURCE, "licence": licence, **joined})
    get_logger("make_homophones").info(f"wrote {args.output_file}: {len(sure)} words, {len(sometimes)} sometimes")
    return 0


if __name__ == "__main__":
    run_main(main)
