"""The commands of the command line, one module each. They format; what they show is computed elsewhere."""
