"""What ``llmprobe demo`` and the tests serve and drive: a tiny model, a server, a client."""
