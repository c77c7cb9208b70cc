"""What is built from the other rooms for people: looking at a machine, at data, and at what a model has learnt."""
