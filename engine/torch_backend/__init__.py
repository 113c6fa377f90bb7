"""The engine on torch: CPU, and CUDA by the same code. Only here (and under engine/seedling) is torch imported."""

import os

# After every operation torch's OpenMP threads (libgomp, which reads this when torch is imported) spin for 300,000
# turns, some 15 ms, on the cores that the compiled passes need next. Less costs torch's own passes what it saves the
# compiled ones (SPEED.md, attempt 33), and to sleep at once doubles the seedling's time.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
