# mypy finds contract here for a model, which finds model_containers/contract.py beside itself in its image.
from model_containers.contract import *  # noqa: F403
