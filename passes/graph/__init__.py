"""Graphs as such: new nodes, writes, graphs inside graphs."""
