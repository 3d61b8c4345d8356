"""Latency: measured by a timing harness, and predicted from shapes and hardware by an analytic model."""
