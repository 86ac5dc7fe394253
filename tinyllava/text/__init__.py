"""Words in, words out: tokenizers, prompt templates, and the choice of the next token."""
