"""What is built from the other rooms for people: looking at a machine, and at what a model has learnt."""
