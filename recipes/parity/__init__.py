"""What backprop learns, `auto` learns: one table of many kinds of networks and data."""
