"""What every script shares on its command line: flags that are spelled out, help with misspelt ones, `--verbose`."""

from __future__ import annotations

import pytest
from command_line import UserError, make_parser
from logger import get_logger, set_verbose


def parser():
    made = make_parser("A script.")
    made.add_argument("--model_name", required=True)
    made.add_argument("--neurons", action="store_true")
    made.add_argument("rest", nargs="*")
    return made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model_name", "m", "--neuron"], "--neuron: there is no such flag; did you mean --neurons"),  # no prefixes
        (["--modle_name", "m"], "--modle_name: there is no such flag; did you mean --model_name"),  # though required
        (["--Model_Name=m"], "did you mean --model_name"),
        (["--model_name", "m", "--xyzzy"], "--xyzzy: there is no such flag; "),
        (["--neurons", "--", "--modle_name"], "required: --model_name"),  # another script's flags are not looked at
    ],
)
def test_a_flag_that_is_not_spelled_out_is_refused_with_the_nearest(words, told):
    with pytest.raises(UserError) as caught:
        parser().parse_args(words)
    assert told in str(caught.value)
    assert "xyzzy" not in told or "did you mean" not in str(caught.value)


def test_details_show_with_verbose_alone(capsys):
    log = get_logger("test_of_details")
    try:
        for words in (["--model_name", "m"], ["--model_name", "m", "--verbose"]):
            parser().parse_args(words)
            log.debug(f"a detail, {len(words)}")
            log.info(f"a line, {len(words)}")
    finally:
        set_verbose(False)
    assert capsys.readouterr().err.splitlines() == ["a line, 2", "a detail, 3", "a line, 3"]
