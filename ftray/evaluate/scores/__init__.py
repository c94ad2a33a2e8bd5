"""How good answers are, by the metrics that each task is known by. `scores.registry` names them all."""
