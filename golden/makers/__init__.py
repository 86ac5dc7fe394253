"""One module a peer: each runs other people's code on our models and texts, and returns what it answered."""
