"""Arithmetic on step records: bytes, FLOPs, where device time went, figures. No I/O, no clock, no torch."""
