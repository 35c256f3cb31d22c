"""Programs: a step is traced once, planned to the byte, then replayed.

``trace.py`` records a step as the instructions of ``ir.py``; ``passes/`` rewrite them; ``place.py`` gives every value
its bytes in one arena; ``run.py`` binds kernels to those bytes and replays them; ``plan.py`` says what it will need.
"""
