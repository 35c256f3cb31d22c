"""Measurements of brim beside other frameworks: each module is a script, ``python -m brim_bench.planned_steps``."""
