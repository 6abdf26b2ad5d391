"""The command line.

`main` has the commands, `session` has what they share, and `progress` has the live table.
"""
