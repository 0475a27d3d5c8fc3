"""``python -m llmprobe.agent``: how an engine starts an agent."""

from llmprobe.agent.main import main

raise SystemExit(main())
