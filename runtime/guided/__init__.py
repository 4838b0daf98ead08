"""Grammars that the text of a sequence must match."""
