"""What is known about each server, as others read it: Prometheus text and JSON."""
