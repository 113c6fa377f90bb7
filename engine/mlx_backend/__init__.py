"""The engine on MLX: Apple Silicon, and any machine with the package mlx. Only here is mlx imported, and no torch."""
