"""A few cases of tests/fuzz.py, which says how to run many; and what it covers."""

import math

import pytest

from tests import fuzz
from tests.fuzz import FUZZERS, LAYOUTS, Draw, chunks, run_case

PART = 5  # cases a test, so that workers can share them


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numbers" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("--fuzz-case")
    if wanted:
        name, shape, number = wanted.split(":")
        parts = [(name, [(int(shape), int(number))])]
    else:
        total, parts = metafunc.config.getoption("--fuzz-cases"), []
        for name, (_, share) in FUZZERS.items():
            numbers = [(number, 0) for number in range(math.ceil(total * share))]
            parts += [(name, numbers[i : i + PART]) for i in range(0, len(numbers), PART)]
    ids = [f"{name}-{numbers[0][0]}" for name, numbers in parts]
    metafunc.parametrize(("name", "numbers"), parts, ids=ids)


def test_fuzz(name: str, numbers: list[tuple[int, int]]) -> None:
    for shape, number in numbers:
        run_case(name, shape, number)


@pytest.mark.parametrize("shape", range(8))
def test_histories(shape: int) -> None:
    """A cache through a dozen steps in any order, against a dense float64 one."""
    run_case("history", shape, 1)


def test_the_shares_add_up() -> None:
    assert math.isclose(sum(share for _, share in FUZZERS.values()), 1.0)


def test_a_failure_prints_its_line(monkeypatch) -> None:
    def fail(draw: Draw) -> None:
        assert draw.int("n", 3, 3) == 4, "three is not four"

    monkeypatch.setitem(FUZZERS, "merge", (fail, 1.0))
    with pytest.raises(AssertionError, match=r"(?s)--fuzz-case merge:7:2\n.*not four.*'n': 3"):
        run_case("merge", 7, 2)


def test_a_case_is_a_function_of_its_numbers(monkeypatch) -> None:
    """Draws by shape are the same in all cases of a shape, others in no two."""
    found: list[tuple] = []

    def record(draw: Draw) -> None:
        found.append((draw.shape("a", *range(99)), draw.int("b", 0, 10**9), draw.of("c", *"xyz")))

    monkeypatch.setitem(FUZZERS, "merge", (record, 1.0))
    for case in ((1, 1), (1, 1), (1, 2), (2, 1)):
        run_case("merge", *case)
    assert found[0] == found[1] and found[0][0] == found[2][0]
    assert len({b for _, b, _ in found}) == 3 and found[3][0] != found[0][0]


def test_chunks_are_the_cases_that_were_asked_for() -> None:
    """None twice, and as many; every operation and shape; another seed, other shapes."""
    found = [(name, shape, n) for name, shape, numbers in chunks(3, 4, 1000) for n in numbers]
    assert len(found) == len(set(found)) == 1000
    assert {shape for _, shape, _ in found} == {12, 13, 14, 15}
    assert {name for name, _, _ in found} == set(FUZZERS)
    assert {shape for _, shape, _ in chunks(4, 4, 1000)} == {16, 17, 18, 19}


def test_a_failing_chunk_is_counted(monkeypatch) -> None:
    def fail(draw: Draw) -> None:
        assert draw.number != 1, "one"

    monkeypatch.setitem(FUZZERS, "merge", (fail, 1.0))
    name, ran, failures, _ = fuzz.run_chunk(("merge", 0, range(3)), math.inf)
    assert (name, ran, len(failures)) == ("merge", 3, 1)
    assert failures[0].startswith("pytest tests/test_fuzz.py --fuzz-case merge:0:1\n")


def test_fewer_cases_than_asked_fail(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--minutes", "0", "--cases", "5"])
    assert fuzz.main() == 1
    assert "expected 5 in all, got 0" in capsys.readouterr().out


def test_layouts_cover_what_is_supported() -> None:
    """Every head dimension, number of heads a group that the library promises, several frames,
    every kind of band."""
    assert {layout.head_dim for layout in LAYOUTS} == {64, 80, 96, 128, 256}
    assert {layout.frame for layout in LAYOUTS} == {64, 128, 512}
    assert {group for layout in LAYOUTS for group in layout.groups} == {1, 2, 4, 6, 8}
    for side in ("k_bands", "v_bands"):
        texts = "+".join(getattr(layout, side) for layout in LAYOUTS).split("+")
        assert {text.split("x")[1] for text in texts} == {"8", "4", "2"}
