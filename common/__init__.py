"""What every package may rely on: errors and exit codes, files that are never torn, the run and its configuration.

Imports nothing heavier than the standard library, so that ``--help`` and the table tools start at once.
"""
