"""The command line.

`main` has the commands, `session` what they have in common, `progress` the live table.
"""
