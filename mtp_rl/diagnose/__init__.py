"""What the MTP gradient does to the RL objective, measured along a run."""
