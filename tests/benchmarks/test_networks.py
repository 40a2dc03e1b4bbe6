import pytest

from benchmarks.networks import measured
from common.errors import InputError


def test_peak_memory_is_that_of_the_command_alone():
    """Not of the process that starts it, nor of one that holds little."""
    large = bytearray(400 << 20)
    for start in range(0, len(large), 4096):
        large[start] = 1
    small = measured(["-S", "-c", "print(1)"])
    assert small.stdout == "1\n"
    assert 1 < small.peak < 100
    assert measured(["-S", "-c", "bytearray(b'x') * (200 << 20)"]).peak > 200


def test_a_command_that_fails():
    with pytest.raises(InputError, match=r"^-S ended with exit code 1: sorry$"):
        measured(["-S", "-c", "import sys; sys.exit('sorry')"])
    assert measured(["-S", "-c", "import sys; sys.exit(1)"], codes=(0, 1)).seconds > 0
