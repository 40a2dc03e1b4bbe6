"""The breaks of ``breaks.py``, which are run by hand, still fit the code and are those that CONTRIBUTING lists."""

import pytest

from tests.breaks import BREAKS, Break


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_break_fits_the_code_and_names_a_test(one: Break, root):
    assert (root / one.file).read_text(encoding="utf-8").count(one.old) == 1
    file, _, name = one.test.partition("::")
    assert f"def {name}" in (root / file).read_text(encoding="utf-8")
    assert one.rule in (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
