"""Measuring: metrics with intervals over prompts, judges, rewards by noise level, policies, the report."""
