"""The agent: one process a user and node that reads the journals and answers over HTTP."""
