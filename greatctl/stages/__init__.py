"""The seven stages, each a `Config`, a `plan` and a `run`; where the rooms of the house meet."""
