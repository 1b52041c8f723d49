"""What all tests share."""

from collections.abc import Iterator

import file_output
import pytest


@pytest.fixture(scope="session", autouse=True)
def tables_in_full() -> Iterator[None]:
    """CSV tables are written with all digits, so that tests see the numbers before they are rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_output, "FLOAT_FORMAT", None)
        yield
