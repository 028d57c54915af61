"""Answers in words to verdicts: hand-made answers, and lm-eval's own scorers on the same ones."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from river_llm import DataError, MissingExtraError
from river_llm.evaluation import extras
from river_llm.evaluation.final_number import final_number, marked_number
from river_llm.evaluation.instruction_check import InstructionChecker
from river_llm.evaluation.math_answer import MathVerifier
from river_llm.evaluation.program_text import completed_function, function_of_answer, with_test

NUMBERS = {
    "": None,
    "   \n": None,
    "I don't know.": None,
    "18": 18,
    "The answer is 18.": 18,
    "18 dollars, not 20. So 18.": 18,
    "It is $1,234.50.": Fraction(2469, 2),
    "1,000,000 people": 1_000_000,
    "1{,}000": 1000,
    "1, 2, 3": 3,
    "-5": -5,
    "\u2212 5": -5,
    "-$5": -5,
    "$-5": -5,
    "(-3)": -3,
    "3 * -2 = -6": -6,
    "10-5": 5,
    "10 - 5 = 5": 5,
    "3-4 days": 4,
    "3/4": Fraction(3, 4),
    "2 1/2 cups": Fraction(5, 2),
    r"\frac{3}{4}": Fraction(3, 4),
    r"\boxed{-\dfrac{1}{2}}": Fraction(-1, 2),
    r"\boxed{42}": 42,
    r"\$18": 18,
    "50%": 50,
    "18km": 18,
    "18.00": 18,
    "x = .5": Fraction(1, 2),
    "H2O": None,
    "**42**": 42,
    "48/2 = <<48/2=24>>24 clips": 24,
    "on 12/25/2020": 2020,
    "#### 18": 18,
    "5 + 13 = 18\n#### 18\n\nQuestion: 7 apples": 18,
    "#### $18 a day, 7 days": 18,
    "#### \n18": 18,
    "#### none": None,
    "5 #### 3 #### 4": 4,
    "1/0": None,
    "9" * 500: None,
}


class TestFinalNumber:
    @pytest.mark.parametrize(("text", "expected"), NUMBERS.items())
    def test_of_hand_made_answers(self, text: str, expected: Fraction | None) -> None:
        assert final_number(text) == expected

    def test_of_an_answer_without_the_mark_is_not_marked(self) -> None:
        assert marked_number("The answer is 18.") is None
        assert marked_number("so\n#### 18.") == 18


# Fifty outputs as models write them for GSM8K: the right answer is the second entry.
OUTPUTS = [
    ("She sells 9 eggs.\n#### 18", "18"),
    ("She sells 9 eggs.\n#### 19", "18"),
    ("#### 18.", "18"),
    ("#### $18", "18"),
    ("#### 1,800", "1800"),
    ("#### 1800", "1,800"),
    ("#### -4", "-4"),
    ("#### 4", "-4"),
    ("#### 3.5", "3.5"),
    ("#### 35", "3.5"),
    ("The answer is 18.", "18"),
    ("The answer is 18 dollars.", "18"),
    ("The answer is $18.", "18"),
    ("The answer is **18**.", "18"),
    ("The answer is \\boxed{18}", "18"),
    ("The answer is \\boxed{81}", "18"),
    ("So 16 - 3 - 4 = 9 and 9 * 2 = 18", "18"),
    ("So 16 - 3 - 4 = 9 and 9 * 2 = 18", "9"),
    ("16 - 3 - 4 = <<16-3-4=9>>9", "9"),
    ("It takes 3 days", "3"),
    ("It takes three days", "3"),
    ("", "3"),
    ("I can't tell.", "0"),
    ("No number here!", "12"),
    ("12 apples and 7 pears", "7"),
    ("12 apples and 7 pears", "12"),
    ("Total: $1,234", "1234"),
    ("Total: $1,234.", "1234"),
    ("Total: $1,234,567", "1234567"),
    ("It is 25%", "25"),
    ("It is 25 %.", "25"),
    ("It is 0.25", "0.25"),
    ("It is 0.25", "25"),
    ("= 540 meters", "540"),
    ("= 540 metres a week.\n", "540"),
    ("x = 540\n\n", "540"),
    ("20 cups / 4 = 5 cups", "5"),
    ("John has 10 more, so he has 10", "10"),
    ("The profit is -5", "-5"),
    ("The profit is -5.", "5"),
    ("The profit is $70,000", "70000"),
    ("70000", "70,000"),
    ("Step 1: 3\nStep 2: 4\nStep 3: 12", "12"),
    ("Step 1: 3\nStep 2: 4\nStep 3: twelve", "12"),
    ("160 + 40 = 200 and then 260", "260"),
    ("it was 5 o'clock", "5"),
    ("'45'", "45"),
    ("(45)", "45"),
    ("45!", "45"),
    ("45\n####", "45"),
]

# Where this package is right and lm-eval's patterns are not: (output, right answer, right?).
BETTER = [
    ("#### 18.00", "18", True),
    ("It is 3/4", "4", False),
    ("It is 3/4", "0.75", True),
    ("10-5", "5", True),
    ("18.00", "18", True),
]


def lm_eval_says(output: str, answer: str) -> bool:
    """gsm8k of lm-eval: ``strict-match`` where it finds its mark, else ``flexible-extract``."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")

    def extract(**settings: Any) -> str:
        ((found,),) = extraction.RegexFilter(**settings).apply([[output]], [{}])
        return str(found)

    found = extract(regex_pattern=r"#### (\-?[0-9\.\,]+)")
    if found == "[invalid]":
        found = extract(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    result = metrics.exact_match_fn(
        predictions=[found], references=[answer], regexes_to_ignore=ignored, ignore_case=True
    )
    return bool(result["exact_match"])


class TestBesideLmEval:
    def test_there_are_fifty_outputs_of_either_kind(self) -> None:
        assert len(OUTPUTS) == len(set(OUTPUTS)) == 50

    @pytest.mark.parametrize(("output", "answer"), OUTPUTS)
    def test_final_numbers_get_the_same_verdict(self, output: str, answer: str) -> None:
        expected = lm_eval_says(output, answer)
        assert (final_number(output) == final_number(answer)) == expected

    @pytest.mark.parametrize(("output", "answer", "is_right"), BETTER)
    def test_knows_better_in_these(self, output: str, answer: str, is_right: bool) -> None:
        assert (final_number(output) == final_number(answer)) == is_right
        assert lm_eval_says(output, answer) != is_right


class TestMathVerifier:
    @pytest.fixture(scope="class")
    def verifier(self) -> MathVerifier:
        pytest.importorskip("math_verify")
        return MathVerifier()

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"So it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
            (r"\boxed{0.5}", r"\frac{1}{2}"),
            (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
            (r"The answer is $\left(3, \frac{\pi}{2}\right)$.", r"\left( 3, \frac{\pi}{2} \right)"),
            ("The final answer is 42.", "42"),
            (r"first \boxed{1}, no: \boxed{42}", "42"),
            (r"\boxed{2x+1}", "1+2x"),
            (r"\boxed{1{,}000}", "1000"),
            (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
            (r"\boxed{90^\circ}", "90"),
        ],
    )
    def test_equal_answers_are_right(self, verifier: MathVerifier, text: str, answer: str) -> None:
        assert verifier.is_right(text, answer)

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            ("", "42"),
            ("I don't know", "42"),
            (r"\boxed{}", "42"),
            (r"\boxed{41}", "42"),
            (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}"),
            (r"\boxed{(2, 3)}", "(3, 2)"),
            (r"\boxed{\frac{1}{", "1"),
        ],
    )
    def test_other_answers_are_wrong(self, verifier: MathVerifier, text: str, answer: str) -> None:
        assert not verifier.is_right(text, answer)

    def test_extracts_what_is_boxed(self, verifier: MathVerifier) -> None:
        assert verifier.extract(r"1 + 1 = 2, so $\boxed{\frac{3}{4}}$") == r"\frac{3}{4}"
        assert verifier.extract("nothing at all") is None


INSTRUCTIONS: dict[str, Any] = {
    "key": 1,
    "prompt": "Say it in lower case, without commas.",
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
    "kwargs": [{}, {}],
}


class TestInstructionChecker:
    @pytest.fixture(scope="class")
    def checker(self) -> InstructionChecker:
        pytest.importorskip("lm_eval")
        pytest.importorskip("langdetect")
        return InstructionChecker()

    @pytest.mark.parametrize(
        ("answer", "followed"),
        [
            ("the river runs to the sea and never comes back", [True, True]),
            ("the river runs, and runs to the sea", [False, True]),
            ("The River Runs to the Sea", [True, False]),
            ("", [False, False]),
        ],
    )
    def test_checks_every_instruction(
        self, checker: InstructionChecker, answer: str, followed: list[bool]
    ) -> None:
        assert checker.score(INSTRUCTIONS, answer).strict == followed

    def test_forgives_a_first_line_in_the_loose_score(self, checker: InstructionChecker) -> None:
        score = checker.score(INSTRUCTIONS, "Sure, here it is:\nthe river runs to the sea and back")
        assert score.strict == [False, False]
        assert score.loose == [True, True]

    def test_says_what_it_has_no_rules_for(
        self, checker: InstructionChecker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sentences = {"instruction_id_list": ["length_constraints:number_sentences"]}
        monkeypatch.setattr(checker, "_has_sentences", False)
        assert "nltk.downloader punkt_tab" in (checker.cannot_check(sentences) or "")
        assert checker.cannot_check(INSTRUCTIONS) is None
        monkeypatch.setattr(checker, "_has_sentences", True)
        assert checker.cannot_check(sentences) is None

    @pytest.mark.parametrize(
        "change", [{"instruction_id_list": ["no:such"], "kwargs": [{}]}, {"kwargs": [{"a": 1}] * 2}]
    )
    def test_refuses_an_item_that_it_cannot_check(
        self, checker: InstructionChecker, change: dict[str, Any]
    ) -> None:
        with pytest.raises(DataError, match="item 1"):
            checker.score({**INSTRUCTIONS, **change}, "text")


class TestExtras:
    def test_a_missing_package_is_named_with_the_mend(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(name: str) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(extras, "import_module", missing)
        with pytest.raises(MissingExtraError, match=r"math-verify; install .*river-llm\[eval\]"):
            MathVerifier()


PROMPT = '''import math


def helper(x):
    return x


def area(r):
    """The area of a circle."""
'''


class TestProgramText:
    def test_a_completion_goes_on_from_the_prompt(self) -> None:
        program = completed_function(PROMPT, "    return math.pi * helper(r) ** 2\n")
        assert area_of(program) == pytest.approx(12.566, abs=1e-3)

    @pytest.mark.parametrize(
        "answer",
        [
            "Here it is:\n```python\ndef area(r):\n    return math.pi * helper(r) ** 2\n```\nDone.",
            "```\nimport math\n\ndef area(r):\n    return math.pi * r * r\n```",
            "First a test:\n```python\nassert True\n```\nthen\n```py\ndef area(r):\n"
            "    return math.pi * r ** 2\n```",
            "```python\ndef area(r):\n    return math.pi * r ** 2",  # cut short
            "```python\n    return math.pi * r ** 2\n```",
            "    return math.pi * r ** 2",
            "def area(r):\n    return math.pi * r ** 2",
        ],
    )
    def test_the_function_is_found_in_prose(self, answer: str) -> None:
        program = function_of_answer(PROMPT, answer, "area")
        assert area_of(program) == pytest.approx(12.566, abs=1e-3)

    def test_the_test_is_run_on_the_function(self) -> None:
        test = "def check(candidate):\n    assert candidate(2) == 5\n"
        with pytest.raises(AssertionError):
            exec(with_test("def area(r):\n    return 4\n", test, "area"), {})


def area_of(program: str) -> float:
    names: dict[str, Any] = {}
    exec(program, names)
    return float(names["area"](2))
