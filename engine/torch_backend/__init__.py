"""The engine on torch: CPU, and CUDA by the same code. Only here (and under engine/seedling) is torch imported."""
