"""tests/mutants.py: every defect can still be put in, its tests exist, and none survived the last
time all of them ran."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from tests.mutants import MUTANTS, RESULTS, ROOT, Mutant, judge, mutated, table, wrong_anchors


def test_every_anchor_is_there_once():
    assert wrong_anchors() == []


def test_a_lost_anchor_is_named(tmp_path):
    (tmp_path / "spectral_kernels").mkdir()
    (tmp_path / "spectral_kernels" / "x.py").write_text("a = 1\nb = 1\n")
    lost = [Mutant("gone", "x.py", "c = 1", "c = 2", ""), Mutant("two", "x.py", "= 1", "= 2", "")]
    once = Mutant("once", "x.py", "a = 1", "a = 2", "")
    found = wrong_anchors([*lost, once], tmp_path)
    assert [re.search(r": (\w+): (\d) times", x).groups() for x in found] == [
        ("gone", "0"),
        ("two", "2"),
    ]


def test_every_mutant_is_python_and_another_program():
    texts = {path: (ROOT / path).read_text() for path in {m.path for m in MUTANTS}}
    before = {path: ast.dump(ast.parse(text)) for path, text in texts.items()}
    for mutant in MUTANTS:
        after = ast.dump(ast.parse(mutated(mutant, texts[mutant.path])))
        assert before[mutant.path] != after, mutant.name


def test_there_are_enough_and_no_two_alike():
    assert len(MUTANTS) >= 80
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert len({(m.file, m.anchor, m.replacement) for m in MUTANTS}) == len(MUTANTS)


def test_their_tests_exist():
    for mutant in MUTANTS:
        path, _, rest = mutant.tests.split()[0].partition("::")
        name = rest.split("[")[0]
        assert not name or f"def {name}(" in (ROOT / path).read_text(), mutant.tests


def test_all_were_killed():
    results = json.loads(RESULTS.read_text())
    assert set(results) == {m.name for m in MUTANTS}
    assert {name for name, x in results.items() if x["verdict"] != "killed"} == set()


def test_the_readme_has_the_table():
    assert table(json.loads(RESULTS.read_text())) in (ROOT / "tests" / "README.md").read_text()


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "3 passed", "survived"),
        (1, "FAILED tests/test_x.py::test_y[a b] - AssertionError: o: 9 times\n", "killed"),
        (1, "FAILED tests/test_x.py::test_y - Failed: DID NOT RAISE\n", "killed"),
        (1, "FAILED tests/test_x.py::test_y - NameError: name 'z' is not defined\n", "wrong"),
        (-11, "", "killed"),
        (-14, "", "killed"),
        (2, "ERROR tests/test_x.py - SyntaxError", "wrong"),
        (5, "no tests ran", "wrong"),
    ],
)
def test_what_counts_as_killed(code, output, verdict):
    assert judge(code, output)[0] == verdict


def test_a_run_without_an_end_is_killed(tmp_path):
    """Beside one that passes, as mutants run: forked from a process that has little else."""
    endless = "def test_a(): pass\ndef test_b():\n    while True: pass\n"
    (tmp_path / "test_endless.py").write_text(endless)
    program = (
        "import sys; from tests.mutants import judge, run_forked; "
        "print(*(judge(*run_forked(sys.argv[1], [f'test_endless.py::test_{x}'], 5)) for x in 'ab'))"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "('survived', '') ('killed', 'no end within 300 s')", done
