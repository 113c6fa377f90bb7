"""The engine on torch: CPU, and CUDA by the same code. Only here (and under engine/seedling) is torch imported."""

import os

# After every operation torch's OpenMP threads (libgomp, which reads this when torch is imported) spin for 300,000
# turns, some 15 ms, on the cores that the compiled passes need next. Less costs torch's own passes what it saves the
# compiled ones (SPEED.md, attempt 33), and to sleep at once doubles the seedling's time.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

# Blocks from 2 MB on in pages of 2 MB, where Linux gives those to whoever asks. In pages of 4 kB decoding 512 x 512 has
# to be given half a million of them, a second of work (attempt 56).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
