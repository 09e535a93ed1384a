"""The dashboard, on a source nobody publishes and a clock nobody winds."""
