"""Four solved problems for few-shot prompts of `math500`, written for it: no item of MATH."""

from __future__ import annotations

from river_llm.evaluation.data import Record

_SOLVED = (
    (
        "If $3x + 7 = 22$, what is the value of $x^2 - 1$?",
        "Subtracting $7$ from both sides gives $3x = 15$, so $x = 5$. Then $x^2 - 1 = 25 - 1 = "
        "\\boxed{24}$.",
        "24",
    ),
    (
        "What is the sum of all positive divisors of $45$?",
        "Since $45 = 3^2 \\cdot 5$, the sum of its divisors is $(1 + 3 + 3^2)(1 + 5) = 13 \\cdot 6 "
        "= \\boxed{78}$.",
        "78",
    ),
    (
        "Two fair six-sided dice are rolled. What is the probability that the two numbers add up "
        "to $9$? Express your answer as a common fraction.",
        "There are $6 \\cdot 6 = 36$ equally likely outcomes. Those that add up to $9$ are "
        "$(3,6)$, $(4,5)$, $(5,4)$ and $(6,3)$, which are $4$. The probability is $\\frac{4}{36} = "
        "\\boxed{\\frac{1}{9}}$.",
        "\\frac{1}{9}",
    ),
    (
        "The legs of a right triangle are $9$ and $12$ long. How far is the vertex of the right "
        "angle from the hypotenuse? Express your answer as a common fraction.",
        "The hypotenuse is $\\sqrt{9^2 + 12^2} = \\sqrt{225} = 15$ long, and the area is "
        "$\\frac{1}{2} \\cdot 9 \\cdot 12 = 54$. If $h$ is the distance, the area is also "
        "$\\frac{1}{2} \\cdot 15 h$. So $h = \\frac{2 \\cdot 54}{15} = \\boxed{\\frac{36}{5}}$.",
        "\\frac{36}{5}",
    ),
)

MATH_EXAMPLES = tuple(
    Record(
        {"problem": problem, "solution": solution, "answer": answer}, f"example {number} of math500"
    )
    for number, (problem, solution, answer) in enumerate(_SOLVED, start=1)
)
