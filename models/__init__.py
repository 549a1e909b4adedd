"""Base models: families, loading, text encoders, VAE, denoisers, sampling. Knows no LoRA and no preference."""
