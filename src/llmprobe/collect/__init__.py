"""Reads the journals of every engine process and turns their records into figures a server at a time."""
