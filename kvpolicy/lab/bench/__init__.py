"""What a decode step costs: contenders in alternation, against a floor and what others offer."""
