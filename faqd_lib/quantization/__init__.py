"""Low-bit networks: weight quantizers, quantized ReLU, and what puts them into any network."""
