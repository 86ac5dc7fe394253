"""The language model: embeddings in, the next token's logits out."""
