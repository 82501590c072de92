"""Losses as pure functions of arrays, one equation each."""
