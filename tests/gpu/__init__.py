"""Tests on a CUDA GPU; skipped without one. A package, for names that other folders have too."""
