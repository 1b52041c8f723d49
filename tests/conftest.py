"""What all tests share."""

from collections.abc import Iterator

import file_output
import pytest

AS_WRITTEN = file_output.FLOAT_FORMAT


@pytest.fixture(scope="session", autouse=True)
def tables_in_full() -> Iterator[None]:
    """CSV tables are written with all digits, so that tests see the numbers before they are rounded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_output, "FLOAT_FORMAT", None)
        yield


@pytest.fixture
def tables_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV tables are written as users get them."""
    monkeypatch.setattr(file_output, "FLOAT_FORMAT", AS_WRITTEN)
