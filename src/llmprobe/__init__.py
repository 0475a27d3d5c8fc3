"""llmprobe tells operators, live and with evidence, what their LLM server is bound by.

Importing this package does nothing; ``LLMPROBE=1`` in the environment, or `enable`, does.
"""

__version__ = "0.1.0"
