"""A model's answer to a HumanEval task, as a program that can be run."""

from __future__ import annotations

import re

# Where a completion of the function has ended (Chen et al. 2021).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def completed_function(prompt: str, completion: str) -> str:
    """The task's prompt with what the model wrote on."""
    return prompt + completion


def function_of_answer(prompt: str, answer: str, entry_point: str) -> str:
    """The program in an answer in prose: the first fenced block that defines the function, else the
    first block, else all of the answer.

    What stands before the function in the prompt, imports and functions that it uses, is put before
    a block that defines the function itself; any other block is taken for the function's body.
    """
    blocks: list[str] = _FENCED.findall(answer) or [answer]
    definition = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    defining = [block for block in blocks if definition.search(block)]
    if defining:
        before = definition.split(prompt)[0]
        return f"{before}\n{defining[0]}"
    return prompt + blocks[0]


def with_test(program: str, test: str, entry_point: str) -> str:
    """The program, the task's own test, and the call that runs it."""
    return f"{program}\n\n{test}\n\ncheck({entry_point})\n"
