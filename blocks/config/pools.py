"""The work pools of the platform."""

CPU = "cpu"  # whole flows: preparing, scoring, gathering
GPU = "gpu"  # trainings, one fold each
