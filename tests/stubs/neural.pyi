from model_containers.neural import *  # noqa: F403
