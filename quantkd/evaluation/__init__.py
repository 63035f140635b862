"""How good a model is: accuracy of its answers, fidelity to the teacher, and the statistics of both."""
