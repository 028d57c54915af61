"""What confines one untrusted program on Linux: namespaces, Landlock, a filter of system calls.

Standard library only, and imports relative to this folder: the supervisor runs as a process of its
own, in a bare interpreter that doesn't import `river_llm`. `code_execution` is what starts it.
"""
