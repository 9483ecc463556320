"""Networks for use elsewhere: folded, exported, or asked for the classes of a photograph."""
