"""Keeping and getting: atomic files, locks, sealed artifacts, activation shards, Parquet tables, polite HTTP."""
