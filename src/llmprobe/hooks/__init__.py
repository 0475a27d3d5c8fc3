"""Wrappers around the engines' own methods; each notes what happens and calls the original."""
