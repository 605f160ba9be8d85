"""Token log-probabilities, advantages, and policy and MTP losses."""
