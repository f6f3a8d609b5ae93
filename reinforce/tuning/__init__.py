"""``reinforce tune``: logit scales and lambda, by screening and short trainings."""
