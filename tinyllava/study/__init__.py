"""Looking inside: traces of a run, comparisons of two, reports. All of it watches; nothing here computes."""
