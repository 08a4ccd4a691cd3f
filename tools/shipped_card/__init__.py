"""Measure shipped models on what training held out, and write their cards."""
