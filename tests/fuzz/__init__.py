"""Parsers of what we did not write, given what nobody would write; `script/fuzz` does it for minutes."""
