"""Where a graph multiplies with a parameter, and on which way the parameter came there."""
