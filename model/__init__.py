"""GPT-2 over paged KV: forward pass, weights, cache, training. Sees query rows and slots; knows no speculation."""
