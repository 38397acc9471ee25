"""How weights travel from the learner to the workers, and how a worker comes to believe them."""
