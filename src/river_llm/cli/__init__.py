"""The command line: `river-llm build | generate | chat | inspect | bench | check-exact | eval`.

Answers go to stdout, progress and notes to stderr. Exit codes: 0 done (an answer cut short by
Ctrl-C too), 1 failed with one clear line, 2 wrong usage, 130 any other work cut short by Ctrl-C.
"""

from river_llm.cli.app import main

__all__ = ["main"]
