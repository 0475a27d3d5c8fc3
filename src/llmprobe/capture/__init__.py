"""Deep looks at a running server, on demand: sessions, the tools that record them, and what may leave."""
