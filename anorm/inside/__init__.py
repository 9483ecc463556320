"""Looking into a trained network: what its norms decide, what its units answer, what the decisions are worth."""
