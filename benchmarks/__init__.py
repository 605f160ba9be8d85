"""Speed, memory and faults, measured."""
